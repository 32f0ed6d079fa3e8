"""scripts/checks.py and scripts/corrupt.py: the checks of the paper's analysis, from result files."""

import csv
import json
from pathlib import Path

import answered_runs
import pytest
import synthetic_runs as fake
from answered_runs import sample, word
from conftest import python
from corrupt import corrupted

from mpa.analysis import guard
from mpa.analysis.guard_accuracy import told_by_train_labels
from mpa.answers.matching import Match
from mpa.data.loading import train_labels
from mpa.files import records
from mpa.files.records import InputError
from mpa.runs.evaluations import Evaluation
from mpa.runs.layout import Cell, RunFiles

SAMPLES = [*(sample(i) for i in range(20)), *(sample(i, svlm=word(i)) for i in range(20, 30))]
SAMPLES += [sample(i, lvlm="else", svlm="x") for i in range(30, 40)]
NUMBERS = [sample(i, annotation=str(i % 7), svlm="x") for i in range(40, 80)]


def table(check: str, *folders, flags=()) -> list[dict]:
    """The rows of a check's last table, as its CSV has them."""
    done = python("checks.py", check, *folders, "--format", "csv", *flags)
    assert done.returncode == 0, done.stderr
    text = done.stdout.split("# ")[1:]
    lines = [line for part in text for line in part.splitlines()[1:]]
    first = max(i for i, line in enumerate(lines) if line.endswith("notes"))
    return list(csv.DictReader(lines[first:]))


def answers_are_numbers(folder) -> None:
    """Give the evaluations' questions numbers as answers; their scores stay."""
    for path in folder.glob("Eval_*VQA.json"):
        records = json.loads(path.read_text())
        fake.write(path, [r | {"answers": [str(r["question_id"])] * 10} for r in records])


def test_inspection_shows_kept_and_rejected_samples_by_reason(tmp_path):
    answered_runs.write(tmp_path, SAMPLES)
    rows = table("inspect", tmp_path, flags=("-n", "8"))
    verdicts = [row["verdict"] for row in rows]
    assert verdicts[:8] == ["parity"] * 8 and set(verdicts[8:]) == {"L-VLM disagrees", "both right"}
    assert verdicts[8:] == sorted(verdicts[8:])
    assert rows == table("inspect", tmp_path, flags=("-n", "8"))
    assert rows != table("inspect", tmp_path, flags=("-n", "8", "--seed", "1"))
    done = python("checks.py", "inspect", tmp_path)
    assert "| parity | 20 | 50.0 (35.2 to 64.8) |" in done.stdout


def test_coverage_compares_the_parity_set_with_annotations_labels_and_the_test(tmp_path):
    labelled = [s | {"truth_question": "is it?", "truth": "yes"} for s in [*SAMPLES, *NUMBERS]]
    answered_runs.write(tmp_path, labelled)
    fake.evaluation(tmp_path, "hub/small", "textVQA", [1, 0, 0, 0])
    fake.trained(tmp_path, "textVQA", "hub/big", "hub/small", [1, 1, 1, 0], 60)
    answers_are_numbers(tmp_path)
    done = python("checks.py", "coverage", tmp_path)
    assert done.returncode == 0
    number = next(line for line in done.stdout.splitlines() if line.startswith("| number"))
    assert "| 50.0 (39.3 to 60.7) | 66.7 (54.1 to 77.3) | 0.0 (0.0 to 4.6) | 4 | 25.0" in number and "+50.0" in number
    yes = next(line for line in done.stdout.splitlines() if line.startswith("| yes/no"))
    assert "100.0 (95.4 to 100.0) | 0 | – | – | – |" in yes


def test_the_overlap_of_two_lvlms_and_what_each_gives(tmp_path):
    other = Cell("textVQA", "large", "small")
    answered_runs.write(tmp_path, SAMPLES)
    same = [s | {"question": "another?"} if i < 5 else s for i, s in enumerate(SAMPLES[:10])]
    answered_runs.write(tmp_path, [*same, *(sample(i, image=f"/x/{i}.png") for i in range(4))], other)
    fake.evaluation(tmp_path, "hub/small", "textVQA", [0, 0, 0, 0])
    for lvlm, right in (("big", [1, 0, 0, 0]), ("large", [1, 1, 0, 0])):
        fake.trained(tmp_path, "textVQA", f"hub/{lvlm}", "hub/small", right, 10)
    (row,) = table("overlap", tmp_path)
    assert (row["L-VLMs"], row["parity sets"]) == ("big and large", "20 and 14")
    assert [float(row[name]) for name in ("images in both", "same question", "same answer")] == [71.4286, 5, 5]
    assert row["gains"].startswith("+25.0") and float(row["second minus first"]) == 25


