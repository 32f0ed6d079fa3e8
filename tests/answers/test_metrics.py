import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DATA, python
from PIL import Image

from mpa.answers.metrics import METRICS, bootstrap_interval, few_answers, most_common, squeeze
from mpa.data.loading import load_samples
from mpa.runs import scoring


@pytest.mark.parametrize("name", ["vqa", "textvqa", "relaxed", "anls", "contains"])
def test_every_golden_case_scores_as_the_official_code_scores_it(name):
    cases = json.loads((DATA / "metrics" / f"{name}.json").read_text())
    assert len(cases) >= 200
    wrong = [c for c in cases if abs(METRICS[name](c["prediction"], c["answers"]) - c["score"]) > 1e-6]
    assert wrong == []


def test_vqa_and_textvqa_differ_only_where_the_people_agree():
    assert METRICS["vqa"]("the soup", ["soup"] * 10) == 0.0
    assert METRICS["textvqa"]("the soup", ["soup"] * 10) == 1.0
    assert METRICS["vqa"]("the soup", ["soup"] * 9 + ["stew"]) == 1.0


@pytest.mark.parametrize(
    ("said", "meant"),
    [("dont", "don't"), ("couldnt've", "couldn't've"), ("y'allll", "y'all'll"), ("ow's'at", "'ow's'at")],
)
def test_a_word_with_an_apostrophe_missing_is_the_word(said, meant):
    assert METRICS["vqa"](said, [meant] * 9 + ["no"]) == 1.0


def test_exact_takes_any_of_the_answers_and_never_an_empty_one():
    assert METRICS["exact"]("Pony tail!", ["braid", "ponytail"]) == 1.0
    assert METRICS["exact"]("", [""]) == 0.0
    assert METRICS["exact"]("?!", ["..."]) == 0.0


def test_contains_is_the_released_rule_to_the_letter():
    assert METRICS["contains"]("2013", ["1"]) == 1.0
    assert METRICS["contains"]("anything", [""]) == 1.0
    assert squeeze("1.5") == squeeze("15")


def test_most_common_takes_the_first_on_a_tie():
    assert most_common(["b", "a", "a", "b"]) == "b"


def test_stvqa_accuracy_takes_any_of_the_answers_after_the_evalai_processor():
    assert METRICS["accuracy"]("The Dog's", ["cat", "dog 's"]) == 1.0
    assert METRICS["accuracy"]("dogs", ["cat", "dog"]) == 0.0


def test_the_interval_is_that_of_drawing_the_scores_themselves():
    scores = np.random.default_rng(1).choice([0.0, 0.3, 0.6, 1.0], 400)
    draws = np.random.default_rng(2)
    means = [scores[draws.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert bootstrap_interval(scores) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.004)


def test_the_interval_holds_the_mean_and_narrows_with_n():
    rng = np.random.default_rng(0)
    few, many = rng.random(100) < 0.7, rng.random(10_000) < 0.7
    (low, high), (low_many, high_many) = bootstrap_interval(few), bootstrap_interval(many)
    assert low < few.mean() < high
    # The textbook interval of a share, 1.96 standard errors to each side
    assert high_many - low_many == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 10_000) ** 0.5, rel=0.1)
    assert bootstrap_interval(few) == (low, high)


def test_anls_follows_the_formula_where_the_copied_evaluator_departs_from_it():
    assert METRICS["anls"]("ab", ["ax"]) == 0.0  # a distance of exactly 0.5; lmms-eval: 0.5
    assert METRICS["anls"]("abc", ["abx"]) == pytest.approx(2 / 3)
    assert METRICS["anls"]("a  b", ["a b"]) == 0.75  # lmms-eval folds the spaces: 1


