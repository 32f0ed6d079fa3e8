"""Is a probability worth what it says? A model's answers by the probability that it gave them, and how many are right.

Guo et al. 2017, On Calibration of Modern Neural Networks: ten bins of equal width, and the expected calibration error. Not in the
paper; it tells whether PI's --min-probability selects what it should.
"""

import math
from dataclasses import dataclass

import numpy as np

from mpa.answers.intervals import wilson
from mpa.data import DATASETS
from mpa.runs.case import Case, finite

BINS = 10


@dataclass(frozen=True)
class Bin:
    """`n` answers with probabilities in one tenth of the scale: their mean probability, the share that is right, its interval."""

    n: int
    probability: float
    right: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Reliability:
    """Answers of one model: `probabilities` and whether each is `right`, both [n], from 0 to 1. `what` says what right means."""

    model: str
    what: str
    probabilities: np.ndarray
    right: np.ndarray

    @property
    def bins(self) -> list[Bin]:
        """Those that are not empty."""
        places = np.minimum((self.probabilities * BINS).astype(int), BINS - 1)
        found = []
        for place in np.unique(places):
            inside = places == place
            n, share = int(inside.sum()), float(self.right[inside].mean())
            found.append(Bin(n, float(self.probabilities[inside].mean()), share, wilson(share, n)))
        return found

    @property
    def error(self) -> float:
        """The expected calibration error: the mean of |probability - right| over the bins, weighted by their answers."""
        return sum(b.n * abs(b.probability - b.right) for b in self.bins) / len(self.right)


def _reliability(model: str, what: str, pairs) -> list[Reliability]:
    """One Reliability of the pairs (log-probability, right) that have a log-probability; none if no pair has."""
    known = [(math.exp(min(0.0, p)), float(right)) for p, right in pairs if finite(p) is not None]
    return [Reliability(model, what, *np.array(known).T)] if known else []


def of_case(case: Case) -> list[Reliability]:
    """What the files of a cell tell, in this order: the L-VLM's answers to its own questions, and all answers to the test
    questions."""
    cell, match = case.cell, case.judge.match
    repeats = [(s.lvlm_logprob, match(s.lvlm_answer, s.annotation)) for s in case.usable if s.lvlm_answer is not None]
    found = _reliability(cell.lvlm, "its answer is its annotation", repeats)
    right = "its test answer is right" if DATASETS[cell.dataset].labelled else "its test answer is the L-VLM's"
    for model in (cell.svlm, case.model, cell.lvlm):
        evaluation = case.evaluation(model)
        if evaluation:
            logprobs = [r.get("logprob") for r in evaluation.records]
            found += _reliability(model, right, zip(logprobs, evaluation.scores, strict=True))
    return found
