"""One difference has one interval, everywhere; it knows images, seeds and how little few answers tell."""

import json
import runpy

import answered_runs
import evaluate
import numpy as np
import pytest
import synthetic_runs as fake
from conftest import ROOT, python

from mpa.analysis import guard, run_summary
from mpa.analysis.check_tables import points
from mpa.analysis.diagnosis import looked_at
from mpa.analysis.report.content import CellContent
from mpa.answers import paired
from mpa.answers.metrics import bootstrap_interval
from mpa.files import records
from mpa.runs.case import Case
from mpa.runs.comparable import compare
from mpa.runs.layout import Cell
from mpa.runs.trainings import Runs

CELL = Cell("textVQA", "big", "small")
measured = runpy.run_path(str(ROOT / "benchmarks/guard.py"))["measured"]


@pytest.mark.parametrize(
    ("before", "after"),
    [([1] * 9 + [0] * 3, [1] * 9 + [0] * 3), ([0] * 12, [1] * 12), ([1, 0] * 100, [1] * 150 + [0] * 50)],
)
def test_one_run_shows_one_interval_in_table_diagnosis_report_checks_and_comparison(tmp_path, capsys, before, after):
    fake.run(tmp_path, *CELL[:1], "hub/big", "hub/small", before, after)
    answered_runs.write(tmp_path, [answered_runs.sample(0)])
    files = [tmp_path / f"Eval_{model}_textVQA.json" for model in ("small", "PL_big_small_textVQA")]
    evaluate.main(["--compare", *map(str, files), "--out", str(tmp_path / "out.json")])
    of_comparison = json.loads((tmp_path / "out.json").read_text())["textvqa"]["ci95"]
    (training,) = Runs([tmp_path]).trainings
    estimate = points(compare(training.before, training.after))
    told = guard.compare(training.before, training.after).interval
    run = Case(tmp_path, CELL)
    for found in (
        CellContent(tmp_path, CELL).gain()["ci95"],
        run_summary.gain(run, run.evaluation("small"), run.evaluation(run.model))["gain"]["ci95"],
        told,
        (estimate.low / 100, estimate.high / 100),
    ):
        assert tuple(found) == pytest.approx(tuple(of_comparison))
    low, high = (100 * bound for bound in of_comparison)
    assert high - low > 1  # also where no answer changed, and where all did
    assert f"[{low:+.1f}, {high:+.1f}]" in looked_at(Case(tmp_path, CELL))
    assert f"| {low:+.1f} to {high:+.1f} |" in python("tables.py", tmp_path, "--table", "main").stdout


def test_many_changed_answers_keep_the_bootstraps_interval_and_few_have_the_score_interval():
    rng = np.random.default_rng(0)
    many = rng.choice([-1, 0, 1], 2000, p=[0.02, 0.79, 0.19])
    assert paired.interval((many, range(2000))) == bootstrap_interval(many)
    seeds = [rng.choice([-1, 0, 1], 2000, p=[0.02, 0.79, 0.19]) for _ in range(3)]
    ours = paired.interval(*((gains, range(2000)) for gains in seeds))
    assert ours == pytest.approx(bootstrap_interval(np.mean(seeds, axis=0)), abs=1e-9)
    low, high = paired.interval(([1.0] * 40, range(40)))
    assert high == 1 and 0.75 < low < 0.9  # the bootstrap has no width here
    assert all(np.isnan(paired.interval(([], []))))


@pytest.mark.parametrize("differing", [15, 29, 30, 60])
def test_soft_scores_and_the_change_of_the_method_give_no_jump(differing):
    """In intervals of scores between 0 and 1, around the number of changes from which the bootstrap is used."""
    gains = np.zeros(300)
    gains[:differing] = np.tile([0.3, -0.3, 0.6, 1.0, -1.0], 12)[:differing]
    low, high = paired.interval((gains, range(300)))
    standard_error = gains.std() / 300**0.5
    assert 0.95 < (high - low) / (2 * 1.96 * standard_error) < 1.6


