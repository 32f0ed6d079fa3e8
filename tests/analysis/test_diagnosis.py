"""scripts/diagnose.py finds each signature, with its figure, and nothing in a healthy run."""

import json
import random
import shutil

import answered_runs
import pytest
import synthetic_runs as fake
from answered_runs import CELL, sample, word
from conftest import ROOT, python

from mpa.analysis.diagnosis import diagnose, disagreement, looked_at
from mpa.runs.case import Case, checked_against_labels
from mpa.runs.folders import RunFolder

OFFICIAL = ROOT.parent / "shared/reference/official"
HEALTHY = [*(sample(i) for i in range(120)), *(sample(i, svlm=word(i)) for i in range(120, 240))]
HEALTHY += [sample(i, lvlm="else", svlm=None) for i in range(240, 300)]


def found(folder, cell=CELL) -> dict:
    return {finding.name: finding for finding in diagnose(Case(folder, cell))}


def trained(folder, losses=(1.0, 0.8, 0.6, 0.4), steps=40, after=(0.6, 1.0), n=400) -> None:
    """Evaluations before (60 % right) and after, a model's folder and its log."""
    rng = random.Random(0)
    before, right = ([int(rng.random() < share) for _ in range(n)] for share in (0.6, after[0]))
    right = [int(b or rng.random() < after[1]) if after[1] < 1 else a for a, b in zip(right, before, strict=True)]
    fake.evaluation(folder, "hub/small", CELL.dataset, before)
    fake.trained(folder, CELL.dataset, "hub/big", "hub/small", right, 120)
    for path in folder.glob("Eval_*textVQA.json"):  # answers without digits
        records = json.loads(path.read_text())
        fake.write(path, [r | {"answers": [word(r["question_id"])] * 10} for r in records])
    model = folder / "PL_big_small_textVQA"
    meta = json.loads((model / "train_meta.json").read_text())
    fake.write(model / "train_meta.json", meta | {"steps": steps})
    fake.write(
        model / "trainer_state.json", {"log_history": [{"step": i, "loss": loss} for i, loss in enumerate(losses)]}
    )


def test_a_healthy_run_has_no_finding(tmp_path):
    answered_runs.write(tmp_path, HEALTHY)
    trained(tmp_path, after=(0.6, 0.5))
    assert found(tmp_path) == {}
    assert "300 images; L-VLM repeats 240 of 300; parity set 120; +" in looked_at(Case(tmp_path, CELL))
    done = python("diagnose.py", tmp_path)
    assert done.returncode == 0 and "Nothing unusual." in done.stdout


@pytest.mark.parametrize(
    ("name", "samples", "figure"),
    [
        ("small parity set", HEALTHY[:60], "60 samples from 60"),
        ("no gap", [*HEALTHY[:5], *HEALTHY[120:240]], "errs on 5 of 125 (4 %"),
        (
            "the L-VLM disagrees with itself",
            [*HEALTHY[:100], *HEALTHY[240:300] * 3],
            "it repeats 100 of 280 (36 %, 95 % interval 30 to 41) of its answers; most frequent differences: other words (180)",
        ),
        ("repeated questions", [s | {"question": "what is it?"} for s in HEALTHY[:120]], "stands 120 of 120"),
        (
            "one-sided yes/no questions",
            [*HEALTHY[:60], *(sample(i, annotation="yes", svlm="no") for i in range(60))],
            "60 of 120 (50 %, 95 % interval 41 to 59) of the parity set are yes/no questions; in 60 of them",
        ),
        ("annotations left out", [*HEALTHY, *(sample(i, left_out="refusal") for i in range(30))], "30 of 330 (9 %"),
        (
            "truncated answers",
            [*HEALTHY, *(sample(i, finish_reason="length", svlm=None) for i in range(60))],
            "60 of 360 (17 %",
        ),
        (
            "consistent but wrong",
            [s | {"truth_question": s["question"], "truth": "not this"} for s in HEALTHY[:120]],
            "120 of 120 (100 %",
        ),
        (
            "a missing type",
            [*HEALTHY, *(sample(i, annotation=str(i), svlm=str(i)) for i in range(60))],
            "no answers of the type 'number' in the parity set: 60 of 360 (17 %, 95 % interval 13 to 21) of the annotations",
        ),
    ],
)
def test_signatures_of_pa_and_pi(tmp_path, name, samples, figure):
    answered_runs.write(tmp_path, samples)
    assert figure in found(tmp_path)[name].figure


@pytest.mark.parametrize(
    ("name", "level", "training", "figure"),
    [
        ("few training steps", "warning", {"steps": 3}, "3 steps"),
        ("training loss", "problem", {"losses": [0.5, float("nan")]}, "not a number"),
        ("training loss", "problem", {"losses": [0.5, 0.6, 0.7, 0.8]}, "rose from 0.55 to 0.75"),
        ("a loss", "problem", {"after": (0.2, 1)}, "textVQA: -"),
        ("no clear gain", "warning", {"after": (0.6, 1)}, "n = 400"),
    ],
)
def test_signatures_of_pl_and_evaluate(tmp_path, name, level, training, figure):
    answered_runs.write(tmp_path, HEALTHY)
    trained(tmp_path, **training)
    finding = found(tmp_path)[name]
    assert figure in finding.figure and finding.level == level


