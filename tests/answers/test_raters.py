"""Kappas and intervals against values computed by hand or printed in the papers that they are from."""

import math

import numpy as np
import pytest

from mpa.answers.intervals import combined, wilson
from mpa.answers.raters import alpha, cohen_kappa, fleiss_kappa, interval, kappa


def test_cohens_kappa_of_a_table_computed_by_hand():
    both = [[1, 1]] * 20 + [[1, 0]] * 5 + [[0, 1]] * 10 + [[0, 0]] * 15
    # They agree on 35 of 50; by chance on 0.5 · 0.6 + 0.5 · 0.4 = 0.5.
    assert cohen_kappa(np.array(both)) == pytest.approx((0.7 - 0.5) / (1 - 0.5))


def test_fleiss_kappa_of_a_table_computed_by_hand():
    ratings = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    # Agreeing pairs: 1, 1/3, 1, 1/3; half of all ratings are yes, so chance gives 1/2.
    assert fleiss_kappa(ratings) == pytest.approx((2 / 3 - 1 / 2) / (1 - 1 / 2))
    assert kappa(ratings) == fleiss_kappa(ratings) and kappa(ratings[:, :2]) == cohen_kappa(ratings[:, :2])


def test_kappa_of_unanimous_raters_of_one_rater_or_of_no_item_is_undefined():
    for ratings in (np.ones((5, 2), int), np.zeros((5, 3), int), np.ones((5, 1), int), np.ones((0, 2), int)):
        assert math.isnan(kappa(ratings))
    assert all(map(math.isnan, interval(kappa, np.ones((5, 2), int))))


def counts(*raters: list[int | None]) -> np.ndarray:
    """How many of these raters said no and yes to each item; None: not rated."""
    return np.array([[sum(r == value for r in item) for value in (0, 1)] for item in zip(*raters, strict=True)])


def test_alpha_of_tables_computed_by_hand():
    # Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section A: ten items, 14 zeros of 20 values, 4 disagree:
    # 1 - 19 * 8 / (2 * 14 * 6) = 0.095.
    meg, owen = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert alpha(counts(meg, owen)) == pytest.approx(1 - 19 * 8 / (2 * 14 * 6))
    # Three raters, gaps, an item that one rated: of the pairable items 1 1 1, 0 0, 1 0 and 1 1 there are n0 = 3, n1 = 6, and
    # only the third disagrees, twice 1 / (2 - 1): alpha = 1 - (9 - 1) * 2 / (2 * 3 * 6).
    a, b, c = [1, 0, 1, None, 0], [1, 0, 0, 1, None], [1, None, None, 1, None]
    assert alpha(counts(a, b, c)) == pytest.approx(1 - 8 * 2 / (2 * 3 * 6))


def test_alpha_where_all_say_the_same_or_none_rated_twice_is_undefined():
    for of in ([[0, 2]] * 5, [[1, 0], [0, 1]], [[3, 0], [0, 1]], np.zeros((0, 2), int), np.zeros((4, 2), int)):
        assert math.isnan(alpha(np.array(of)))


def test_a_rater_with_two_clicks_hardly_changes_alpha():
    rng = np.random.default_rng(0)
    ada = rng.integers(0, 2, 50).tolist()
    bob = [a if rng.random() < 0.7 else 1 - a for a in ada]
    stray = [1 - ada[0], 1 - ada[1], *[None] * 48]
    assert abs(alpha(counts(ada, bob, stray)) - alpha(counts(ada, bob))) < 0.06
    both = np.array([ada, bob]).T
    assert alpha(counts(ada, bob)) == pytest.approx(fleiss_kappa(both), abs=0.01)


def test_the_interval_of_kappa_holds_it_and_shrinks_with_the_items():
    few = np.array([[1, 1], [1, 1], [0, 0], [0, 1], [1, 0], [0, 0], [0, 0], [1, 1]])
    low, high = interval(kappa, few)
    assert low < kappa(few) < high
    assert np.ptp(interval(kappa, np.tile(few, (16, 1)))) < (high - low) / 3


def test_intervals_of_shares_and_differences_are_those_of_newcombes_papers():
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    difference, interval = combined((1.0, 56 / 70, 70), (-1.0, 48 / 80, 80))
    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert combined((1.0, 0.3, 40))[1] == pytest.approx(wilson(0.3, 40))
