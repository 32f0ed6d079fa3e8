"""Shares with their 95 % intervals, and raters' agreement: the statistics of human ratings.

`ratings` is an array [items, raters] of 0 and 1. An item is one image with its question and answer.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


def cohen_kappa(ratings: np.ndarray) -> float:
    """Kappa of two raters: (p_o - p_e) / (1 - p_e), with chance agreement from each rater's own shares.

    Cohen 1960, A coefficient of agreement for nominal scales. NaN if chance agreement is certain.
    """
    observed = np.mean(ratings[:, 0] == ratings[:, 1])
    yes = ratings.mean(axis=0)
    expected = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan


def fleiss_kappa(ratings: np.ndarray) -> float:
    """Kappa of two or more raters, with chance agreement from the shares of all of them together.

    Fleiss 1971, Measuring nominal scale agreement among many raters. NaN if chance agreement is certain.
    """
    raters, yes = ratings.shape[1], ratings.sum(axis=1)
    pairs = yes * (yes - 1) + (raters - yes) * (raters - yes - 1)
    observed = np.mean(pairs / (raters * (raters - 1)))
    share = ratings.mean()
    expected = share**2 + (1 - share) ** 2
    return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan


def kappa(ratings: np.ndarray) -> float:
    """Cohen's kappa of two raters, Fleiss' of more; NaN without a pair of raters or an item."""
    items, raters = ratings.shape
    if items == 0 or raters < 2:
        return math.nan
    return cohen_kappa(ratings) if raters == 2 else fleiss_kappa(ratings)


def alpha(counts: np.ndarray) -> float:
    """Krippendorff's alpha of `counts` [items, 2], how many raters said no and yes: of any number of raters, who may have missed items.

    Krippendorff 2004, Content Analysis, chapter 11. Items with one rating do not count. NaN if no item has two, or if all say the same.
    """
    from krippendorff import alpha as of  # here, as only table 4 needs it

    pairs = counts[counts.sum(axis=1) > 1]
    if not pairs.any(axis=0).all():
        return math.nan
    return float(of(value_counts=pairs, level_of_measurement="nominal"))


def interval(statistic: Callable, ratings: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval over the items. Resamples in which `statistic` is undefined are left out."""
    rng = np.random.default_rng(seed)
    found = [statistic(ratings[rng.integers(len(ratings), size=len(ratings))]) for _ in range(resamples)]
    found = [value for value in found if not math.isnan(value)]
    return tuple(map(float, np.percentile(found, [2.5, 97.5]))) if found else (math.nan, math.nan)


def wilson(share: float, items: int) -> tuple[float, float]:
    """95 % score interval of a share of `items`. Wilson 1927, Probable inference, the law of succession.

    Also for a mean over several raters' shares: it is then at least as wide as needed, as raters differ by item.
    """
    if not items:
        return math.nan, math.nan
    centre = (share + Z**2 / (2 * items)) / (1 + Z**2 / items)
    half = Z / (1 + Z**2 / items) * math.sqrt(share * (1 - share) / items + Z**2 / (4 * items**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(better: float, worse: float, items: float, z: float = Z) -> tuple[float, float]:
    """95 % score interval of (better - worse) / items: the change of a share in the same items, of which so many changed.

    Tango 1998, Equivalence test and confidence interval for the difference in proportions for the paired-sample design. It
    leaves out 0 exactly where McNemar's test without continuity correction rejects, and has a width if nothing changed.
    `mpa.answers.paired` uses it where few answers changed; `z` is the normal distribution's quantile for another level.
    """
    if not items:
        return math.nan, math.nan

    def statistic(d: float) -> float:
        """(observed - d) in standard errors, with the shares of changes that are most likely under d."""
        a, b, c = 2 * items, -better - worse + (2 * items - better + worse) * d, -worse * d * (1 - d)
        likely = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = items * (2 * likely + d * (1 - d))
        return (
            (better - worse - items * d) / math.sqrt(variance)
            if variance > 0
            else math.copysign(math.inf, observed - d)
        )

    def limit(end: float, z: float) -> float:
        inside, outside = observed, end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(statistic(middle)) < z else (inside, middle)
        return inside

    observed = (better - worse) / items
    return limit(-1.0, z), limit(1.0, z)


def combined(*parts: tuple[float, float, int]) -> tuple[float, tuple[float, float]]:
    """(sum, 95 % interval) of weight · share over independent shares; a part is (weight, share, items).

    From the shares' Wilson intervals: Newcombe 1998, Interval estimation for the difference between independent
    proportions (method 10), for any weights as in Zou and Donner 2008.
    """
    total = sum(weight * share for weight, share, _ in parts)
    below = above = 0.0
    for weight, share, items in parts:
        ends = [weight * (bound - share) for bound in wilson(share, items)]
        below, above = below + min(ends) ** 2, above + max(ends) ** 2
    return total, (total - math.sqrt(below), total + math.sqrt(above))
