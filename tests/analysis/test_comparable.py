"""What cannot be compared is refused with the difference named, and replies that are none are no wrong answers."""

import json
import shutil
from pathlib import Path

import answered_runs
import evaluate
import guard as script
import PI
import pytest
import synthetic_runs as fake
from answered_by_rule import annotate, answers_by, flags
from conftest import STUDENT, python
from PIL import Image
from test_guard import CELL, HALF, MODEL, held_out

from mpa.analysis import guard
from mpa.analysis.diagnosis import diagnose
from mpa.analysis.report.content import CellContent, compared
from mpa.analysis.report.page import compare_section
from mpa.files import records
from mpa.files.records import InputError
from mpa.models.identity import identity
from mpa.runs import comparable
from mpa.runs.case import Case
from mpa.runs.comparable import NotComparable
from mpa.runs.evaluations import Evaluation
from mpa.runs.layout import Cell, RunFiles
from mpa.runs.trainings import Runs

ERROR = {"predictions": None, "left_out": "timed out"}
CUT = {"finish_reason": "length"}


def changed(path: Path, change, places) -> None:
    """Change some records of a result file."""
    content = json.loads(path.read_text())
    for i in places:
        content[i] |= change(content[i]) if callable(change) else change
    fake.write(path, content)


def answers(folder: Path, model: str) -> Path:
    return RunFiles(folder, CELL).guard_answers(model)


def set_meta(path: Path, **settings) -> None:
    meta = json.loads(records.meta_path(path).read_text())
    meta["settings"] |= settings
    fake.write(records.meta_path(path), meta)


# --- replies that are none ---


@pytest.mark.parametrize("model", ["small", MODEL])
@pytest.mark.parametrize("broken", [ERROR, CUT, {"left_out": "only reasoning, no answer"}])
def test_the_guard_gives_no_verdict_from_broken_replies_and_counts_few(tmp_path, capsys, model, broken):
    held_out(tmp_path, {"small": [0, 1] * 200, MODEL: [0, 1] * 200})
    changed(answers(tmp_path, model), broken | {"predictions": broken.get("predictions", "cut of")}, range(1, 241, 2))
    script.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert f"{MODEL}: no verdict (n = 280, 120 without a usable reply not counted)" in said and " points" not in said
    assert "No verdict: 120 of 400 questions have no usable reply from one of both (30 %, more than 10 %)" in said
    found = json.loads((tmp_path / "guard_big_small_okVQA.json").read_text())
    assert found["recommended"] is None and found["models"]["mpa"]["gain"] is None
    script.main([str(tmp_path), "--variant", "mpa", "--verdict"])
    assert capsys.readouterr().out == "no verdict\n"
    held_out(tmp_path, {"small": [0, 1] * 200, MODEL: [0, 1] * 200})
    changed(answers(tmp_path, model), broken | {"predictions": None}, range(1, 41, 2))
    script.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "+0.0 points" in said and "n = 380, 20 without a usable reply not counted; 0 fixed, 0 broken" in said


def test_tables_diagnosis_report_and_comparison_do_not_count_errors_as_losses(tmp_path, capsys):
    cell = Cell("textVQA", "big", "small")
    fake.run(tmp_path, "textVQA", "hub/big", "hub/small", [0, 1] * 200, [0, 1] * 200)
    answered_runs.write(tmp_path, [answered_runs.sample(0)])
    after = tmp_path / "Eval_PL_big_small_textVQA_textVQA.json"

    def lose(places) -> None:
        changed(after, lambda r: ERROR | {"scores": dict.fromkeys(r["scores"], 0.0)}, places)
        meta, found = json.loads(records.meta_path(after).read_text()), json.loads(after.read_text())
        meta["scores"]["textvqa"]["score"] = sum(r["scores"]["textvqa"] for r in found) / len(found)
        fake.write(records.meta_path(after), meta)

    lose(range(1, 41, 2))
    shown = python("tables.py", tmp_path, "--table", "main").stdout
    assert "| +0.0 |" in shown and "| 380 |" in shown and "errors, counted as wrong: 20 of 400 replies" in shown
    assert CellContent(tmp_path, cell).gain()["score"] == 0
    evaluate.main(["--compare", *map(str, (tmp_path / "Eval_small_textVQA.json", after))])
    assert "worse on 0 of 380" in capsys.readouterr().out
    evaluate.main(["--predictions", str(after)])
    assert "errors, counted as wrong: 20 of 400 replies (20 timed out)" in capsys.readouterr().out
    lose(range(1, 241, 2))
    shown = python("tables.py", tmp_path, "--table", "main").stdout
    assert "No gain: " in shown and "120 of 400 questions have no usable reply" in shown
    assert {f.name for f in diagnose(Case(tmp_path, cell))} >= {"not compared", "test replies without an answer"}
    assert CellContent(tmp_path, cell).gain() is None
    with pytest.raises(NotComparable, match="120 of 400 questions have no usable reply"):
        evaluate.main(["--compare", *map(str, (tmp_path / "Eval_small_textVQA.json", after))])
    assert "120 of 400" in python("checks.py", "sweep", tmp_path).stdout


