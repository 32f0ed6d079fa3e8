"""scripts/tables.py makes the paper's tables from result files alone, ours beside the paper's."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import synthetic_runs as fake
from conftest import ROOT, python

from mpa.analysis import run_summary
from mpa.answers.paired import interval
from mpa.runs.trainings import Runs


def table(name: str, *folders, flags=()) -> list[dict]:
    """One table's rows, as its CSV has them."""
    done = python("tables.py", *folders, "--table", name, "--format", "csv", *flags)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(line for line in done.stdout.splitlines() if not line.startswith("#")))


BEFORE, AFTER = [1, 0, 0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0]


def test_a_run_is_found_by_its_meta_files_and_its_gain_is_paired(tmp_path):
    fake.run(tmp_path / "any/name", "chartVQA", "big/a_b", "hub/c_d", BEFORE, AFTER)
    (row,) = table("main", tmp_path)
    assert (row["dataset"], row["L-VLM"], row["S-VLM"]) == ("chartVQA", "a_b", "c_d")
    assert [float(row[name]) for name in ("before", "after", "gain", "n", "parity samples", "seeds")] == [
        25.0,
        50.0,
        25.0,
        8.0,
        4.0,
        1.0,
    ]
    expected = 100 * np.array(interval((np.array(AFTER) - BEFORE, range(8))))
    assert [float(row[f"95 % interval {end}"]) for end in ("low", "high")] == pytest.approx(expected, abs=1e-4)
    assert row["gain, paper"] == "–"


def test_seeds_are_those_of_the_meta_files_and_give_mean_and_deviation(tmp_path):
    gains = []
    for seed, right in enumerate(([1] * 6 + [0] * 2, [1] * 4 + [0] * 4, [1] * 5 + [0] * 3)):
        fake.run(tmp_path / f"run-{9 - seed}", "textVQA", "L", "S", BEFORE, right, seed=seed)
        gains.append(np.array(right) - BEFORE)
    (row,) = table("main", tmp_path)
    assert (row["before"], row["after"], row["after sd"], row["gain"], row["seeds"]) == (
        "25",
        "62.5",
        "12.5",
        "37.5",
        "3",
    )
    assert (row["parity samples"], row["parity samples sd"]) == ("5", "1")
    low, high = interval(*((gain, range(8)) for gain in gains))
    assert (float(row["95 % interval low"]), float(row["95 % interval high"])) == pytest.approx(
        (100 * low, 100 * high), abs=1e-4
    )
    shown = python("tables.py", tmp_path).stdout
    assert "| 62.5 ± 12.5 | +37.5 ± 12.5 |" in shown


def test_a_linked_evaluation_before_has_no_deviation(tmp_path):
    for seed, right in enumerate((AFTER, BEFORE)):
        fake.run(tmp_path / str(seed), "textVQA", "L", "S", BEFORE, right, seed=seed)
    for file in ("Eval_S_textVQA.json", "Eval_S_textVQA.meta.json"):  # as reproduce.sh links what no seed changes
        (tmp_path / "1" / file).unlink()
        (tmp_path / "1" / file).hardlink_to(tmp_path / "0" / file)
    (row,) = table("main", tmp_path)
    assert (row["before"], row["before sd"], row["after sd"] != "") == ("25", "", True)


def test_trainings_with_other_settings_are_other_rows_and_equal_ones_are_told_apart_by_folder(tmp_path):
    fake.run(tmp_path / "a", "okVQA", "L", "S", BEFORE, AFTER)
    fake.run(tmp_path / "b", "okVQA", "L", "S", BEFORE, AFTER, pl={"num_train_epochs": 3.0})
    assert [row["settings"] for row in table("main", tmp_path)] == ["num_train_epochs 1.0", "num_train_epochs 3.0"]
    fake.run(tmp_path / "c", "okVQA", "L", "S", BEFORE, AFTER, pl={"num_train_epochs": 3.0})
    labels = [row["settings"] for row in table("main", tmp_path)]
    assert [label.rpartition("/")[2] for label in labels] == ["num_train_epochs 1.0", "b", "c"]


def test_a_cell_without_a_run_stays_empty(tmp_path):
    fake.run(tmp_path / "a", "textVQA", "L1", "S1", BEFORE, AFTER)
    fake.run(tmp_path / "b", "textVQA", "L2", "S2", BEFORE, AFTER)
    fake.parity(tmp_path / "c", "textVQA", "L1", "S2", 3, 9)  # PI is done, PL is not: before is known
    rows = {(row["L-VLM"], row["S-VLM"]): row for row in table("main", tmp_path)}
    assert len(rows) == 4
    assert {name for name, value in rows["L2", "S1"].items() if value} == {"dataset", "L-VLM", "S-VLM", "gain, paper"}
    assert rows["L1", "S2"]["before"] == "25" and rows["L1", "S2"]["after"] == rows["L1", "S2"]["gain"] == ""


