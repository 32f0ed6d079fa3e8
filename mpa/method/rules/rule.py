"""What a rule beyond the paper is: it changes the verdict on a sample, or which of the judged samples are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpa.answers.matching import Match


@dataclass(frozen=True)
class Selection:
    """PI records to train on, in their order: the parity samples, and with `anchors` some of those that both models answer `right`."""

    parity: list[dict]
    right: list[dict]
    anchors: list[dict] | None = None


class Rule:
    """A rule that changes nothing. A rule is a subclass, in a file of this folder, and a row of the registry.

    `settings` are those of a train file, as its meta file stores them. `NAMES` are the rule's own settings and flags. Below, `lvlm`
    is the L-VLM's PI record of a sample: `PA_question`, `PA_answer`, `predictions`, `logprob` …; `answer` is the annotated answer.
    """

    NAMES: tuple[str, ...] = ()
    reason = ""  # why a sample is left out, as reports call it
    selects = False  # it chooses among samples that both models have answered (`select`), after all verdicts
    asks = ""  # where it asks the L-VLM further: its flag, and the name of the file with the answers
    per_question = 0  # how many further requests for each question

    def __init__(self, settings: dict):
        self.settings = settings

    @staticmethod
    def add_flags(parser) -> None:
        """Add the rule's flags; by default the rule is not in use."""

    @classmethod
    def settings_of(cls, args) -> dict:
        """What the flags set, as a train file stores it; {} if the rule is not in use."""
        return {name: value for name in cls.NAMES if (value := getattr(args, name))}

    @classmethod
    def in_use(cls, settings: dict) -> bool:
        return bool(settings.get(cls.NAMES[0]))

    def prepare(self, folder) -> None:
        """Make the images in the run folder that `questions` are about, before they are asked."""

    def questions(self, questions: Sequence, folder) -> list:
        """What the L-VLM is asked further: copies of `questions` (dataclasses with `request` and `before`) with other requests."""
        return []

    def see(self, answers: list[dict]) -> None:
        """Take the L-VLM's answers, PI records: to its own questions where the rule asks nothing, else to `questions`.

        Raises InputError if they lack what the rule needs.
        """

    def agrees(self, lvlm: dict, answer: str | None, match: Match) -> tuple[bool, str] | None:
        """Instead of Ã = A: does the L-VLM repeat its annotation, and what the verdict's detail adds? None: as in the paper."""

    def leaves_out(self, lvlm: dict, answer: str | None, match: Match) -> str:
        """Why a sample on which the L-VLM agrees with itself is left out all the same; "" if it is not."""
        return ""

    def select(self, chosen: Selection) -> Selection:
        """Which of the judged samples are trained on."""
        return chosen
