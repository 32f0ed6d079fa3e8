"""Experiment files: what is unknown in them is named with file and line, and the plan of what would run."""

import json

import pytest
from conftest import ROOT, STUDENT, TEACHER

from experiments import definition, plan
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
    assert (e.name, e.presets, e.seeds, e.pairs) == ("trial", ["paper"], [0, 1], [("teacher", "student")])
    assert e.variants["slow"] == definition.Variant("all_pseudo", None, {"EPOCHS": "3"})
    assert e.variants["mpa"] == definition.Variant() and e.matchers == ["anls"]
    assert e.flags["PA"] == ("--limit", "30") and e.flags["PL"] == ()
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


def test_variants_with_the_s_vlms_probabilities_name_what_they_select(file):
    soft = "  soft: {train: mpa, anchors: 100, weights: true}\n  sure: {train: mpa, max_svlm_probability: 0.2}\n"
    file.write_text(GOOD.replace("  loose: {train: mpa, match: anls}\n", soft))
    e = definition.read(file)
    assert e.selections == {
        "anchors-100_weights": ("--anchors", "100", "--anchor-by", "answer", "--weights"),
        "p-0.2": ("--max-svlm-probability", "0.2"),
    }
    assert e.scored_selections == {"anchors-100_weights", "p-0.2"}


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
        ("easyVQA", "easyVQa", 1, "unknown dataset 'easyVQa'. Known: textVQA"),
        ("easyVQA", "images", 1, "unknown dataset 'images'"),
        (str(TEACHER), f"{TEACHER}2", 2, "no such model folder"),
        (str(TEACHER), "data/mini/teecher", 2, "no such model folder: 'data/mini/teecher'"),
        (str(TEACHER), str(STUDENT) + "/, " + str(STUDENT), 2, "two models have the name 'student'"),
        ("    gpus: 2", "    gpu: 2", 5, "unknown key 'gpu' in a model of svlms"),
        ("    gpus: 2", "    gpus: no", 5, "gpus should be a whole number from 1: 'no'"),
        ("    gpus: 2", "    engine: vlm", 5, "unknown engine 'vlm'"),
        ("    gpus: 2", "    flags: --batchsize 3", 5, "flags of evaluate: unrecognized arguments: --batchsize 3"),
        ("  mpa:", "  mpaa:", 7, "unknown variant 'mpaa'"),
        ("train: all_pseudo", "train: pseudo", 8, "unknown variant 'pseudo'"),
        ("EPOCHS", "EPOCH", 8, "unknown key 'EPOCH' in a variant"),
        ("EPOCHS: 3", "EPOCHS: three", 8, "EPOCHS should be a number: 'three'"),
        ("match: anls", "match: anl", 9, "unknown matcher 'anl'"),
        ("train: all_pseudo", "train: human, match: anls", 8, "a matcher has no effect on human"),
        ("seeds: [0, 1]", "seeds: [0, 0]", 10, "seeds: 0 is repeated"),
        ("seeds: [0, 1]", "seeds: [-1]", 10, "a seed should be a whole number from 0: '-1'"),
        ("seeds: [0, 1]", "seed: [0]", 10, "unknown key 'seed' in an experiment file. Known: datasets"),
        ("seeds: [0, 1]", "presets: papers", 10, "unknown preset 'papers'"),
        ("seeds: [0, 1]", "settings: {BATCH: 3}", 10, "unknown key 'BATCH' in settings"),
        ("seeds: [0, 1]", "svlms: [a/b]", 10, "the key 'svlms' is repeated"),
        ("--limit 30", "--limits 0", 12, "flags of PA"),
        ("--limit 30", "--limit 0", 12, "flags of PA: argument --limit: must be at least 1"),
        ("--limit 30", "--limit '30", 12, "flags: No closing quotation"),
        ("  PA: ", "  PB: ", 12, "unknown key 'PB' in flags"),
        ("flags:\n", "flags\n", 12, "not YAML"),
        ("EPOCHS: 3", "seeds: [2]", 8, "unknown seed of a variant '2'. Known: 0, 1"),
        ("EPOCHS: 3", "replay: 1", 8, "replay should be a share between 0 and 1: '1'"),
        ("EPOCHS: 3", "replay: 0.1", 8, "slow: replay needs another dataset"),
        ("match: anls", "corrupt: {type: number}", 9, "corrupt: the key 'share' is missing"),
        ("match: anls", "corrupt: {type: numbers, share: 0.1}", 9, "unknown answer type 'numbers'"),
        ("match: anls", "corrupt: {type: number, share: 0.1}, match: anls", 9, "without match, anchors"),
        (
            "match: anls",
            "corrupt: {type: number, share: 0.1}, weights: true",
            9,
            "without match, anchors, anchor_by, weights",
        ),
        ("EPOCHS: 3", "weights: true", 8, "weights is for the parity set (train: mpa), not for all_pseudo"),
        ("match: anls", "weights: yes", 9, "unknown weights 'yes'. Known: true, false"),
        ("match: anls", "max_svlm_probability: 2", 9, "max_svlm_probability should be a share between 0 and 1: '2'"),
        ("match: anls", "anchors: 0", 9, "anchors should be a number per parity sample, above 0 and up to 100: '0'"),
        ("match: anls", "anchor_by: kind", 9, "anchor_by needs anchors: R"),
        ("match: anls", "anchors: 1, anchor_by: kinds", 9, "unknown anchor_by 'kinds'. Known: answer, kind, random"),
        ("EPOCHS: 3", "anchors: 1", 8, "anchors are added to the parity set (train: mpa), not to all_pseudo"),
        ("EPOCHS: 3", "corrupt: {type: number, share: 0.1}", 8, "corrupt is for variants that train on mpa"),
        ("seeds: [0, 1]", "transfer: yes", 10, "unknown transfer 'yes'. Known: true, false"),
        ("seeds: [0, 1]", "data: {folder: x}", 10, "data: the key 'made_by' is missing"),
        ("seeds: [0, 1]", "data: {folder: x, made_by: none.py}", 10, "made_by: no such script"),
    ],
)
def test_what_is_unknown_is_named_with_file_and_line(file, old, new, line, message):
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        definition.read(file)
    assert str(error.value).startswith(f"{file}, line {line}: ") and message in str(error.value)