def test_a_type_that_is_missing_everywhere_is_one_finding(tmp_path):
    colors = [sample(i, annotation="red", svlm="red", question=f"what color is thing {i}?") for i in range(60)]
    answered_runs.write(tmp_path, HEALTHY + colors)
    file = fake.evaluation(tmp_path, "small", CELL.dataset, [1] * 40)
    records = json.loads(file.read_text())
    fake.write(
        file, [r | {"GT_question": "what color is it?", "GT_answer": "red", "answers": ["red"]} for r in records]
    )
    (finding,) = (f for f in diagnose(Case(tmp_path, CELL)) if f.name == "a missing type")
    assert finding.figure.count("60 of 360") == finding.figure.count("40 of 40") == 2  # as an answer, and as a question


def test_forgetting_is_found_on_other_datasets(tmp_path):
    answered_runs.write(tmp_path, HEALTHY)
    trained(tmp_path, after=(0.6, 0.5))
    fake.evaluation(tmp_path, "hub/small", "okVQA", [1] * 50)
    fake.evaluation(tmp_path, "PL_big_small_textVQA", "okVQA", [0] * 50)
    assert found(tmp_path)["forgetting"].figure.startswith("okVQA: -100.0 points")


def test_evaluations_of_different_questions_are_found(tmp_path):
    answered_runs.write(tmp_path, HEALTHY)
    fake.evaluation(tmp_path, "hub/small", "textVQA", [1, 0, 1, 0])
    fake.trained(tmp_path, "textVQA", "hub/big", "hub/small", [1, 1, 1], 120, ids=[0, 1, 9])
    assert found(tmp_path)["different questions"].figure == "textVQA: only 2 questions are in both evaluations"


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"PA": {"temperature": 0.7}}, "--temperature"),
        ({"PI": {"anchors": "1 by answer"}}, "--anchors"),
        ({"PI": {"match": "anls"}}, "--match"),
    ],
)
def test_no_advice_is_what_the_run_has_done(tmp_path, settings, advice):
    samples = [sample(i, annotation="yes", svlm="no") | {"question": "is it?"} for i in range(30)]
    samples += [sample(i, lvlm="else", svlm=None) for i in range(30, 80)]
    train = answered_runs.write(tmp_path, samples)
    trained(tmp_path, after=(0.2, 0.2))
    assert advice in " ".join(f.remedy for f in found(tmp_path).values())
    meta = json.loads(train.with_suffix(".meta.json").read_text())
    fake.write(train.with_suffix(".meta.json"), meta | {"settings": meta["settings"] | settings.get("PI", {})})
    fake.write(tmp_path / "PA_big_textVQA.meta.json", {"settings": settings.get("PA", {})})
    assert advice not in " ".join(f.remedy for f in found(tmp_path).values())


@pytest.mark.parametrize(
    ("annotation", "answer", "kind"),
    [
        ("yes", "No.", "yes and no"),
        ("1,200", "1,300", "another number"),
        ("dog", "a dog", "one contains the other"),
        ("red bus", "red car", "some words in common"),
        ("cat", "dog", "other words"),
        ("cat", "", "no answer"),
        ("cat", None, "no answer"),
    ],
)
def test_kinds_of_disagreement(annotation, answer, kind):
    assert disagreement(annotation, answer) == kind


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the reference files are not there")
def test_released_annotations(tmp_path):
    shutil.copy(OFFICIAL / "PA_okvqa_full.json", tmp_path / "PA_Qwen2vl7b_okVQA.json")
    done = python("diagnose.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "'What is the person in the image doing' stands 150 of 9,009" in done.stdout


def test_labels_tell_which_kept_samples_are_wrong(easy_run):
    """The embedded teacher's annotations, against easy-VQA's labels of the same question and image."""
    case = Case(easy_run, RunFolder(easy_run).cells[0])
    checked = checked_against_labels(case, [s for s in case.samples if s.annotation])
    right = [right for s, right in checked if s.reason in ("parity", "both right")]
    assert len(checked) >= len(right) > 0 and all(right)


def test_a_folder_without_a_run_and_a_broken_file_are_named(tmp_path):
    done = python("diagnose.py", tmp_path)
    assert done.returncode == 1 and "Run PA.sh first" in done.stderr
    answered_runs.write(tmp_path, HEALTHY[:3])
    (tmp_path / "PA_big_textVQA.json").write_text("[{]")
    done = python("diagnose.py", tmp_path)
    assert done.returncode == 1 and "PA_big_textVQA.json" in done.stderr
