"""95 % intervals of shares and of their differences."""

import math
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)


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