def test_the_papers_figures_stand_beside_ours_and_the_unknown_is_not_published(tmp_path):
    fake.run(tmp_path / "a", "chartVQA", "OpenGVLab/InternVL2-8B", "Qwen/Qwen2-VL-2B-Instruct", BEFORE, AFTER)
    rows = table("main", tmp_path, flags=["--whole-matrix"])
    assert len(rows) == 4 * 3 * 5
    ours = [row for row in rows if row["after"]]
    assert [(row["gain"], row["gain, paper"]) for row in ours] == [("25", "15.2")]
    assert "TinyLLaVA-2B" in ours[0]["notes"]
    assert {row["gain, paper"] for row in rows if not row["after"]} == {"not published"}
    claims = {row["claim"]: row for row in table("claims", tmp_path)}
    assert claims["best gain"]["ours"] == "25" and claims["best gain"]["paper"] == "15.2"
    assert "TinyLLaVA-2B" in claims["best gain"]["notes"] and claims["mean gain"]["paper"] == "3.4"
    assert claims["samples of D_PA over D_PI"]["ours"] == "10"
    assert claims["samples of D_PA over D_PI"]["paper"] == "about 10"
    assert [row["accuracy, paper"] for row in table("ablation", tmp_path)] == ["75.1", "73.6", "72.7"]


def test_table_6_has_each_variant_of_a_cell_in_one_folder_or_several(tmp_path):
    fake.run(tmp_path / "a", "textVQA", "L", "S", BEFORE, AFTER)
    for variant, right, samples in (("all_pseudo", [1] * 3 + [0] * 5, 40), ("rejected", [0] * 8, 36)):
        fake.trained(tmp_path / "a", "textVQA", "L", "S", right, samples, variant=variant)
    fake.trained(tmp_path / "b", "textVQA", "L", "S", [1] * 7 + [0], 99, variant="human")
    fake.evaluation(tmp_path / "a", "L", "textVQA", [1] * 8)
    rows = table("ablation", tmp_path)
    assert [(row["training data"], row["samples"], row["accuracy"], row["accuracy, paper"]) for row in rows] == [
        ("S-VLM before", "", "25", "not published"),
        ("all pseudo labels, without PI", "40", "37.5", "73.6"),
        ("MPA", "4", "50", "75.1"),
        ("human labels, all", "99", "87.5", "72.7"),
        ("pseudo labels that PI did not keep", "36", "0", "not published"),
        ("L-VLM", "", "100", "not published"),
    ]


def test_a_variant_of_another_matcher_has_the_settings_of_its_own_parity_set(tmp_path):
    for seed, folder in enumerate((tmp_path / "0", tmp_path / "1")):
        fake.run(folder, "textVQA", "L", "S", BEFORE, AFTER, seed=seed)
        mpa = fake.parity(folder, "textVQA", "L", "S", 4, 40)
        own = mpa.with_stem(f"{mpa.stem}_tolerant")
        meta = json.loads(own.with_stem(mpa.stem).with_suffix(".meta.json").read_text())
        fake.write(own.with_suffix(".meta.json"), meta | {"settings": {"match": "tolerant", "preset": "paper"}})
        for name, file in (("loose", own), ("loose_rejected", own.with_stem(f"{own.stem}_rejected"))):
            pl = {"data_path": [f"{file}:0.9", "old.json:0.1"]}
            fake.trained(folder, "textVQA", "L", "S", AFTER, 4, seed=seed, variant=name, pl=pl)
    found = {e.variant: e for e in Runs([tmp_path]).groups}
    assert {name: e.seeds[0].settings["match"] for name, e in found.items()} == {
        "mpa": "exact",
        "loose": "tolerant",
        "loose_rejected": "tolerant",
    }
    assert {len(e.seeds) for e in found.values()} == {2}


def test_before_and_after_on_other_questions_are_compared_on_those_of_both(tmp_path):
    fake.run(tmp_path, "textVQA", "L", "S", BEFORE, AFTER)
    fake.evaluation(tmp_path, "S", "textVQA", [0, 1, 1], ids=[7, 0, 20])
    fake.write(tmp_path / "x.json", {})
    path = tmp_path / "Eval_S_textVQA.json"
    records = json.loads(path.read_text())
    (row,) = table("main", tmp_path)
    assert (row["n"], row["gain"]) == ("2", "0") and "2 questions that both evaluations asked" in row["notes"]
    records[0]["GT_question"] = "quite another?"
    fake.write(path, records)
    (row,) = table("main", tmp_path)
    assert row["gain"] == "" and "not the same questions" in row["notes"] and "'quite another?'" in row["notes"]


def test_the_s_vlm_before_may_lie_in_another_folder_but_not_be_another_model(tmp_path):
    fake.run(tmp_path / "a", "textVQA", "L", "S", BEFORE, AFTER)
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").glob("Eval_S_*"):
        file.rename(tmp_path / "b" / file.name)
    assert table("main", tmp_path)[0]["gain"] == "25"
    fake.evaluation(tmp_path / "c", "other/S", "textVQA", [1] * 8, model="S@1")
    (row,) = table("main", tmp_path)
    assert row["gain"] == row["before"] == "" and "not evaluated on the same questions" in row["notes"]


