"""The four stages together, with the README's commands, on little data."""

import csv
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import train
from conftest import STUDENT, TEACHER, bash, python
from downloads import NAMES, prepare, samples_of
from easy_run import STAGES, read
from training import MINI as TRAINER_FLAGS

from mpa.answers.metrics import bootstrap_interval
from mpa.data.loading import load_samples
from mpa.files.records import read_json, read_records

MINI = {"MIN_PIXELS": 3136, "MAX_PIXELS": 3136, "DTYPE": "float32", "BATCH_SIZE": 16}
LEVELLED = "PL_teacher_student"


@pytest.mark.slow
def test_a_folder_of_images_goes_through_all_stages_with_no_label(tmp_path):
    folder = tmp_path / "my images"
    folder.mkdir()
    for sample in load_samples("easyVQA", "train")[:60]:
        shutil.copy(sample.image_path, folder / f"{sample.question_id}.png")
    environment = {"IMAGES": folder, "LVLM": TEACHER, "SVLM": STUDENT, "RUN": f"{tmp_path}/run", "ACCUMULATION": 1}
    done = bash("scripts/mpa.sh", **environment, **MINI, PA_FLAGS="--temperature 1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreement with the L-VLM, not accuracy" in done.stdout

    run = tmp_path / "run"
    annotations = read(run / "PA_teacher_images.json")
    assert len(annotations) == 60
    parity = read(run / "PI_teacher_train_teacher_student_images.json")
    held_out = read(run / "PI_teacher_heldout_images.json")
    assert parity
    assert held_out
    assert not {s["image"] for s in parity} & {r["image_path"] for r in held_out}
    evaluated = read(run / f"Eval_{LEVELLED}_images_images.json")
    assert [r["question_id"] for r in evaluated] == [r["question_id"] for r in held_out]
    assert all(r["predictions"] for r in evaluated)
    # The L-VLM agrees with itself on these images: they were chosen for this, so it has no row.
    summary, guard = read(run / "summary.json"), read(run / "guard_teacher_student_images.json")
    assert list(summary["rows"]) == ["base", "mpa"] and "Guard of run, images" in done.stdout
    assert (
        guard["models"]["mpa"]["n"] == len(held_out) and guard["models"]["mpa"]["gain"] == summary["gain"]["accuracy"]
    )


@pytest.mark.slow
def test_the_demo_in_small_writes_the_summary_that_its_files_add_up_to(tmp_path):
    settings = {"RUN": f"{tmp_path}/demo", "LIMIT": 96, "QUESTIONS": 64}
    done = bash("scripts/demo.sh", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "demo"
    summary = read(run / "summary.json")
    assert list(summary["rows"]) == ["base", "all_pseudo", "random_pseudo", "mpa", "human_n", "human", "lvlm"]
    kept = len(read(run / "PI_teacher_train_teacher_student_easyVQA.json"))
    samples = {row: cells["train_samples"] for row, cells in summary["rows"].items()}
    assert samples == {
        "base": 0,
        "lvlm": 0,
        "mpa": kept,
        "random_pseudo": kept,
        "human_n": kept,
        "human": 96,
        "all_pseudo": summary["funnel"]["parsed"],
    }
    assert summary["funnel"]["parity"] == kept < summary["funnel"]["L-consistent"] < summary["funnel"]["pictures"] == 96
    for row, name in (("base", "student"), ("mpa", f"{LEVELLED}_easyVQA"), ("lvlm", "teacher")):
        records = read(run / f"Eval_{name}_easyVQA.json")
        right = [float(r["predictions"] == r["GT_answer"]) for r in records]
        assert summary["rows"][row]["accuracy"] == pytest.approx(sum(right) / 64)
        assert tuple(summary["rows"][row]["ci95"]) == pytest.approx(bootstrap_interval(right))
        assert summary["rows"][row]["n"] == 64
    assert set(summary["seconds"]) == {"PA", "PI", "PL", "evaluate", "baselines"}

    again = bash("scripts/demo.sh", **settings)
    assert again.returncode == 0
    assert "PA_teacher_easyVQA.json already exists" in again.stdout
    assert again.stdout.count("already exists, trained with these settings") == 5
    assert read(run / "summary.json") == summary


@pytest.mark.slow
def test_from_the_download_to_the_levelled_model_on_each_of_the_four(prepared, tmp_path):
    def run(name: str):
        settings = {"MIN_PIXELS": 3136, "MAX_PIXELS": 3136, "DTYPE": "float32", "BATCH_SIZE": 16, "ACCUMULATION": 1}
        settings |= {"LVLM": TEACHER, "SVLM": STUDENT, "DATASET": name, "RUN": f"{tmp_path}/{name}"}
        flags = {"PA_FLAGS": "--temperature 1 --task general", "EVALUATE_FLAGS": "--log-samples"}
        return bash("scripts/mpa.sh", MPA_DATA=prepared[name], **settings, **flags)

    for name in NAMES:
        prepare.main(["check", name, "--data", str(prepared[name])])
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(NAMES, pool.map(run, NAMES), strict=True))
    for name, done in results.items():
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / name
        summary = read_json(folder / "summary.json")
        assert set(summary["rows"]) == {"base", "mpa", "lvlm"}
        assert summary["funnel"]["parity"] > 0
        files = [f for f in folder.glob("*_*.json") if not f.name.endswith((".meta.json", ".reasons.json"))]
        read_back = {}
        for file in files:
            kind = "train" if "_train_" in file.name else file.name.split("_")[0]
            read_back.setdefault(kind, []).append(read_records(file, kind))
        assert {kind: len(found) for kind, found in read_back.items()} == {"PA": 1, "PI": 2, "train": 1, "Eval": 3}
        assert {len(found) for found in read_back["Eval"]} == {len(samples_of(prepared, name, "test"))}
        assert len(list(folder.glob("lmms-eval/*/samples_*.jsonl"))) == 3


def test_the_stages_one_after_the_other_add_up_to_the_summary(easy_run, tmp_path):
    """Without the bash scripts, on 40 images."""
    run = tmp_path / "run"
    shutil.copytree(easy_run, run)
    levelled, parity = run / f"{LEVELLED}_easyVQA", run / "PI_teacher_train_teacher_student_easyVQA.json"
    paths = ["--model_id", STUDENT, "--data_path", parity, "--output_dir", levelled]
    assert train.main([*map(str, paths), *TRAINER_FLAGS, "--per_device_train_batch_size", "4"]) == 0
    done = python(*STAGES["evaluate"][:-1], levelled, TEACHER, "--run", f"{run}/")
    assert done.returncode == 0, done.stderr
    done = python("tables.py", "--dataset", "easyVQA", "--lvlm", TEACHER, "--svlm", STUDENT, run)
    assert done.returncode == 0, done.stderr
    assert "S-VLM before" in done.stdout and "MPA gains" in done.stdout
    summary, kept = read(run / "summary.json"), len(read(parity))
    assert {row: cells["train_samples"] for row, cells in summary["rows"].items()} == {
        "base": 0,
        "mpa": kept,
        "lvlm": 0,
    }
    assert (
        summary["funnel"]["parity"] == kept < summary["funnel"]["L-consistent"] <= summary["funnel"]["pictures"] == 40
    )
    for row, name in (("base", "student"), ("mpa", levelled.name), ("lvlm", "teacher")):
        records = read(run / f"Eval_{name}_easyVQA.json")
        right = [float(r["predictions"] == r["GT_answer"]) for r in records]
        assert summary["rows"][row]["accuracy"] == pytest.approx(sum(right) / 48)
        assert tuple(summary["rows"][row]["ci95"]) == pytest.approx(bootstrap_interval(right))
    done = python("tables.py", run, "--table", "main", "--format", "csv")
    (row,) = csv.DictReader(line for line in done.stdout.splitlines() if not line.startswith("#"))
    names = ("before", "after", "gain", "95 % interval low", "95 % interval high", "n", "parity samples")
    accuracies = (summary["rows"]["base"]["accuracy"], summary["rows"]["mpa"]["accuracy"], summary["gain"]["accuracy"])
    expected = [*(100 * value for value in (*accuracies, *summary["gain"]["ci95"])), 48, kept]
    assert [float(row[name]) for name in names] == pytest.approx(expected, abs=1e-3)


def test_a_train_file_that_is_not_there_is_named_before_a_model_is_loaded(tmp_path):
    done = bash("PL/Qwen2-VL-Finetune/scripts/PL.sh", RUN=f"{tmp_path}/", DATASET="easyVQA")
    assert done.returncode != 0
    assert "no such file. Run PI.sh first" in done.stderr
    assert "Traceback" not in done.stderr
