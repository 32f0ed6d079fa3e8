"""The difference between two models that were asked the same questions, and its interval: the one function for it.

Tables, guard, diagnosis, report, checks and `evaluate.py --compare` call it, so that one difference has one interval.
"""

from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np

from mpa.answers.intervals import paired_difference

ENOUGH = 30  # images whose difference is not the most frequent one; the bootstrap of fewer is too narrow
RESAMPLES = 2000

Part = tuple[Sequence[float], Sequence[Hashable]]  # of one seed: the difference of each question, and its image


def interval(*seeds: Part, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean difference, in the unit of the scores; of several seeds, of the mean of their means.

    A seed is (differences [n] from -1 to 1, images [n]). The unit of sampling is the image: a resample draws images with
    all their questions and with the differences of all seeds that were asked about them. So a repeated question, several
    questions about an image and seeds that share some of their questions add no certainty that is not there (Miller 2024,
    Adding error bars to evals, section 2.2; Davison and Hinkley 1997, Bootstrap methods, section 3.8).

    With at least ENOUGH images whose difference is not the most frequent one it is the percentile bootstrap. With fewer, most
    resamples look alike, and if no answer changed all do. Then it is Tango's score interval of a paired difference
    (`intervals.paired_difference`), which has a width there and is near its level from a dozen questions on. It is computed
    from the sums of the positive and of the negative differences per image, as for answers that are right or wrong: differences
    between -1 and 1 vary less, so it is at least as wide as needed. Images with unequal numbers of questions count as
    (sum of weights)² / sum of weights² equal ones (Kish 1965), and as so few that the images with a difference are not more than
    they are by the same formula: one image with many questions is one. Of no questions: NaN.
    """
    if not all(len(values) for values, _ in seeds):
        return float("nan"), float("nan")
    sums, sizes = _by_image(seeds)
    weights = (sizes / sizes.sum(axis=0)).mean(axis=1)
    shares = (sums / sizes.sum(axis=0)).mean(axis=1)  # of each image in the mean difference
    _, same = np.unique((shares / weights).round(9), return_counts=True)
    if len(weights) - same.max() < ENOUGH:
        equal, changed = float(1 / (weights**2).sum()), np.abs(shares)
        if changed.any():
            equal = min(equal, float(changed.sum() / (changed**2).sum()))
        equal = round(equal, 9)
        better, worse = (round(equal * float(np.clip(side * shares, 0, None).sum()), 9) for side in (1, -1))
        return paired_difference(better, worse, equal, NormalDist().inv_cdf((1 + level) / 2))
    if (sizes == sizes[:, :1]).all():  # all seeds were asked the same
        sums, sizes = sums.mean(axis=1, keepdims=True), sizes[:, :1]
    low, high = np.percentile(_bootstrap_means(sums, sizes), [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def summary(values: Sequence[float], images: Sequence[Hashable]) -> dict:
    """{"score", "ci95", "n", "images", "better", "worse"}: mean difference, its interval, and how many there are of what."""
    values = np.asarray(values, dtype=float)
    found = {"score": float(values.mean()) if len(values) else float("nan"), "ci95": interval((values, images))}
    found |= {"n": len(values), "images": len(set(images))}
    return found | {"better": int((values > 0).sum()), "worse": int((values < 0).sum())}


def _by_image(seeds: Sequence[Part]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the differences, number of questions), each [images, seeds]."""
    places = {image: i for i, image in enumerate(dict.fromkeys(image for _, images in seeds for image in images))}
    sums, sizes = np.zeros((2, len(places), len(seeds)))
    for seed, (values, images) in enumerate(seeds):
        at = [places[image] for image in images]
        sums[:, seed] = np.bincount(at, np.asarray(values, dtype=float), len(places))
        sizes[:, seed] = np.bincount(at, minlength=len(places))
    return sums, sizes


def _bootstrap_means(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The mean over seeds of the mean difference, in resamples of the images.

    Few images are distinct, so it samples the count of each distinct one (multinomial) instead of single images.
    """
    distinct, counts = np.unique(np.hstack([sums, sizes]).round(9), axis=0, return_counts=True)
    n = counts.sum()
    drawn = np.random.default_rng(0).multinomial(n, counts / n, size=RESAMPLES)
    sums, sizes = np.hsplit(drawn @ distinct, 2)
    asked = sizes.all(axis=1)  # each seed has a question in it
    return (sums[asked] / sizes[asked]).mean(axis=1)