def test_an_unknown_flag_of_the_trainer_is_named_with_file_and_line(file):
    file.write_text(GOOD.replace("EPOCHS: 3", "flags: --packin True"))
    with pytest.raises(InputError, match=r"line 8: flags of PL: .*--packin"):
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
    assert "6 cells = 1 datasets" in text and "520 requests instead of 1,260" in text


@pytest.mark.parametrize(
    ("flags", "of_lvlm", "held_out", "scored"),
    [
        ("--hold-out 0.2", 0, 6, (1, 1)),
        ("--hold-out 0.2 --held-out-questions train", 1000, 1000, (1, 1)),
        ("--hold-out 0.2 --held-out-questions train --max-held-out-questions 40", 40, 40, (1, 1)),
        ("--hold-out 0 --votes 3 --blind", 4 * 30, 0, (1, 1)),
        ("--hold-out 0.2 --blind --held-out-questions train", 30 + 1000, 1000, (1, 1)),
        ("--hold-out 0 --score", 0, 0, (2, 7)),
    ],
)
def test_the_plan_counts_what_is_asked_beyond_the_paper(file, flags, of_lvlm, held_out, scored):
    soft = "  soft: {train: mpa, anchors: 100, weights: true, seeds: [0]}\n"
    file.write_text(GOOD.replace("seeds: [0, 1]", f"{soft}seeds: [0, 1]") + f"  PI: {flags}\n")
    e, asked = definition.read(file), lambda works: [w.requests * w.times for w in works]
    shared = plan.works_beyond_paper(e, "easyVQA", 30, shared=True)
    cells = plan.works_beyond_paper(e, "easyVQA", 30, shared=False)
    assert [w.model for w in shared] == ["teacher"] * bool(of_lvlm) + ["student"] * (1 + bool(held_out))
    # Two runs, seven trainings; without PI's --score one of each needs probabilities. The guard asks once before and after PL.
    assert sum(asked(shared)) == 2 * of_lvlm + scored[0] * 30 + (2 + 7) * held_out
    assert sum(asked(cells)) == 7 * of_lvlm + scored[1] * 30 + (7 + 7) * held_out
    assert plan.requests(plan.works(e)) == 2 * 30 + 2 * 30 + 2 * 50 + 7 * 50 + sum(asked(shared))


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
    said = "PA: 1,000 requests about 30 images.\n  time, by the pace of 16: 1 day, 0:00:10\n"
    (tmp_path / "pace/PA_teacher_easyVQA.txt").write_text(said)
    assert plan.seconds_each(tmp_path, pa) == 86.41
    (tmp_path / "paper-0").mkdir()
    (tmp_path / "paper-0/Eval_teacher_easyVQA.meta.json").write_text(json.dumps({"seconds": 25.0, "n": 50}))
    assert plan.seconds_each(tmp_path, evaluate) == 0.5
    line = next(line for line in plan.plan(e, tmp_path) if "  PA " in line)
    assert line.split()[:5] == ["PA", "teacher", "2", "60", "1.44"]
