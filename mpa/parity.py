"""The parity rule (paper, section 3.2): keep what the L-VLM answers consistently and the S-VLM gets wrong."""

from mpa import records
from mpa.matching import Match
from mpa.presets import PRESETS
from mpa.prompts import train_prompt


class ParityRule:
    """The rule for one matcher (a key of matching.MATCHERS) and one preset. Records are those of PI files."""

    def __init__(self, match: str, preset: str):
        self.match, self.preset = Match(match, preset), preset

    def agrees(self, record: dict) -> bool:
        """Does the model's answer match the annotation's answer?"""
        return self.match(record["predictions"], record["PA_answer"])

    def consistent(self, record: dict) -> bool:
        """Does the L-VLM agree with itself? Under `paper`, a truncated or filtered reply never counts as agreement."""
        return self.agrees(record) and not (PRESETS[self.preset].checked and record.get("finish_reason"))

    def only_unwrapped(self, answers: list[dict]) -> int:
        """How many answers match only after the words or Markdown around them are removed."""
        return sum(self.match.only_unwrapped(r["predictions"], r["PA_answer"]) for r in answers)

    def answered(self, lvlm: list[dict], svlm: list[dict]) -> tuple[list[dict], list[dict]]:
        """(wrong, right): the S-VLM's records of the samples that the L-VLM answers consistently, in their order.

        A sample that only one model answered is in neither. The annotation is read from the S-VLM's record, as in the
        released code.
        """
        lvlm_by_id, found = {str(r["question_id"]): r for r in lvlm}, ([], [])
        for s in svlm:
            l = lvlm_by_id.get(str(s["question_id"]))  # noqa: E741
            if l is None or s.get("left_out"):
                continue
            if self.consistent(l | {"PA_answer": s["PA_answer"]}):
                found[self.agrees(s)].append(s)
        return found

    def train_record(self, r: dict) -> dict:
        """The train record of a PI record."""
        prompt = train_prompt(r["PA_question"], self.preset)
        return records.train_record(r["question_id"], r["image_path"], prompt, r["PA_answer"])

    def parity_set(self, lvlm: list[dict], svlm: list[dict]) -> list[dict]:
        """D_PI = {(I, Q, A): the L-VLM's answer matches A, the S-VLM's does not}, as train records (equations 1 and 2)."""
        return [self.train_record(r) for r in self.answered(lvlm, svlm)[0]]


def funnel_line(funnel: dict[str, int]) -> str:
    """ "1000 images → 990 parsed → 685 L-consistent → 239 parity"; the key `pictures` is older than the word.

    Anchors are no step: "… → 239 parity + 478 anchors".
    """
    steps = [f"{n} {'images' if what == 'pictures' else what}" for what, n in funnel.items() if what != "anchors"]
    return " → ".join(steps) + (f" + {funnel['anchors']} anchors" if "anchors" in funnel else "")
