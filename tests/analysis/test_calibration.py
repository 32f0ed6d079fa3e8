"""The probabilities of answers beside how many are right."""

import math
from pathlib import Path

import checks
import numpy as np
import pytest

from mpa.analysis import calibration
from mpa.analysis.report import figures
from mpa.files.records import InputError
from mpa.runs.case import Case
from mpa.runs.layout import Cell

CELL = Cell("easyVQA", "teacher", "student")


def test_the_bins_and_the_error_are_those_of_a_count_by_hand():
    p = np.array([0.0, 0.05, 0.62, 0.68, 0.9, 0.96, 1.0])
    right = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    one = calibration.Reliability("m", "", p, right)
    assert [(b.n, round(b.probability, 4), round(b.right, 4)) for b in one.bins] == [
        (2, 0.025, 0.5),
        (2, 0.65, 0.5),
        (3, 0.9533, 0.6667),
    ]
    assert one.error == pytest.approx((2 * 0.475 + 2 * 0.15 + 3 * (0.95333 - 0.66667)) / 7, abs=1e-4)
    assert all(b.ci95[0] < b.right < b.ci95[1] for b in one.bins)


def test_answers_that_are_right_as_often_as_their_probability_says_have_no_error():
    rng = np.random.default_rng(0)
    p = rng.uniform(size=20_000)
    assert calibration.Reliability("m", "", p, (rng.uniform(size=20_000) < p).astype(float)).error < 0.015
    assert calibration.Reliability("m", "", p, np.ones(20_000)).error == pytest.approx(0.5, abs=0.01)


def test_what_a_run_tells(easy_run, capsys):
    case = Case(Path(easy_run), CELL)
    own, tested = calibration.of_case(case)
    assert (own.model, tested.model) == ("teacher", "student")
    answered = [s for s in case.samples if s.lvlm_answer is not None]
    assert own.right.sum() == sum(s.lvlm_answer == s.annotation for s in answered) and len(own.right) == len(answered)
    assert len(tested.right) == 48 and tested.probabilities.max() <= 1 and tested.probabilities.min() > math.exp(-20)
    svg = figures.calibration([own, tested])
    assert svg.startswith("<?xml") and figures.calibration([]) is None
    checks.main(["calibration", str(easy_run)])
    shown = capsys.readouterr().out
    assert "its answer is its annotation" in shown and shown.count("| student |") == 1


def test_answers_without_probabilities_are_not_shown(easy_run, tmp_path):
    for file in Path(easy_run).glob("*.json"):
        text = file.read_text().replace('"logprob": ', '"unknown": ')
        (tmp_path / file.name).write_text(text)
    assert calibration.of_case(Case(tmp_path, CELL)) == []
    with pytest.raises(InputError, match="nothing for calibration"):
        checks.main(["calibration", str(tmp_path)])
