"""The guard: its interval, its verdict, how many questions a gain needs, and what the chain says and does with them."""

import json
import math
import re
import sys
from math import comb
from pathlib import Path

import evaluate
import guard as script
import PI
import pytest
import synthetic_runs as fake
from answered_by_rule import annotate, answers_by, flags
from conftest import bash

from mpa.analysis import guard, run_summary
from mpa.analysis.guard import Comparison, Guard
from mpa.answers.intervals import Z, paired_difference
from mpa.files import records
from mpa.files.records import InputError
from mpa.runs.case import Case
from mpa.runs.evaluations import Evaluation
from mpa.runs.layout import Cell, RunFiles

CELL = Cell("okVQA", "big", "small")


@pytest.mark.parametrize(("better", "worse", "n"), [(12, 2, 50), (3, 10, 143), (0, 0, 12), (0, 4, 100), (9, 0, 9)])
def test_the_interval_ends_where_the_score_test_rejects(better, worse, n):
    """The definition (Tango 1998), with the most likely shares of changes found by search instead of by formula."""
    low, high = paired_difference(better, worse, n)
    assert -1 <= low <= (better - worse) / n <= high <= 1

    def likelihood(q: float, d: float) -> float:
        shares = (q + d, q, 1 - 2 * q - d)
        counts = (better, worse, n - better - worse)
        return sum(k * math.log(p) if p > 0 else -math.inf for k, p in zip(counts, shares, strict=True) if k)

    for d in (low, high):
        if abs(d) < 1:
            start, end = max(0.0, -d), (1 - d) / 2
            likely = max((start + (end - start) * i / 20000 for i in range(20001)), key=lambda q: likelihood(q, d))
            statistic = (better - worse - n * d) / math.sqrt(n * (2 * likely + d * (1 - d)))
            assert abs(statistic) == pytest.approx(Z, abs=2e-3)
    assert paired_difference(worse, better, n) == pytest.approx((-high, -low))
    reject = better != worse and (better - worse) ** 2 > Z**2 * (better + worse)
    assert (low > 0 or high < 0) == reject  # McNemar's test