# --- what must be equal ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"preset": "released"}, "preset was 'paper', is now 'released'"),
        ({"max_pixels": 3136}, "max_pixels was None, is now 3136"),
        ({"min_pixels": 1}, "min_pixels was None, is now 1"),
        ({"max_tiles": 4}, "max_tiles was None, is now 4"),
        ({"max_new_tokens": 4}, "max_new_tokens was 128, is now 4"),
        ({"dataset": "textVQA"}, "dataset was 'images', is now 'textVQA'"),
    ],
)
def test_other_settings_are_named_by_guard_and_tables(tmp_path, settings, said):
    held_out(tmp_path, {"small": HALF, MODEL: HALF})
    set_meta(answers(tmp_path, MODEL), **settings)
    with pytest.raises(NotComparable, match=said):
        script.main([str(tmp_path)])
    if "dataset" not in settings and "preset" not in settings:
        fake.run(tmp_path / "run", "textVQA", "big", "small", HALF, HALF)
        set_meta(tmp_path / "run/Eval_PL_big_small_textVQA_textVQA.json", **settings)
        shown = python("tables.py", tmp_path / "run", "--table", "main").stdout
        assert "No gain: " in shown and said in shown


def test_other_held_out_answers_are_refused_and_a_subset_is_told(tmp_path, capsys):
    held_out(tmp_path, {"small": HALF, MODEL: HALF})
    changed(answers(tmp_path, MODEL), {"answers": ["another"]}, [3])
    with pytest.raises(
        NotComparable, match=r"question 3 has the answers 'word 3 \(10 times\)' in the one file and 'another'"
    ):
        script.main([str(tmp_path)])
    held_out(tmp_path, {"small": HALF, MODEL: HALF})
    content = json.loads(answers(tmp_path, MODEL).read_text())
    fake.write(answers(tmp_path, MODEL), content[:40])
    script.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "n = 40;" in said and "of 40 questions that both evaluations asked; 60 are only in" in said
    fake.write(answers(tmp_path, MODEL), [r | {"GT_question": "another?"} for r in content])
    with pytest.raises(NotComparable, match=r"these are not the same questions \(100 of 100 differ\)"):
        script.main([str(tmp_path)])


def test_one_variant_that_cannot_be_compared_does_not_hide_the_others(tmp_path, capsys):
    held_out(tmp_path, {"small": HALF, MODEL: HALF, f"{MODEL}_anchors": [1] * 100})
    set_meta(answers(tmp_path, MODEL), max_pixels=1)
    script.main([str(tmp_path)])
    said = capsys.readouterr()
    assert "not compared" in said.err and f"Use {tmp_path / MODEL}_anchors" in said.out


def test_a_model_that_was_trained_again_is_not_judged_by_its_old_answers(tmp_path):
    held_out(tmp_path, {"small": HALF, MODEL: HALF})
    shutil.copytree(STUDENT, tmp_path / MODEL)
    set_meta(answers(tmp_path, MODEL), model=identity(str(tmp_path / MODEL)))
    script.main([str(tmp_path)])
    weights = tmp_path / MODEL / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        NotComparable, match="the weights of PL_big_small_okVQA have changed since it gave these answers"
    ):
        script.main([str(tmp_path)])
    weights.unlink()  # weights that are not here tell nothing
    script.main([str(tmp_path)])