@pytest.mark.parametrize(("where", "consistent"), [("both", 12), ("annotation", 0)])
def test_a_corrupted_lvlm_is_selected_from_again(tmp_path, where, consistent):
    train = answered_runs.write(tmp_path, [*SAMPLES, *NUMBERS])
    out = tmp_path / f"{train.stem}_corrupt-number-30-{where}.json"
    files = [tmp_path / f"PI_big_{model}_textVQA.json" for model in ("big", "small")]
    flags = ["--train-json", train, "--lvlm-json", files[0], "--svlm-json", files[1], "--dataset", "textVQA"]
    done = python("corrupt.py", *flags, "--type", "number", "--share", "0.3", "--where", where, "--out", out)
    assert done.returncode == 0, done.stderr
    survived = json.loads(out.with_suffix(".meta.json").read_text())["survived"]
    assert survived["corrupted"] == {"n": 12, "consistent": consistent, "parity": consistent}
    assert survived["others"] == {"n": 68, "consistent": 58, "parity": 48}
    was, now = ({r["id"]: r["conversations"][1]["value"] for r in json.loads(f.read_text())} for f in (train, out))
    wrong = {key for key in now if now[key] != was[key]}
    assert len(wrong) == consistent and all(was[key].isdigit() and now[key].isdigit() for key in wrong)
    pair = {(was[key], now[key]) for key in wrong}
    assert len({a for a, _ in pair}) == len(pair)  # one wrong answer for each right one

    fake.evaluation(tmp_path, "hub/small", "textVQA", [0, 0, 0, 0])
    fake.trained(tmp_path, "textVQA", "hub/big", "hub/small", [1, 1, 1, 0], 60)
    pl = {"data_path": [str(out)]}
    fake.trained(tmp_path, "textVQA", "hub/big", "hub/small", [1, 0, 0, 0], 60, variant="wrong", pl=pl)
    answers_are_numbers(tmp_path)
    (row,) = table("degraded", tmp_path)
    assert row["corrupted"] == f"30 % of number, {where}" and float(row["kept, %"]) == 100 * consistent / 12
    assert float(row["minus MPA's"]) == -50 and float(row["minus MPA's, of this type"]) == -50


def test_corruption_needs_all_answers_and_two_answers_of_the_type(tmp_path):
    train = answered_runs.write(tmp_path, [sample(0), sample(1, lvlm="else", svlm=None)])
    files = [tmp_path / f"PI_big_{model}_textVQA.json" for model in ("big", "small")]
    flags = ["--train-json", train, "--lvlm-json", files[0], "--svlm-json", files[1], "--dataset", "textVQA"]
    done = python("corrupt.py", *flags, "--type", "number", "--share", "0.3", "--out", tmp_path / "out.json")
    assert done.returncode == 1 and "answers 1 of 2 questions. Run PI.sh with --answer-all first" in done.stderr
    answers = [{"question_id": 1, "PA_answer": "7", "predictions": "7"}]
    with pytest.raises(InputError, match="No two annotations with different answers of the type 'number'"):
        corrupted(answers, Match(), "number", 0.5, "both", "text", 0)


def test_transfer_and_sweep(tmp_path):
    for dataset, before in (("textVQA", [1, 0, 0, 0]), ("okVQA", [1, 1, 0, 0])):
        fake.parity(tmp_path, dataset, "hub/big", "hub/small", 10, 100)
        fake.evaluation(tmp_path, "hub/small", dataset, before)
    fake.trained(tmp_path, "textVQA", "hub/big", "hub/small", [1, 1, 1, 0], 10)
    fake.trained(tmp_path, "textVQA", "hub/big", "hub/small", [1, 1, 0, 0], 20, variant="epochs-2")
    fake.evaluation(tmp_path, "PL_big_small_textVQA", "okVQA", [0, 1, 0, 0])
    fake.trained(tmp_path, "okVQA", "hub/big", "hub/small", [1, 1, 1, 1], 10)
    rows = table("transfer", tmp_path)
    matrix = {(row["trained on"], row["variant"]): (row["textVQA"], row["okVQA"]) for row in rows}
    assert matrix == {
        ("textVQA", "mpa"): ("50", "-25"),
        ("textVQA", "epochs-2"): ("25", ""),
        ("okVQA", "mpa"): ("", "50"),
    }
    swept = {(row["dataset"], row["variant"]): row for row in table("sweep", tmp_path)}
    assert float(swept["textVQA", "epochs-2"]["minus MPA's"]) == -25 and swept["textVQA", "mpa"]["minus MPA's"] == ""
    assert float(swept["textVQA", "epochs-2"]["gain"]) == 25 and swept["textVQA", "epochs-2"]["samples"] == "20"