def test_repeated_questions_and_several_about_one_image_add_no_certainty():
    once = [1] * 6 + [0] * 23
    three_times = ([gain for gain in once for _ in range(3)], [i // 3 for i in range(87)])
    assert paired.interval(three_times) == pytest.approx(paired.interval((once, range(29))))
    rng = np.random.default_rng(0)
    gains = rng.choice([-1, 0, 1], 500, p=[0.1, 0.6, 0.3])
    many = paired.interval((gains.repeat(4), np.arange(500).repeat(4).tolist()))
    assert many == pytest.approx(paired.interval((gains, range(500))), abs=1e-9)
    assert paired.summary(*three_times)["images"] == 29


def test_seeds_that_share_some_questions_are_resampled_over_the_union_of_questions():
    """Against the standard error of the weighted sum over the union, for seeds with equal gains on the questions they share."""
    gains = np.random.default_rng(0).choice([-1, 0, 1], 3000, p=[0.05, 0.7, 0.25])
    parts = [(gains[at : at + 2000], range(at, at + 2000)) for at in (0, 500, 1000)]
    weight = np.sum([np.bincount(list(asked), minlength=3000) for _, asked in parts], axis=0) / 6000
    mean = (weight * gains).sum()
    expected = 2 * 1.96 * ((weight * (gains - mean)) ** 2).sum() ** 0.5
    assert np.ptp(paired.interval(*parts)) == pytest.approx(expected, rel=0.06)
    apart = [(values, [(seed, place) for place in asked]) for seed, (values, asked) in enumerate(parts)]
    assert np.ptp(paired.interval(*apart)) < 0.8 * expected


def test_the_table_draws_an_image_with_its_questions_of_all_seeds(tmp_path):
    rng, gains = np.random.default_rng(1), []
    after = rng.choice([0, 1], 300, p=[0.4, 0.6]).tolist()
    for seed, first in enumerate((0, 50, 100)):
        ids = list(range(first, first + 200))
        fake.parity(tmp_path / str(seed), "textVQA", "L", "S", 10, 100)
        fake.evaluation(tmp_path / str(seed), "S", "textVQA", [0] * 200, seed, ids=ids)
        fake.trained(tmp_path / str(seed), "textVQA", "L", "S", after[first : first + 200], 10, seed, ids=ids)
        gains.append((after[first : first + 200], ids))
    (experiment,) = Runs([tmp_path]).groups
    found = [compare(t.before, t.after) for t in experiment.seeds]
    low, high = paired.interval(*gains)
    estimate = points(*found)
    assert (estimate.low, estimate.high) == pytest.approx((100 * low, 100 * high))


def test_the_best_of_several_models_must_be_surer_than_one():
    counts = (100, 50, 14, 4)  # +10 points
    alone, one_of_four = (guard.Comparison(*counts, candidates=candidates) for candidates in (1, 4))
    assert alone.interval == one_of_four.interval and alone.interval[0] > 0
    assert alone.verdict == "better" and one_of_four.verdict == "not told apart"
    assert guard.recommended({"a": one_of_four}) is None
    assert "better is said at 98.75 %" in guard.conclusion(one_of_four, 0.15)[0]
    assert guard.Comparison(100, 50, 4, 14, candidates=4).verdict == "worse"


def test_few_guards_recommend_one_of_four_models_that_are_no_better():
    """benchmarks/guard.py: 2.5 % and three standard errors."""
    for setting in ((100, 0.1, 1), (400, 0.2, 4)):
        of = measured(150, *setting)
        assert of["four"] <= 6.4 and of["one"] <= 6.4 and of["called worse"] <= 6.4
        assert of["four, uncorrected"] > of["four"]
    assert of["as independent"] > 8


def test_a_run_of_the_preset_anchored_is_not_called_mpa(tmp_path):
    fake.run(tmp_path, "textVQA", "big", "small", [0] * 40, [1, 0] * 20)
    meta = records.meta_path(tmp_path / "PI_big_train_big_small_textVQA.json")
    content = json.loads(meta.read_text())
    content["settings"]["anchors"] = "100 by answer"
    fake.write(meta, content)
    done = python("tables.py", tmp_path)
    assert "| anchored |" in done.stdout and "Not the paper's method" in done.stdout
    assert "+50.0" not in done.stdout.split("Headline claims")[1].split("mean gain")[0]
    run = Case(tmp_path, CELL)
    result = {"rows": {}, "method": run.method} | run_summary.gain(
        run, run.evaluation("small"), run.evaluation(run.model)
    )
    assert "anchored gains +50.0 points" in run_summary.table(result, "accuracy")[-1]
    assert "anchored" in python("checks.py", "sweep", tmp_path).stdout


@pytest.mark.parametrize("others", [100, 200, 1000])
def test_one_image_with_many_questions_is_no_proof(others):
    """All its questions are answered better; no other image changed."""
    many = 10
    low, high = paired.interval(([1.0] * many + [0.0] * others, [0] * many + list(range(1, others + 1))))
    assert low < 0 < many / (many + others) < high
