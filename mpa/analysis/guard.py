"""The guard: is a levelled S-VLM worse than the one it came from? Told without labels, from held-out questions.

Both models answer the questions of PI's held-out set, which the L-VLM answers consistently and PL never trains on: those that the
S-VLM answered right and wrong, in their natural share. An answer counts as right if it agrees with the L-VLM's.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist

from mpa.answers import paired
from mpa.answers.intervals import Z, wilson
from mpa.files import records
from mpa.files.records import InputError
from mpa.method import holdout
from mpa.runs import comparable
from mpa.runs.evaluations import Evaluation, read_meta
from mpa.runs.folders import RunFolder
from mpa.runs.layout import ANY, Cell, RunFiles

BETTER, WORSE, OPEN, NONE = "better", "worse", "not told apart", "no verdict"
SCORED_AS = "images"  # the dataset whose metrics measure agreement
ERROR = 0.05  # in so many cases at most a verdict of better or worse is wrong, where PL has changed nothing
POWER = NormalDist().inv_cdf(0.8)  # of 4 in 5 cases
GAIN = 0.05  # besides the measured gain, the gain for which the number of questions is told
MOST_HELD_OUT = 0.5  # above this share, more images help more than a larger share


@dataclass(frozen=True)
class Comparison:
    """`n` questions to which both models gave a usable reply; `fixed` became right by PL, `broken` became wrong.

    `unusable` more have none from one of both; `no_verdict` says if these are too many. The same questions judge `candidates`
    levelled models. `part` are the gain and the image of each question; without it, each question has its own image.
    """

    n: int
    right_before: int
    fixed: int
    broken: int
    unusable: int = 0
    candidates: int = 1
    no_verdict: str = ""
    notes: tuple[str, ...] = ()
    part: paired.Part | None = field(default=None, repr=False, compare=False)

    @property
    def gain(self) -> float:
        return (self.fixed - self.broken) / self.n if self.n else math.nan

    @property
    def images(self) -> int:
        """How many images the questions are about."""
        return len(set(self.part[1])) if self.part else self.n

    def _interval(self, level: float) -> tuple[float, float]:
        gains = [1.0] * self.fixed + [-1.0] * self.broken + [0.0] * (self.n - self.fixed - self.broken)
        return paired.interval(self.part or (gains, range(self.n)), level=level)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the gain, as everywhere: `paired.interval`."""
        return self._interval(1 - ERROR)

    @property
    def level_of_better(self) -> float:
        """The level at which a model is called better: the error is divided by the candidates (Bonferroni; Dunn 1961, Multiple
        comparisons among means), as the best of several seems better by chance more often than one.
        """
        return 1 - ERROR / self.candidates

    @cached_property
    def verdict(self) -> str:
        if self.no_verdict:
            return NONE
        if self.interval[1] < 0:
            return WORSE
        return BETTER if self._interval(self.level_of_better)[0] > 0 else OPEN

    def needed(self, gain: float) -> int:
        """How many questions tell such a gain from chance in 4 of 5 cases, if as many answers change as changed here.

        McNemar's test at 5 %: Connor 1987, Sample size for testing differences in proportions for the paired-sample design. If
        no answer changed, the upper bound of the share stands for it.
        """
        changed = (self.fixed + self.broken) / self.n or wilson(0, self.n)[1]
        changed = max(changed, abs(gain))
        return math.ceil((Z * math.sqrt(changed) + POWER * math.sqrt(changed - gain**2)) ** 2 / gain**2)

    def as_json(self) -> dict:
        found = asdict(replace(self, part=None)) | {"images": self.images, "verdict": self.verdict}
        del found["part"]
        said = {"gain": None, "ci95": None} if self.no_verdict else {"gain": self.gain, "ci95": self.interval}
        return found | said


def compare(before: Evaluation, after: Evaluation, candidates: int = 1) -> Comparison:
    """Raises `comparable.NotComparable` if the two say nothing about the models; if it is only that too many replies are not
    usable, there is no verdict.
    """
    pairs = comparable.pairs(before, after)
    gains, (right, _) = pairs.gains, pairs.scores
    counts = (len(gains), round(float(right.sum())), int((gains > 0).sum()), int((gains < 0).sum()), pairs.unusable)
    return Comparison(*counts, candidates, pairs.no_verdict, tuple(pairs.notes), (gains, pairs.images))