def test_result_files_with_other_answers_are_not_compared_until_they_have_the_same(tmp_path, capsys):
    for name, change in (("ten", {}), ("one", {"answers": ["word"]}), ("released", {"answers": None})):
        path = fake.evaluation(tmp_path, name, "textVQA", [1] * 40)
        content = json.loads(path.read_text())
        fake.write(path, [r | change for r in content])
    files = {name: str(tmp_path / f"Eval_{name}_textVQA.json") for name in ("ten", "one", "released")}
    with pytest.raises(NotComparable, match=r"these are not the same right answers \(40 of 40 differ\).*--annotations"):
        evaluate.main(["--compare", files["ten"], files["one"]])
    evaluate.main(["--compare", files["ten"], files["released"]])  # one answer is scored as if all had given it
    assert "+0.0 points" in capsys.readouterr().out
    set_meta(Path(files["released"]), max_pixels=1)
    with pytest.raises(NotComparable, match="max_pixels was None, is now 1"):
        evaluate.main(["--compare", files["ten"], files["released"]])
    records.meta_path(files["released"]).unlink()
    evaluate.main(["--compare", files["ten"], files["released"]])
    assert "No meta file says how Eval_released_textVQA.json was made" in capsys.readouterr().out


# --- models and seeds ---


def test_trainings_of_different_models_with_one_short_name_are_no_seeds_of_a_row(tmp_path):
    for seed, path in enumerate(("one", "two")):
        fake.run(tmp_path / f"s-{path}", "textVQA", "hub/big", f"{path}/small", [0, 1] * 20, [1] * 40, seed=seed)
        fake.run(tmp_path / f"l-{path}", "okVQA", f"{path}/big", "hub/small", [0, 1] * 20, [1] * 40, seed=seed)
        digest = f"small@{seed:016x}"
        fake.run(tmp_path / f"d-{path}", "stVQA", "hub/big", "hub/small", [0, 1] * 20, [1] * 40, seed, model=digest)
        fake.evaluation(tmp_path / f"d-{path}", "hub/small", "stVQA", [0, 1] * 20, seed, model=digest)
        fake.run(tmp_path / f"x-{path}", "chartVQA", "hub/big", "hub/small", [0, 1] * 20, [1] * 40, seed=seed)
    found = {}
    for e in Runs([tmp_path]).groups:
        found.setdefault(e.cell.dataset, []).append((len(e.seeds), e.label))
    assert found["textVQA"] == [(1, "S-VLM one/small"), (1, "S-VLM two/small")]
    assert found["okVQA"] == [(1, "L-VLM one/big"), (1, "L-VLM two/big")]
    assert found["stVQA"] == [(1, f"S-VLM small@{seed:016x}") for seed in (0, 1)]
    assert found["chartVQA"] == [(2, "")]


def test_the_s_vlm_before_of_another_folder_must_be_the_one_that_was_trained(tmp_path):
    fake.run(tmp_path / "a", "textVQA", "big", "one/small", HALF, HALF)
    fake.parity(tmp_path / "b", "textVQA", "big", "two/small", 10, 100)
    fake.trained(tmp_path / "b", "textVQA", "big", "two/small", HALF, 10, seed=1)
    before = {t.after.path.parent.name: t.before for t in Runs([tmp_path]).trainings}
    assert before["a"] and before["b"] is None


# --- images that changed ---


def test_a_changed_held_out_image_is_not_scored_and_counted(serve, copied_images, tmp_path, capsys):
    server, run = serve(answers_by()), tmp_path / "run"
    annotate(server, copied_images, run)
    PI.main(flags(server, copied_images, run, "--hold-out", "0.4", svlm="small"))
    held = json.loads((run / "PI_big_heldout_images.json").read_text())
    path = held[0]["image_path"]
    about = sum(r["image_path"] == path for r in held)
    evaluate.main(flags(server, copied_images, run, "--model-path", "small", svlm=None))
    whole = json.loads((run / "Eval_small_images.json").read_text())
    assert [r["image_hash"] for r in whole] == [r["image_hash"] for r in held]
    Image.new("RGB", (50, 50), "blue").save(path)
    capsys.readouterr()
    evaluate.main(flags(server, copied_images, run, "--model-path", "after", svlm=None))
    found = {r["question_id"]: r for r in json.loads((run / "Eval_after_images.json").read_text())}
    assert found[held[0]["question_id"]]["left_out"] == "the image has changed since PI"
    assert found[held[0]["question_id"]]["predictions"] is None and len(found) == len(held)
    assert f"{about} the image has changed since PI" in capsys.readouterr().out
    sides = [Evaluation.read(run / f"Eval_{name}_images.json") for name in ("small", "after")]
    pairs = comparable.pairs(*sides)
    assert pairs.unusable == about and len(pairs.gains) == len(held) - about


