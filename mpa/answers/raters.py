"""How far human raters agree: kappa and alpha.

`ratings` is an array [items, raters] of 0 and 1. An item is one image with its question and answer.
"""

import math
from collections.abc import Callable

import numpy as np


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
