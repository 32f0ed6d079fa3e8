"""Experiment files: what is unknown in them is named with file and line, and the plan of what would run."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, STUDENT, TEACHER

from experiments import definition, plan
from experiments.variants import STAGES, Asking, Training, Variant, variables
from mpa.files.records import InputError

GOOD = f"""datasets: [easyVQA]
lvlms: [{TEACHER}]
svlms:
  - model: {STUDENT}
    gpus: 2
variants:
  mpa:
  slow: {{train: all_pseudo, EPOCHS: 3}}
  loose: {{train: mpa, match: anls}}
seeds: [0, 1]
flags:
  PA: --limit 30
  evaluate: --sample 50
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trial.yaml"
    path.write_text(GOOD)
    return path


def test_a_file_is_read(file):
    e = definition.read(file)
    assert (e.presets, e.seeds, e.pairs) == (["paper"], [0, 1], [("teacher", "student")])
    assert e.variants["slow"] == Variant(train="all_pseudo", EPOCHS="3") and e.answer_all
    assert e.variants["mpa"] == Variant() and e.variants["loose"] == Variant(match="anls")
    assert e.flags.PA == ("--limit", "30") and e.flags.PL == ()
    assert e.gpus_of("PL", e.svlms["student"]) == 2 and e.gpus_of("PA", e.lvlms["teacher"]) == 1


def test_variants_with_anchors_select_from_the_same_answers(file):
    more = "  loose: {train: mpa, match: anls}\n  both: {train: mpa, match: anls, anchors: 0.5, anchor_by: kind}\n"
    file.write_text(
        GOOD.replace("  loose: {train: mpa, match: anls}\n", f"{more}  anchored: {{train: mpa, anchors: 2}}\n")
    )
    e = definition.read(file)
    assert e.selections == {
        "anls": ("--match", "anls"),
        "anls_anchors-0.5-kind": ("--match", "anls", "--anchors", "0.5", "--anchor-by", "kind"),
        "anchors-2": ("--anchors", "2", "--anchor-by", "answer"),
    }
    assert e.variants["mpa"].selection == "" and e.variants["anchored"].selection == "_anchors-2"


def test_a_setting_reaches_the_stages_that_read_it_as_it_is_written(file):
    file.write_text(
        GOOD.replace("EPOCHS: 3", "VISION_LR: 5e-6") + "settings: {BATCH_SIZE: 32, EPOCHS: 1.0, MAX_PIXELS: 3136}\n"
    )
    e = definition.read(file)
    assert variables(e.settings, "PI") == {"BATCH_SIZE": "32", "MAX_PIXELS": "3136"}
    assert variables(e.settings, "PL") == {"EPOCHS": "1.0", "MAX_PIXELS": "3136"}
    assert variables(e.variants["slow"], "PL") == {"VISION_LR": "5e-6"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_scripts_read_the_settings(stage):
    text = STAGES[stage].read_text()
    names = (Training if stage == "PL" else Asking).model_fields
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "experiments").glob("*.yaml")])
def test_the_repositorys_files_are_valid(name):
    e = definition.read(ROOT / "experiments" / name)
    assert e.pairs and e.variants