def test_the_guards_verdicts_stand_beside_those_of_the_labels(tmp_path):
    before = [1, 0] * 50
    told = {"worse": [1, 0] * 35 + [0] * 30, "better": [1, 0] * 35 + [1] * 30, "same": before}
    for seed, (of_guard, of_test) in enumerate(
        [("worse", "worse"), ("better", "better"), ("same", "same"), ("same", "worse")]
    ):
        folder = tmp_path / f"paper-{seed}"
        fake.parity(folder, "okVQA", "hub/big", "hub/small", 10, 100)
        for model, answers in (("hub/small", before), ("PL_big_small_okVQA", told[of_guard])):
            made = fake.evaluation(
                folder, model, "images", answers
            )  # the score of held-out questions is that of `images`
            out = RunFiles(folder, Cell("okVQA", "big")).guard_answers(Path(model).name)
            made.replace(out)
            records.meta_path(made).replace(records.meta_path(out))
        fake.evaluation(folder, "hub/small", "okVQA", before, seed)
        fake.trained(folder, "okVQA", "hub/big", "hub/small", told[of_test], 10, seed)
    (row,) = table("guard", tmp_path)
    assert row["guard"] == "1 / 2 / 1" and row["test"] == "1 / 1 / 2" and row["seeds"] == "4"
    said = python("checks.py", "guard", tmp_path).stdout
    assert "Verdicts as the test's: on worse or not 3 of 4, 75.0 %" in said and "; of three 3 of 4, 75.0 %" in said
    assert "train split" not in said  # the questions are not its
    assert "Worse by the test: 2; the guard called 1 of them worse, 1 not told apart, 0 better." in said
    assert "Called worse by the guard: 1; better by the test: 0." in said and "Correlation of both changes: 0.8" in said
    meta = json.loads(records.meta_path(out).read_text())
    fake.write(
        records.meta_path(out), meta | {"unfinished": 3}
    )  # answers that nothing can be told of cost only themselves
    (row,) = table("guard", tmp_path)
    assert row["seeds"] == "3" and "3 replies failed with a temporary error" in row["notes"]


def test_the_guards_questions_can_be_judged_by_the_train_splits_answers():
    asked = [
        {"question_id": f"given-{i}", "GT_question": s.question, "image_path": f"/elsewhere/{Path(s.image_path).name}"}
        for i, s in enumerate(train_labels("easyVQA")[:40])
    ]
    before = [r | {"answers": ["the L-VLM's"], "predictions": "wrong"} for r in asked]
    after = [r | {"predictions": s.answers[0]} for r, s in zip(before, train_labels("easyVQA")[:40], strict=True)]

    def of(records):
        return Evaluation.of(Path("Heldout.json"), records, guard.SCORED_AS, "paper")

    assert guard.compare(of(before), of(after)).verdict == "not told apart"
    assert told_by_train_labels(of(before), of(after), "easyVQA") == "better"
    assert told_by_train_labels(of(after), of(before), "easyVQA") == "worse"
    for other in ({"GT_question": "another?"}, {"image_path": "another.png"}, {"question_id": 0}):
        changed = of([before[0] | other, *before[1:]])
        assert told_by_train_labels(changed, changed, "easyVQA") is None


def test_nothing_to_check_is_an_error(tmp_path):
    answered_runs.write(tmp_path, SAMPLES)
    for check in ("overlap", "degraded", "transfer", "sweep", "guard"):
        done = python("checks.py", check, tmp_path)
        assert done.returncode == 1 and f"nothing for {check}" in done.stderr
    done = python("checks.py", "coverage", tmp_path, "--lvlm", "other")
    assert done.returncode == 1 and "no annotations of such models" in done.stderr
