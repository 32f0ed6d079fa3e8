"""The parity rule (paper, section 3.2): keep what the L-VLM answers consistently and the S-VLM gets wrong."""

import math
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from mpa import records
from mpa.matching import Match
from mpa.normalise import normalise
from mpa.presets import PRESETS
from mpa.prompts import train_prompt


class ParityRule:
    """The rule for one matcher (a key of matching.MATCHERS) and one preset. Records are those of PI files.

    Not in the paper: with `min_probability` the L-VLM's answer must also have that probability; and `blind` are the ids of the
    questions that it answers as annotated without seeing the image, on which it never counts as consistent.
    """

    def __init__(self, match: str, preset: str, min_probability: float = 0.0, blind: Iterable[str] = ()):
        self.match, self.preset = Match(match, preset), preset
        self.min_probability, self.blind = min_probability, set(blind)

    @classmethod
    def of(cls, settings: dict, folder: Path, lvlm: str, dataset: str) -> "ParityRule":
        """The rule of a parity set, from its meta file's settings and its run folder."""
        rule = cls(settings["match"], settings["preset"], settings.get("min_probability", 0.0))
        if settings.get("blind"):
            rule.see_blind(records.read_records(blind_file(folder, lvlm, dataset), "PI"))
        return rule

    def see_blind(self, answers: list[dict]) -> None:
        """Take the L-VLM's answers without the image."""
        self.blind = {str(r["question_id"]) for r in answers if self.agrees(r)}

    def agrees(self, record: dict) -> bool:
        """Does the model's answer match the annotation's answer?"""
        return self.match(record["predictions"], record["PA_answer"])

    def consistent(self, record: dict) -> bool:
        """Does the L-VLM agree with itself? Under `paper`, a truncated or filtered reply never counts as agreement."""
        cut = PRESETS[self.preset].checked and record.get("finish_reason")
        return (
            self.agrees(record) and not cut and self.sure(record) and str(record.get("question_id")) not in self.blind
        )

    def sure(self, record: dict) -> bool:
        """Has the answer the least probability? Without a log-probability it has not."""
        logprob = record.get("logprob")
        return not self.min_probability or (logprob is not None and math.exp(logprob) >= self.min_probability)

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


def blind_file(folder: Path, lvlm: str, dataset: str) -> Path:
    """The L-VLM's answers to its questions about a grey image (PI's --blind)."""
    return folder / f"PI_{lvlm}_blind_{dataset}.json"


def capped(samples: list[dict], per_question: int, per_answer: int, seed: int) -> list[dict]:
    """At most so many PI records of one question and of one answer, normalised, chosen at random, in their order. 0: no limit.

    In 9,009 released annotations of OK-VQA one question stands 150 times. The paper has no such limit.
    """
    counts, kept = Counter(), []
    for place in random.Random(seed).sample(range(len(samples)), len(samples)):
        r = samples[place]
        limited = {
            "question": (normalise(r["PA_question"] or ""), per_question),
            "answer": (normalise(r["PA_answer"]), per_answer),
        }
        if all(not most or counts[what, text] < most for what, (text, most) in limited.items()):
            counts.update((what, text) for what, (text, _) in limited.items())
            kept.append(place)
    return [samples[place] for place in sorted(kept)]


def funnel_line(funnel: dict[str, int]) -> str:
    """ "1000 images → 990 parsed → 685 L-consistent → 239 parity"; the key `pictures` is older than the word.

    Anchors are no step: "… → 239 parity + 478 anchors".
    """
    steps = [f"{n} {'images' if what == 'pictures' else what}" for what, n in funnel.items() if what != "anchors"]
    return " → ".join(steps) + (f" + {funnel['anchors']} anchors" if "anchors" in funnel else "")