class Guard:
    """The held-out answers of one cell of a run: the S-VLM's before PL, and those of its levelled models, by variant."""

    def __init__(self, folder: Path, cell: Cell):
        self.files, self.cell = RunFiles(folder, cell), cell

    @cached_property
    def variants(self) -> dict[str, str]:
        """{variant: model} of the levelled models that were asked the held-out questions, MPA's first."""
        return RunFolder(self.files.folder).variants(self.cell, self.files.guard_answers(ANY))

    @property
    def share(self) -> float:
        """Of the images that are held out."""
        return holdout.share_of(self.files.held_out)

    @property
    def questions(self) -> str:
        """Whose questions are asked about the held-out images."""
        given = self.files.held_out_given.exists()
        return "given questions about held-out images" if given else "the L-VLM's own questions about held-out images"

    def model(self, variant: str) -> Path:
        """The folder of a levelled model."""
        return self.files.folder / self.variants.get(variant, self.files.levelled(variant).name)

    def compare(self, variant: str) -> Comparison:
        return compare(*self.answers(variant), candidates=max(1, len(self.variants)))

    def answers(self, variant: str) -> tuple[Evaluation, Evaluation]:
        """(before PL, after). Raises InputError for a missing file, and for one with replies that are still to be asked again."""
        return self._answers(self.cell.svlm), self._answers(self.model(variant).name)

    def _answers(self, model: str) -> Evaluation:
        """A model's answers to the held-out questions."""
        path = self.files.guard_answers(model)
        if not path.exists():
            raise InputError(
                f"{path}: no such file. Ask the model first: scripts/evaluate.py --held-out, or scripts/guard.sh."
            )
        meta = read_meta(records.meta_path(path))
        if unfinished := meta.get("unfinished"):
            raise InputError(
                f"{path}: {unfinished} replies failed with a temporary error, so nothing can be told yet. "
                "The same command of evaluate asks them again."
            )
        return Evaluation.of(path, records.read_records(path, "Eval"), SCORED_AS, meta["settings"]["preset"], meta)


def how_to_get(have: int, questions: int, share: float) -> str:
    """How to get so many held-out questions where `share` of the images gave `have`."""
    larger = share * questions / have
    if larger <= MOST_HELD_OUT:
        return f"hold out more images: PI's --hold-out {math.ceil(100 * larger) / 100:g}, with another RUN"
    return f"annotate about {math.ceil(questions / have)} times as many images"


def conclusion(found: Comparison, share: float) -> list[str]:
    """What the comparison says, in words. `share` is that of the held-out images."""
    if found.verdict == NONE:
        return [f"No verdict: {found.no_verdict}. See left_out in the files; repeat the evaluation."]
    if found.verdict != OPEN:
        return [f"The levelled S-VLM is {found.verdict} than the one it came from."]
    needed = {size: found.needed(size) for size in dict.fromkeys((abs(found.gain) or GAIN, GAIN))}
    told = [f"{n:,} for a gain of {100 * size:.1f} points" for size, n in needed.items()]
    told[0] += ", as measured" if found.gain else ""
    first, changed = next(iter(needed.values())), found.fixed + found.broken
    remedy = f" To get {first:,}, {how_to_get(found.images, first, share)}." if first > found.images else ""
    chance = (
        f" The best of {found.candidates} models seems better by chance more often than one, so better is said at "
        f"{100 * found.level_of_better:.4g} %."
    )
    return [
        f"Nothing can be concluded: {found.n} held-out questions, of which {changed} changed from right to wrong or back, do not "
        f"tell the models apart.{chance if found.interval[0] > 0 else ''}",
        f"Questions that would, in 4 of 5 cases: {'; '.join(told)}.{remedy}",
    ]


def recommended(found: dict[str, Comparison]) -> str | None:
    """The variant with the highest gain of those that are better than the S-VLM before; None: keep the S-VLM before."""
    better = [name for name, one in found.items() if one.verdict == BETTER]
    return max(better, key=lambda name: found[name].gain) if better else None