@pytest.mark.parametrize("spoil", ["records", "meta"])
def test_files_that_contradict_each_other_are_refused(tmp_path, spoil):
    fake.run(tmp_path, "textVQA", "L", "S", BEFORE, AFTER)
    path = tmp_path / ("Eval_S_textVQA.json" if spoil == "records" else "Eval_S_textVQA.meta.json")
    content = json.loads(path.read_text())
    if spoil == "records":
        content[0]["scores"]["textvqa"] = 0.0
    else:
        del content["scores"]
    fake.write(path, content)
    done = python("tables.py", tmp_path)
    assert done.returncode == 1 and path.name in done.stderr and "evaluate again" in done.stderr


def test_scores_of_another_layout_are_read_as_json_and_hostile_answers_are_not_scores(tmp_path):
    fake.run(tmp_path, "textVQA", "L", "S", BEFORE, AFTER)
    path = tmp_path / "Eval_S_textVQA.json"
    content = json.loads(path.read_text())
    content[0]["predictions"] = '"scores": {\n            "textvqa": 1.0'
    fake.write(path, content)
    evaluation = Runs([tmp_path]).evaluation("textVQA", "S")
    assert evaluation.scores.tolist() == BEFORE
    path.write_text(json.dumps(content))
    assert Runs([tmp_path]).evaluation("textVQA", "S").scores.tolist() == BEFORE


def test_a_model_evaluated_on_another_dataset_is_in_no_table(tmp_path):
    fake.run(tmp_path, "textVQA", "L", "S", BEFORE, AFTER)
    fake.evaluation(tmp_path, str(tmp_path / "PL_L_S_textVQA"), "okVQA", [1] * 8)
    assert len(table("main", tmp_path)) == 1


def test_names_are_inert_in_markdown_and_latex(tmp_path):
    fake.run(tmp_path, "textVQA", "L", "a|b_<c>&%", BEFORE, AFTER)
    assert r"| a\|b_&lt;c>&% |" in python("tables.py", tmp_path).stdout
    text = python("tables.py", tmp_path, "--format", "latex").stdout
    assert r"a\textbar{}b\_\textless{}c\textgreater{}\&\%" in text
    assert text.count(r"\toprule") == text.count(r"\end{tabular}") == 4


def test_out_writes_what_would_be_printed(tmp_path):
    fake.run(tmp_path / "run", "textVQA", "L", "S", BEFORE, AFTER)
    printed = python("tables.py", tmp_path / "run").stdout
    done = python("tables.py", tmp_path / "run", "--out", tmp_path / "tables.md")
    assert (tmp_path / "tables.md").read_text() == printed and done.stdout == f"Wrote {tmp_path / 'tables.md'}.\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "no such folder"),
        ([""], "no result of a stage"),
        (["", "--lvlm", "L"], "need --dataset"),
        (["", "--dataset", "okVQA", "--format", "csv"], "leave out --dataset"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    done = python("tables.py", tmp_path / arguments[0], *arguments[1:])
    assert done.returncode != 0 and message in done.stderr


def test_200_runs_take_two_seconds_without_torch(tmp_path):
    datasets, lvlms = ("textVQA", "stVQA", "chartVQA", "okVQA"), ("L1", "L2")
    svlms, seeds = ("S1", "S2", "S3", "S4", "S5"), range(5)
    rng = np.random.default_rng(0)
    fakes = [(d, lvlm, svlm, seed) for d in datasets for lvlm in lvlms for svlm in svlms for seed in seeds]
    for d, lvlm, svlm, seed in fakes:
        before, after = (rng.choice([0, 1], 100).tolist() for _ in range(2))
        fake.run(tmp_path / f"{d}/{lvlm}-{svlm}-{seed}", d, lvlm, svlm, before, after, seed=seed)
    code = f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]; import runpy; "
    code += f"runpy.run_path({str(ROOT / 'scripts/tables.py')!r}, run_name='__main__'); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules); "
    code += "import time; print(time.process_time(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 100 |") == 40 and len(fakes) == 200
    assert float(done.stderr) < 2  # of this process: others may use the cores


def test_a_summary_of_few_questions_and_samples_says_so():
    row = {"accuracy": 0.8, "ci95": [0.8, 0.8], "n": 6, "train_samples": 10}
    said = run_summary.cautions({"rows": {"mpa": row}})
    assert [line.split(":")[0].strip() for line in said] == ["Only 6 test questions", "Only 10 training samples"]
    assert run_summary.cautions({"rows": {"mpa": row | {"n": 2000, "train_samples": 239}}}) == []


@pytest.mark.parametrize("choice", [{"blind": True}, {"votes": 4, "min_agreement": 0.5}, {"min_probability": 0.9}])
def test_other_choices_of_pi_are_no_seeds_of_one_experiment(tmp_path, choice):
    for seed, changed in enumerate(({}, choice)):
        folder = tmp_path / f"run-{seed}"
        fake.parity(folder, "textVQA", "hub/big", "hub/small", 10, 100, **changed)
        fake.trained(folder, "textVQA", "hub/big", "hub/small", [1, 0], 10, seed)
    found = Runs([tmp_path]).groups
    assert len(found) == 2 and all(len(e.seeds) == 1 and next(iter(choice)) in e.label for e in found)
