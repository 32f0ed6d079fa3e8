"""The parity rule (paper, section 3.2): keep what the L-VLM answers consistently and the S-VLM gets wrong."""

from mpa import records
from mpa.matching import Match
from mpa.presets import PRESETS
from mpa.prompts import train_prompt


class ParityRule:
    """The rule with one matcher (a key of matching.MATCHERS) under one preset. Records are those of PI files."""

    def __init__(self, match: str, preset: str):
        self.match, self.preset = Match(match, preset), preset

    def agrees(self, record: dict) -> bool:
        """Does this model's answer match the annotation's?"""
        return self.match(record["predictions"], record["PA_answer"])

    def consistent(self, record: dict) -> bool:
        """Does the L-VLM agree with itself? Under `paper` a reply that was cut off or filtered does not count."""
        return self.agrees(record) and not (PRESETS[self.preset].checked and record.get("finish_reason"))

    def only_unwrapped(self, answers: list[dict]) -> int:
        """How many answers match only without the words or marks around them."""
        return sum(self.match.only_unwrapped(r["predictions"], r["PA_answer"]) for r in answers)

    def parity_set(self, lvlm: list[dict], svlm: list[dict]) -> list[dict]:
        """D_PI = {(I, Q, A): the L-VLM's answer matches A, the S-VLM's does not}, as train records (equations 1 and 2).

        Samples come in the order of the S-VLM's answers; a sample that only one model answered is not in the set. As in
        the released code, the annotation is the one in the S-VLM's record.
        """
        lvlm_by_id, parity = {str(r["question_id"]): r for r in lvlm}, []
        for s in svlm:
            l = lvlm_by_id.get(str(s["question_id"]))  # noqa: E741
            if l is None or s.get("left_out"):
                continue
            if self.consistent(l | {"PA_answer": s["PA_answer"]}) and not self.agrees(s):
                prompt = train_prompt(s["PA_question"], self.preset)
                parity.append(records.train_record(s["question_id"], s["image_path"], prompt, s["PA_answer"]))
        return parity