def test_the_papers_matrix_is_whole():
    e = definition.read(ROOT / "experiments/paper.yaml")
    assert (len(e.datasets), len(e.lvlms), len(e.svlms), len(e.pairs)) == (4, 3, 5, 15)
    assert e.gpus_of("PA", e.lvlms["gpt-4o"]) == 0 and e.lvlms["gpt-4o"].path == "gpt-4o"
    assert list(definition.read(ROOT / "experiments/ablation-pi.yaml").variants) == ["mpa", "all_pseudo", "human"]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("easyVQA", "easyVQa", 1, "'okVQA' or 'easyVQA', not 'easyVQa'"),
        ("easyVQA", "images", 1, "datasets: should be 'textVQA', "),  # it has no labels
        ("[easyVQA]", "[]", 1, "datasets: the list is empty"),
        (str(TEACHER), f"{TEACHER}2", 2, "no such model folder"),
        (str(TEACHER), "data/mini/teecher", 2, "no such model folder: 'data/mini/teecher'. Give a folder, or a hub id"),
        (str(TEACHER), str(STUDENT) + "/, " + str(STUDENT), 2, "two models have the name 'student'"),
        (str(TEACHER), "[a]", 2, "lvlms: should be a mapping, KEY: VALUE"),
        ("    gpus: 2", "    gpu: 2", 5, "svlms: gpu: unknown key. Known: model, engine, flags, gpus"),
        ("    gpus: 2", "    gpus: no", 5, "gpus: should be a valid integer"),
        ("    gpus: 2", "    engine: vlm", 5, "engine: should be 'hf', 'vllm', 'openai' or 'ray', not 'vlm'"),
        ("    gpus: 2", "    flags: --batchsize 3", 5, "svlms: flags: unrecognized arguments: --batchsize 3"),
        ("  mpa:", "  mpaa:", 7, "mpaa: train: should be 'mpa', 'all_pseudo'"),
        ("  mpa:", "  mpa: 3", 7, "mpa: should be a mapping, KEY: VALUE"),
        ("  mpa:", "  1st: {train: mpa}", 7, "1st: String should match pattern"),
        ("  mpa:", "  mpa: {train: human}", 7, "it trains on mpa, not on human; choose another name"),
        ("EPOCHS", "EPOCH", 8, "slow: EPOCH: unknown key. Known: PL_BATCH_SIZE, "),
        ("EPOCHS: 3", "EPOCHS: three", 8, "EPOCHS: should be a valid number"),
        ("EPOCHS: 3", "seeds: [2]", 8, "slow: seeds: the experiment has no seed 2; known: 0, 1"),
        ("EPOCHS: 3", "replay: 1", 8, "replay: should be less than 1, not '1'"),
        ("EPOCHS: 3", "replay: 0.1", 8, "slow: replay: needs another dataset"),
        ("EPOCHS: 3", "anchors: 1", 8, "anchors: is for the parity set (train: mpa), not for all_pseudo"),
        ("train: all_pseudo", "train: human, match: anls", 8, "match: no effect on human"),
        ("match: anls", "corrupt: {type: number}", 9, "corrupt: the key 'share' is missing"),
        ("match: anls", "corrupt: {type: number, share: 0.1}, match: anls", 9, "corrupt: goes with none of match"),
        ("match: anls", "anchors: nan", 9, "anchors: should be "),
        ("match: anls", "anchor_by: kind", 9, "anchor_by: needs anchors: R"),
        ("seeds: [0, 1]", "seeds: [0, 0]", 10, "seeds: 0 is repeated"),
        ("seeds: [0, 1]", "seed: [0]", 10, "seed: unknown key. Known: datasets"),
        ("seeds: [0, 1]", "settings: {BATCH: 3}", 10, "settings: BATCH: unknown key. Known: BATCH_SIZE"),
        ("seeds: [0, 1]", "settings: {ZERO: zero1}", 10, "ZERO: should be 'zero2', 'zero2_offload', "),
        ("seeds: [0, 1]", "svlms: [a/b]", 10, "the key 'svlms' is repeated"),
        ("seeds: [0, 1]", "transfer: maybe", 10, "transfer: should be a valid boolean"),
        ("seeds: [0, 1]", "models: {folder: x}", 10, "models: the key 'made_by' is missing"),
        ("seeds: [0, 1]", "data: {folder: x, made_by: none.py}", 10, "data: made_by: no such script"),
        ("--limit 30", "--limit 0", 12, "flags: PA: argument --limit: must be at least 1"),
        ("--limit 30", "--limit '30", 12, "flags: PA: No closing quotation"),
        ("  PA: ", "  PB: ", 12, "flags: PB: unknown key. Known: PA, PI, PL, evaluate"),
        ("flags:\n", "flags\n", 12, "not YAML"),
    ],
)
def test_what_is_unknown_is_named_with_file_and_line(file, old, new, line, message):
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        definition.read(file)
    assert str(error.value).startswith(f"{file}, line {line}: ") and message in str(error.value)


def test_an_unknown_flag_of_the_trainer_is_named_with_file_and_line(file):
    file.write_text(GOOD.replace("EPOCHS: 3", "flags: --packin True"))
    with pytest.raises(InputError, match=r"line 8: variants: slow: flags: .*--packin"):
        definition.read(file)


def test_a_missing_file_or_key_is_named(file):
    with pytest.raises(InputError, match=r"none.yaml: no such file. Give an experiment file.*mini.yaml"):
        definition.read(file.with_name("none.yaml"))
    file.write_text(GOOD.replace("datasets: [easyVQA]\n", ""))
    with pytest.raises(InputError, match="line 1: the key 'datasets' is missing"):
        definition.read(file)


def test_the_plan_counts_what_is_shared_once(file, tmp_path):
    e = definition.read(file)
    work = {}
    for w in plan.works(e):
        work[w.stage, w.model] = work.get((w.stage, w.model), 0) + w.requests * w.times
    assert work == {
        ("PA", "teacher"): 2 * 30,
        ("PI", "student"): 2 * 30,
        ("PL", "student"): 6 * 30,
        ("evaluate", "teacher"): 50,
        ("evaluate", "student"): 50 + 6 * 50,
    }
    assert plan.requests(plan.alone(e)) == 6 * (2 * 30 + 3 * 50)
    text = "\n".join(plan.plan(e, tmp_path))
    assert text.startswith("6 cells = 1 datasets") and "520 requests instead of 1,260" in text


