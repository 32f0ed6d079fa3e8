"""Kappas and intervals against values computed by hand or printed in the papers that they are from."""

import math

import numpy as np
import pytest

from mpa.agreement import cohen_kappa, combined, fleiss_kappa, kappa, kappa_interval, wilson


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
    assert all(map(math.isnan, kappa_interval(np.ones((5, 2), int))))


def test_the_interval_of_kappa_holds_it_and_shrinks_with_the_items():
    few = np.array([[1, 1], [1, 1], [0, 0], [0, 1], [1, 0], [0, 0], [0, 0], [1, 1]])
    low, high = kappa_interval(few)
    assert low < kappa(few) < high
    assert np.ptp(kappa_interval(np.tile(few, (16, 1)))) < (high - low) / 3


def test_intervals_of_shares_and_differences_are_those_of_newcombes_papers():
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    difference, interval = combined((1.0, 56 / 70, 70), (-1.0, 48 / 80, 80))
    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert combined((1.0, 0.3, 40))[1] == pytest.approx(wilson(0.3, 40))