@pytest.mark.parametrize(
    ("prediction", "answer", "passes"),
    [
        ("$5", "5", True),
        ("$5", "€5", False),
        ("-$5", "5", False),
        ("１０４", "100", True),
        ("٥", "5", True),
        ("**12**", "12", True),
        ("$1,000", "1000", True),
        ("10:30", "1030", False),
        ("3/4", "34", False),
        ("C++", "C", False),
        ("दिन", "दान", False),
        ("T-shirt", "t shirt", True),
    ],
)
def test_tolerant_reads_as_a_person_does(prediction, answer, passes):
    assert METRICS["tolerant"](prediction, [answer]) == passes


def test_parts_by_type_and_raw_answers_have_a_row_each():
    parts = [("race", "a"), ("racing", "b"), ("racing", "b")]
    found = [{"predictions": said, "type": kind, "answers": ["race"] * 10} for said, kind in parts]
    rows = scoring.score([r | {"raw_answers": ["racing"] * 10} for r in found], "okVQA")
    assert {name: (round(row["score"], 3), row["n"]) for name, row in rows.items() if name.startswith("vqa")} == {
        "vqa": (0.333, 3),
        "vqa, a": (1, 1),
        "vqa, b": (0, 2),
        "vqa, raw answers": (0.667, 3),
    }
    assert "vqa, raw answers" not in scoring.score(found, "okVQA")


def test_a_comparison_lists_the_questions_that_changed():
    def record(key, reply):
        return {
            "question_id": key,
            "GT_question": f"q{key}?",
            "GT_answer": "red",
            "answers": ["red"],
            "predictions": reply,
        }

    before = [record(i, "red" if i == 7 else "blue") for i in range(8)]
    after = [record(i, "blue" if i == 7 else "red") for i in range(8)]
    args = SimpleNamespace(dataset="easyVQA", preset="paper", verbose=False)
    pairs = list(zip(before, after, strict=True))
    few = scoring.changed(pairs, args)
    assert few[0] == "    better: 0: q0? (red) blue → red" and few[5] == "    2 more are better; -v lists all."
    assert few[6:] == ["    worse: 7: q7? (red) red → blue"]
    args.verbose = True
    assert len(scoring.changed(pairs, args)) == 8


@pytest.mark.parametrize("name", ["vqa", "textvqa"])
def test_with_few_answers_a_right_answer_scores_as_the_official_code_leaves_one_out(name):
    assert [METRICS[name]("red", ["red"] * n) for n in (1, 2, 3, 4, 10)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize(("dataset", "says"), [("textVQA", True), ("okVQA", True), ("chartVQA", False)])
def test_questions_with_too_few_answers_for_full_marks_are_said_with_their_number(dataset, says, tmp_path):
    counts = [1, 1, 2, 3, 4, 10]
    result = [
        {"question_id": i, "image_path": "a", "GT_question": "q", "GT_answer": "red", "predictions": "red"}
        | {"answers": ["red"] * n}
        for i, n in enumerate(counts)
    ]
    (tmp_path / f"Eval_a_{dataset}.json").write_text(json.dumps(result))
    done = python("evaluate.py", "--predictions", tmp_path / f"Eval_a_{dataset}.json")
    note = (
        "4 of 6 questions have fewer than 4 answers: vqa and textvqa give a right answer at most 0 % (2 with 1), "
        "33 % (1 with 2), 67 % (1 with 3)"
    )
    assert done.returncode == 0 and (note in done.stdout) == says, done.stderr
    assert few_answers([["red"] * 4, ["red"] * 10]) == ""


def test_questions_with_too_few_answers_are_said_when_they_are_loaded(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    data = [{"question_id": i, "image_id": "a", "question": "q", "answers": ["red"] * n} for i, n in enumerate((1, 10))]
    (tmp_path / "test.json").write_text(json.dumps({"data": data}))
    load_samples("textVQA", "test", tmp_path / "test.json", tmp_path)
    assert f"note: {tmp_path}/test.json: 1 of 2 questions have fewer than 4 answers" in capsys.readouterr().err
    load_samples("textVQA", "train", tmp_path / "test.json", tmp_path)  # PA does not see them
    assert capsys.readouterr().err == ""