def test_a_model_that_is_no_worse_is_called_worse_in_some_two_percent_at_most():
    """Exact: the number of changes is binomial, and half of them break an answer."""
    for n, changed in ((12, 0.2), (12, 0.4), (40, 0.1), (40, 0.4)):
        wrongly = 0.0
        for k in range(1, n + 1):
            first = next((b for b in range(k // 2, k + 1) if Comparison(n, 0, k - b, b).verdict == "worse"), k + 1)
            tail = sum(comb(k, broken) for broken in range(first, k + 1)) / 2**k
            wrongly += comb(n, k) * changed**k * (1 - changed) ** (n - k) * tail
        assert wrongly < 0.027, (n, changed)


def test_the_number_of_questions_is_that_of_the_published_formula():
    found = Comparison(100, 60, 20, 10)
    assert found.gain == 0.1 and found.verdict == "not told apart"
    changed = 0.3
    assert found.needed(0.1) == math.ceil((1.96 * changed**0.5 + 0.8416 * (changed - 0.01) ** 0.5) ** 2 / 0.01) == 234
    assert found.needed(0.01) > found.needed(0.05) > found.needed(0.1)
    told = guard.conclusion(found, 0.15)
    assert "100 held-out questions, of which 30 changed" in told[0]
    assert (
        "234 for a gain of 10.0 points, as measured; 940 for a gain of 5.0 points. To get 234," in told[1]
        and "PI's --hold-out 0.36" in told[1]
    )
    assert "PI's --hold-out 0.32" in guard.how_to_get(100, 210, 0.15)
    assert Comparison(12, 9, 0, 0).needed(0.05) > 700  # nothing changed: the upper bound of the share stands for it


def held_out(folder: Path, right: dict[str, list[int]], cell: Cell = CELL, **meta) -> None:
    """The held-out set's meta file, and the answers of {model: whether it is right, question by question}."""
    file = folder / f"PI_{cell.lvlm}_heldout_{cell.dataset}.meta.json"
    fake.write(file, {"settings": {"share": 0.15, "threshold": "1"}})
    fake.write(folder / f"PI_{cell.lvlm}_train_{cell.lvlm}_{cell.svlm}_{cell.dataset}.json", [])
    for model, answers in right.items():
        made = fake.evaluation(folder, model, "images", answers)
        out = RunFiles(folder, cell).guard_answers(model)
        made.replace(out)
        content = json.loads(records.meta_path(made).read_text())
        records.meta_path(made).unlink()
        fake.write(records.meta_path(out), content | meta)


HALF = [0, 1] * 50
MODEL = "PL_big_small_okVQA"


def test_the_script_recommends_the_original_where_no_levelled_model_is_better(tmp_path, capsys):
    held_out(tmp_path, {"small": HALF, MODEL: [0, 1] * 40 + [0] * 20, f"{MODEL}_anchors": [*HALF[:98], 1, 1]})
    script.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{MODEL}: 50.0 → 40.0 %, -10.0 points" in said and "n = 100; 0 fixed, 10 broken): worse" in said
    assert (
        f"{MODEL}: The levelled S-VLM is worse" in said
        and "REMEDY=1" not in said
        and f"{MODEL}_anchors: Nothing can be concluded" in said
    )
    assert "Use the original S-VLM, small" in said
    found = json.loads((tmp_path / "guard_big_small_okVQA.json").read_text())
    assert found["recommended"] is None and found["models"]["mpa"]["verdict"] == "worse"
    script.main([str(tmp_path), "--variant", "mpa"])
    assert "To try remedies: REMEDY=1 bash scripts/guard.sh" in capsys.readouterr().out
    script.main([str(tmp_path), "--variant", "anchors", "mpa", "--verdict"])
    assert capsys.readouterr().out == "not told apart\nworse\n"


def test_the_script_recommends_the_model_that_is_better(tmp_path, capsys):
    held_out(tmp_path, {"small": HALF, MODEL: [0, 1] * 40 + [0] * 20, f"{MODEL}_anchors-slow": [0, 1] * 40 + [1] * 20})
    script.main([str(tmp_path)])
    assert f"Use {tmp_path / MODEL}_anchors-slow." in capsys.readouterr().out
    assert Guard(tmp_path, CELL).variants == {"mpa": MODEL, "anchors-slow": f"{MODEL}_anchors-slow"}


def test_what_cannot_be_told_is_an_error(tmp_path):
    held_out(tmp_path, {"small": HALF})
    with pytest.raises(InputError, match=r"no levelled S-VLM was asked held-out questions. Run scripts/guard.sh"):
        script.main([str(tmp_path)])
    with pytest.raises(InputError, match=r"Heldout_big_PL_big_small_okVQA_okVQA.json: no such file"):
        script.main([str(tmp_path), "--variant", "mpa"])
    held_out(tmp_path, {"small": HALF, MODEL: HALF}, unfinished=3)
    with pytest.raises(InputError, match="3 replies failed with a temporary error, so nothing can be told yet"):
        script.main([str(tmp_path)])
    with pytest.raises(InputError, match="they share no question"):
        guard.compare(*(Evaluation.of(Path(name), [], guard.SCORED_AS, "paper") for name in ("a", "b")))


def test_a_labelled_datasets_held_out_answers_do_not_touch_its_evaluation(serve, copied_images, tmp_path):
    """A run of `images`, with its files under the name of a labelled dataset."""
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    renamed = run / "PA_big_okVQA.json"
    (run / "PA_big_images.json").rename(renamed)
    (run / "PA_big_images.meta.json").rename(records.meta_path(renamed))

    def as_okvqa(*more, svlm=None) -> list[str]:
        return [{"images": "okVQA"}.get(word, word) for word in flags(server, copied_images, run, *more, svlm=svlm)]

    train = PI.main(as_okvqa("--hold-out", "0.3", svlm="small"))
    evaluate.main(as_okvqa("--held-out", "--model-path", "small", MODEL))
    questions = json.loads((run / "PI_big_heldout_okVQA.json").read_text())
    for model in ("small", MODEL):
        found = records.read_records(RunFiles(run, CELL).guard_answers(model), "Eval")
        assert [r["question_id"] for r in found] == [r["question_id"] for r in questions]
        assert set(found[0]["scores"]) >= {"exact"} and "vqa" not in found[0]["scores"]
    assert not list(run.glob("Eval_*"))
    assert not {r["id"] for r in records.read_records(train, "train")} & {r["question_id"] for r in questions}
    one = Guard(run, CELL).compare("mpa")
    assert one.n == len(questions) and Guard(run, CELL).share == 0.3
    with pytest.raises(SystemExit):
        evaluate.main(as_okvqa("--held-out", "--log-samples"))


def test_the_summary_of_unlabelled_images_says_when_nothing_can_be_concluded(tmp_path):
    cell = Cell("images", "big", "small")
    same = [1] * 9 + [0] * 3
    fake.run(tmp_path, "images", "big", "small", same, same)
    fake.evaluation(tmp_path, "big", "images", [1] * 12)
    fake.write(tmp_path / "PL_big_small_images/train_meta.json", {"settings": {}, "samples": 80, "seconds": 1.0})
    fake.write(tmp_path / "PI_big_heldout_images.meta.json", {"settings": {"share": 0.15, "threshold": "1"}})
    result = run_summary.summary(Case(tmp_path, cell))
    assert list(result["rows"]) == ["base", "mpa"]
    low, high = result["gain"]["ci95"]
    assert low == pytest.approx(-high) and low < -0.2 and result["guard"]["verdict"] == "not told apart"
    text = "\n".join([*run_summary.table(result, "agreement"), *run_summary.cautions(result)])
    assert "MPA gains +0.0 points (95 % interval -24.2 to +24.2" in text
    assert "Nothing can be concluded: 12 held-out questions" in text and "times as many images" in text


@pytest.mark.parametrize(
    ("preset", "verdicts", "tried"),
    [
        ("paper", {"mpa": "not told apart"}, []),
        ("paper", {"mpa": "worse", "anchors": "better"}, ["anchors"]),
        ("paper", {"mpa": "worse"}, ["anchors", "anchors-slow", "anchors-slow-short"]),
        ("anchored", {"mpa": "worse"}, ["slow", "slow-short"]),
    ],
)
def test_remedies_are_tried_in_order_until_one_is_better(tmp_path, preset, verdicts, tried):
    """scripts/guard.sh, with a python that notes its calls and gives these verdicts."""
    fake_python = tmp_path / "bin/python"
    fake_python.parent.mkdir()
    cases = "".join(f'*" --variant {name} --verdict") echo "{verdict}" ;;\n' for name, verdict in verdicts.items())
    fake_python.write_text(
        f'#!/bin/bash\n[[ $* == *" mpa."* ]] && exec {sys.executable} "$@"\n'
        f'case "$*" in\n{cases}*--verdict) echo worse ;;\n*) echo "$(basename "$1") $*" >>{tmp_path}/calls ;;\nesac\n'
    )
    fake_python.chmod(0o755)
    settings = {"VENV": tmp_path, "RUN": f"{tmp_path}/run", "DATASET": "okVQA", "LVLM": "hub/big", "SVLM": "hub/small"}
    rates = {"learning_rate": 3e-5, "merger_lr": 3e-5, "vision_lr": 2e-6, "num_train_epochs": 1.0}
    fake.write(tmp_path / "run/PL_big_small_okVQA/train_meta.json", {"settings": rates})
    done = bash("scripts/guard.sh", "--engine", "vllm_", **settings, REMEDY=1, PI_FLAGS="--match anls", PRESET=preset)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    of_remedy = ["launch.py", "evaluate.py"]
    stages = ["evaluate.py", *(["PI.py"] if tried and preset == "paper" else []), *of_remedy * len(tried), "guard.py"]
    assert [line.split()[0] for line in calls] == stages
    assert "--held-out --model-path-lvlm hub/big --model-path hub/small" in calls[0] and "--engine vllm_" in calls[0]
    trained = [line for line in calls if line.startswith("launch.py")]
    assert [re.search(r"--output_dir \S+_okVQA_(\S+)", line)[1] for line in trained] == tried
    if tried and preset == "paper":
        assert "--match anls --anchors 100" in calls[1] and "_okVQA_anchors-100.json" in trained[0]
        assert "--learning_rate 3e-05" in trained[0]
    if "slow-short" in " ".join(tried):
        rates = [float(re.search(r"--learning_rate (\S+)", line)[1]) for line in trained]
        assert rates == pytest.approx([3e-5, 1e-5, 1e-5][-len(tried) :]) and "--num_train_epochs 0.5" in trained[-1]
