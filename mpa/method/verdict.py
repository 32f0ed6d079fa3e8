"""Which samples are kept, and why the others are not: one reason for each sample (paper, section 3.2).

    D_PI = {(I, Q, A) in D_PA : Ã = A and Â ≠ A}                                                    equations 1 and 2

I is an image, Q and A are its annotation, Ã and Â the answers of L-VLM and S-VLM to Q. The first half is quality control, the
second finds what the S-VLM lacks. All that reads or counts verdicts takes them from here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mpa.answers.finish_reasons import why_cut
from mpa.answers.matching import Match
from mpa.method import rules
from mpa.method.presets import PRESETS
from mpa.method.prompts import Annotation
from mpa.method.rules.rule import Rule

PARITY = "parity"  # Ã = A and Â ≠ A
BOTH_RIGHT = "both right"  # Ã = A and Â = A
DISAGREES = "L-VLM disagrees"  # Ã ≠ A
CUT = "L-VLM's reply cut"
HELD_OUT = "held out"  # said only of samples on which the L-VLM agrees with itself: the others are of no use there
NOT_ASKED = "S-VLM not asked"
NO_ANNOTATION = "no usable annotation"
LVLM_FAILED = "no answer of the L-VLM"
SVLM_FAILED = "no answer of the S-VLM"

# All reasons, in the order of tables and reports.
REASONS = (
    PARITY,
    NO_ANNOTATION,
    LVLM_FAILED,
    CUT,
    *rules.reasons(selects=False),
    DISAGREES,
    BOTH_RIGHT,
    *rules.reasons(selects=True),
    NOT_ASKED,
    HELD_OUT,
    SVLM_FAILED,
)
# Those of consistent samples: Ã = A, the reply is whole, and no rule leaves the sample out.
CONSISTENT = {PARITY, BOTH_RIGHT, HELD_OUT, NOT_ASKED, SVLM_FAILED, *rules.reasons(selects=True)}


def in_order(items: Iterable, reason: Callable = str) -> list:
    """The items in the order of their reasons; those of a rule that is no longer there come last."""
    return sorted(items, key=lambda item: REASONS.index(reason(item)) if reason(item) in REASONS else len(REASONS))


class Verdict(NamedTuple):
    """One of REASONS; `detail` says more to a person."""

    reason: str
    detail: str = ""

    @property
    def consistent(self) -> bool | None:
        """Does the L-VLM agree with itself? None where it has not answered."""
        return None if self.reason in (NO_ANNOTATION, LVLM_FAILED) else self.reason in CONSISTENT


@dataclass(frozen=True)
class Judge:
    """Gives each sample its verdict. A pure function of the sample, the matcher, the preset and the rules beyond the paper."""

    match: Match
    checked: bool = True  # a reply that was cut off or filtered agrees with nothing
    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, settings: dict, chosen: tuple[Rule, ...] = ()) -> "Judge":
        """By "match" and "preset" of a train file's settings."""
        preset = PRESETS[settings["preset"]]
        return cls(Match(settings["match"], preset.literal), preset.checked, chosen)

    def __call__(
        self, annotation: Annotation, lvlm: dict | None, svlm: dict | None = None, held_out: bool = False
    ) -> Verdict:
        """`lvlm` and `svlm` are the models' PI records of the sample, None for a model that has not answered."""
        if lvlm is None:
            if annotation.left_out or not (annotation.question and annotation.answer):
                return Verdict(NO_ANNOTATION, annotation.left_out or "no question or answer")
            return Verdict(LVLM_FAILED)
        if lvlm.get("left_out"):
            return Verdict(LVLM_FAILED, lvlm["left_out"])
        if (doubt := self._doubt(annotation.answer, lvlm)) is not None:
            return doubt
        if held_out:
            return Verdict(HELD_OUT)
        if svlm is None:
            return Verdict(NOT_ASKED)
        if svlm.get("left_out"):
            return Verdict(SVLM_FAILED, svlm["left_out"])
        return Verdict(BOTH_RIGHT if self.match(svlm["predictions"], annotation.answer) else PARITY)

    @property
    def not_selected(self) -> Verdict:
        """On a parity sample that is not in a train file whose reasons are not known: by the rule that selects."""
        by_rule = next((rule.reason for rule in self.rules if rule.selects and rule.reason), None)
        return Verdict(by_rule) if by_rule else Verdict(SVLM_FAILED, "not in the parity set")

    def _doubt(self, answer: str | None, lvlm: dict) -> Verdict | None:
        """Why the sample is not consistent; None where it is: Ã = A, no rule leaves it out, and the reply is whole."""
        by_rules = (rule.agrees(lvlm, answer, self.match) for rule in self.rules)
        agrees, more = next(filter(None, by_rules), (self.match(lvlm["predictions"], answer), ""))
        if not agrees:
            return Verdict(DISAGREES, f"it answers {lvlm['predictions']!r}{more}")
        for rule in self.rules:
            if detail := rule.leaves_out(lvlm, answer, self.match):
                return Verdict(rule.reason, detail)
        cut = why_cut(lvlm.get("finish_reason")) if self.checked else None
        return Verdict(CUT, cut) if cut else None