def test_an_image_that_changed_between_two_evaluations_is_not_compared(tmp_path):
    held_out(tmp_path, {"small": HALF, MODEL: HALF})
    for model, places in (("small", range(100)), (MODEL, range(3, 100))):
        changed(answers(tmp_path, model), lambda r: {"image_hash": f"hash {r['question_id']}"}, places)
    changed(answers(tmp_path, MODEL), {"image_hash": "another"}, range(3))
    found = guard.Guard(tmp_path, CELL).compare("mpa")
    assert found.n == 97 and "3 questions are about images that have changed in between" in found.notes[0]


def test_copies_of_an_image_count_once(tmp_path):
    right = [1] * 18 + [0] * 69
    held_out(tmp_path, {"small": [0] * 87, MODEL: right})
    for model in ("small", MODEL):
        changed(answers(tmp_path, model), lambda r: {"image_hash": f"{r['question_id'] // 3}"}, range(87))
    found = guard.Guard(tmp_path, CELL).compare("mpa")
    assert (found.n, found.images) == (87, 29)
    assert found.interval == pytest.approx(guard.Comparison(29, 0, 6, 0).interval)


def test_a_missing_result_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        evaluate.main(["--compare", *map(str, (tmp_path / "Eval_a_textVQA.json", tmp_path / "Eval_b_textVQA.json"))])


@pytest.mark.parametrize("settings", [{"dataset": "otherVQA"}, {"preset": "own"}, {"model": None}, {"content": 7}])
def test_a_meta_file_that_is_not_an_evaluations_is_named(tmp_path, settings):
    file = fake.evaluation(tmp_path, "hub/small", "textVQA", [1])
    set_meta(file, **settings)
    with pytest.raises(InputError, match=r"Eval_small_textVQA\.meta\.json: not the meta file of an evaluation"):
        Evaluation.read(file)


@pytest.mark.parametrize("scores", [None, {}, {"score": 1.0}, {"score": None, "n": 1, "ci95": [1, 1]}])
def test_an_evaluation_without_its_score_is_named(tmp_path, scores):
    file = fake.evaluation(tmp_path, "hub/small", "textVQA", [1])
    meta = records.read_json(records.meta_path(file))
    fake.write(records.meta_path(file), meta | {"scores": {"textvqa": scores}})
    with pytest.raises(InputError, match=r"Eval_small_textVQA\.meta\.json: has no score by 'textvqa'"):
        Evaluation.read(file)


def test_the_report_names_what_it_does_not_compare(tmp_path):
    cells = []
    for name, ids in (("a", range(40)), ("b", range(20, 60))):
        fake.run(tmp_path / name, "textVQA", "hub/big", "hub/small", HALF[:40], [1] * 40)
        fake.trained(tmp_path / name, "textVQA", "hub/big", "hub/small", [1] * 40, 10, ids=list(ids))
        answered_runs.write(tmp_path / name, [answered_runs.sample(0)])
        cells.append(CellContent(tmp_path / name, Cell("textVQA", "big", "small")))
    (pair,) = compared(cells)
    assert pair["change"]["n"] == 20 and "of 20 questions that both evaluations asked" in pair["notes"][0]
    assert "of 20 questions that both" in compare_section(cells)[0]["table"]["notes"][0]
    set_meta(tmp_path / "b/Eval_PL_big_small_textVQA_textVQA.json", max_pixels=1)
    assert compared([cells[0], CellContent(tmp_path / "b", Cell("textVQA", "big", "small"))]) == []
    assert any("max_pixels was None, is now 1" in line for line in cells[0].differing)