@pytest.mark.parametrize(
    ("flags", "of_lvlm", "held_out"),
    [
        ("--hold-out 0.2", 0, 6),
        ("--hold-out 0.2 --held-out-questions train", 1000, 1000),
        ("--hold-out 0.2 --held-out-questions train --max-held-out-questions 40", 40, 40),
        ("--hold-out 0 --votes 3 --blind", 4 * 30, 0),
        ("--hold-out 0.2 --blind --held-out-questions train", 30 + 1000, 1000),
    ],
)
def test_the_plan_counts_what_is_asked_beyond_the_paper(file, flags, of_lvlm, held_out):
    file.write_text(GOOD + f"  PI: {flags}\n")
    e, asked = definition.read(file), lambda works: [w.requests * w.times for w in works]
    shared = plan.works_beyond_paper(e, "easyVQA", 30, shared=True)
    cells = plan.works_beyond_paper(e, "easyVQA", 30, shared=False)
    assert [w.model for w in shared] == ["teacher"] * bool(of_lvlm) + ["student"] * bool(held_out)
    # Two runs, six trainings. The guard asks once before and after PL.
    assert sum(asked(shared)) == 2 * of_lvlm + (2 + 6) * held_out
    assert sum(asked(cells)) == 6 * of_lvlm + (6 + 6) * held_out
    assert plan.requests(plan.works(e)) == 2 * 30 + 2 * 30 + 2 * 50 + 6 * 50 + sum(asked(shared))


def test_the_plan_does_not_take_official_numbers_for_an_experiments_own_data(file, tmp_path, monkeypatch):
    monkeypatch.setenv("MPA_DATA", str(tmp_path / "nothing"))
    official = GOOD.replace("[easyVQA]", "[okVQA]").replace("limit 30", "limit 30000")
    for text, said in (
        (official, "okVQA: 9,009 train images, 50 test questions"),
        (
            official + "data: {folder: nothing, made_by: data/small/draw.py}\n",
            "not known before data/small/draw.py: okVQA.",
        ),
    ):
        file.write_text(text)
        assert said in "\n".join(plan.plan(definition.read(file), tmp_path))


def test_the_plan_counts_transfer_and_variants_of_some_seeds(file):
    more = GOOD.replace("slow: {train: all_pseudo", "slow: {seeds: [0], train: all_pseudo") + "transfer: true\n"
    file.write_text(more.replace("[easyVQA]", "[easyVQA, okVQA]"))
    e = definition.read(file)
    jobs = {}
    for w in plan.works(e):
        jobs[w.stage, w.model] = jobs.get((w.stage, w.model), 0) + w.times
    assert jobs["PL", "student"] == 2 * 5 and jobs["evaluate", "student"] == 2 * (1 + 2 * 5)


def test_the_plans_hours_come_from_results_or_dry_runs_and_are_open_without(file, tmp_path):
    e = definition.read(file)
    evaluate, pa = (next(w for w in plan.works(e) if w.stage == stage) for stage in ("evaluate", "PA"))
    assert plan.seconds_each(tmp_path, pa) is None
    (tmp_path / "pace").mkdir()
    said = 'A warning.\n{"label": "PA", "requests": 1000, "seconds": 86410.0}\n'
    (tmp_path / "pace/PA_teacher_easyVQA.txt").write_text(said)
    assert plan.seconds_each(tmp_path, pa) == 86.41
    (tmp_path / "paper-0").mkdir()
    (tmp_path / "paper-0/Eval_teacher_easyVQA.meta.json").write_text(json.dumps({"seconds": 25.0, "n": 50}))
    assert plan.seconds_each(tmp_path, evaluate) == 0.5
    line = next(line for line in plan.plan(e, tmp_path) if "  PA " in line)
    assert line.split()[:5] == ["PA", "teacher", "2", "60", "1.44"]


def test_the_plan_and_the_check_run_in_a_folder_that_is_gone(file, tmp_path):
    """torch does not load there, and a script that makes data would not start."""
    gone = tmp_path / "gone"
    (tmp_path / "make.py").write_text("import os; os.getcwd()")
    more = f"data: {{folder: {tmp_path}/data, made_by: {tmp_path}/make.py}}\n"
    for command in (f"python -P -m experiments.definition {file}", f"python -P -m experiments.plan {file} {tmp_path}"):
        gone.mkdir()
        file.write_text(GOOD + more)
        places = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
        command = ["bash", "-c", f"cd {gone} && rmdir {gone} && {command}"]
        done = subprocess.run(command, env=places, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trial: 6 cells") and "MB" in done.stdout
