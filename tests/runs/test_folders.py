"""What is in a run folder: meta files say it, whatever the models are called. Names are parsed only where there is no meta file."""

import json
from pathlib import Path

import answered_runs
import pytest
import synthetic_runs as fake
from answered_runs import sample
from conftest import python

from mpa.analysis.guard import Guard
from mpa.analysis.report.content import CellContent
from mpa.files import records
from mpa.runs.folders import RunFolder, find
from mpa.runs.layout import Cell, RunFiles, parsed, reasons_path
from mpa.runs.trainings import Runs

SVLMS = [
    "small",
    "PL_big_small_okVQA",
    "a_train_b",
    "train_big_b",
    "okVQA",
    "s_textVQA",
    "s_textVQA_human",
    "mpa",
    "blind",
]
SVLMS += ["heldout-given", "scored-x", "PL_s", "2_s", "a+(b)[c]*", "s.meta", "s.reasons", "Qwen2vl7b", "images_PI_big"]
LVLMS = ["big_train_big", "big_okVQA", "PL_big", "a+(b)[c]*", "heldout"]
PAIRS = [*(("big", svlm) for svlm in SVLMS), *((lvlm, "PL_big_small_okVQA") for lvlm in LVLMS)]
RIGHT = {"before": [0, 1] * 40, "after": [1] * 80, "human": [0] * 80}


def whole(folder: Path, cell: Cell, older: bool = False) -> None:
    """A run of all stages with a baseline and the guard, with the meta files of this version or of an older one."""
    files = RunFiles(folder, cell)
    lvlm, svlm = f"hub/{cell.lvlm}", f"hub/{cell.svlm}"
    told = {} if older else {"dataset": cell.dataset}
    answered_runs.write(folder, [sample(i) for i in range(4)], cell, **told)
    for file, path in ((files.pa, lvlm), (files.lvlm_answers, lvlm), (files.svlm_answers, svlm)):
        meta = {"settings": {"dataset": cell.dataset, "model": f"{records.short_name(path)}@0"}, "model_path": path}
        fake.write(records.meta_path(file), meta | ({} if older or file == files.pa else {"model_path_lvlm": lvlm}))
    fake.write(files.train_for("human"), [])
    fake.write(files.held_out, [])
    fake.write(records.meta_path(files.held_out), {"settings": {"share": 0.15, "threshold": "1"}})
    fake.evaluation(folder, svlm, cell.dataset, RIGHT["before"])
    for variant, train in (("mpa", files.train), ("human", files.train_for("human"))):
        right = RIGHT["after" if variant == "mpa" else "human"]
        pl = {"data_path": [str(train)]}
        fake.trained(folder, cell.dataset, lvlm, svlm, right, 4, variant=variant, pl=pl)
    for model in (cell.svlm, files.levelled().name):
        for beside in (lambda file: file, records.meta_path):
            beside(files.guard_answers(model)).write_bytes(beside(files.evaluation(model)).read_bytes())


@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
@pytest.mark.parametrize(("lvlm", "svlm"), PAIRS)
def test_a_models_name_decides_nothing(tmp_path, lvlm, svlm, older):
    cell = Cell("textVQA", lvlm, svlm)
    whole(tmp_path, cell, older)
    assert RunFolder(tmp_path).cells == [cell]
    found = Runs([tmp_path])
    assert [(one.cell, one.ending) for one in found.parity] == [(cell, "")]
    assert sorted((t.cell, t.variant, t.before.model) for t in found.trainings) == [
        (cell, "human", svlm),
        (cell, "mpa", svlm),
    ]
    assert list(Guard(tmp_path, cell).variants) == ["mpa"]
    content = CellContent(tmp_path, cell)
    assert list(content.evaluations) == ["base", "mpa", "human"] and content.gain()["score"] == 0.5
    assert content.missing == [] and len(content.case.samples) == 4 and not content.broken
    train = RunFiles(tmp_path, cell)
    assert RunFolder(tmp_path).train_files("textVQA") == sorted([train.train, train.train_for("human")])


def test_the_table_of_an_s_vlm_that_was_levelled_on_another_dataset(tmp_path):
    whole(tmp_path / "a", Cell("okVQA", "big", "small"))
    whole(tmp_path / "b", Cell("textVQA", "big", "PL_big_small_okVQA"))
    done = python("tables.py", tmp_path, "--table", "main")
    rows = [line.split(" | ")[:6] for line in done.stdout.splitlines() if "| +50.0 |" in line]
    assert [row[0].strip("| ") + " " + row[2] for row in rows] == ["textVQA PL_big_small_okVQA", "okVQA small"]
    assert done.stderr == ""


def test_one_folder_with_several_cells_whose_names_begin_alike(tmp_path):
    cells = [Cell("textVQA", "big", "small"), Cell("textVQA", "big_2", "small")]
    cells += [Cell("textVQA", "big", "small_textVQA"), Cell("okVQA", "big", "small"), Cell("okVQA", "big", "small_x")]
    for cell in cells:
        whole(tmp_path, cell)
    assert RunFolder(tmp_path).cells == sorted(cells) == Runs([tmp_path]).cells
    for cell in cells:
        assert list(CellContent(tmp_path, cell).evaluations) == ["base", "mpa", "human"], cell
        assert list(Guard(tmp_path, cell).variants) == ["mpa"], cell


def test_a_run_that_was_moved_is_the_same(tmp_path):
    cell = Cell("textVQA", "big", "PL_big_small_okVQA")
    whole(tmp_path / "here", cell)
    (tmp_path / "here").rename(tmp_path / "there")
    assert [(t.cell, t.variant) for t in Runs([tmp_path]).trainings] == [(cell, "human"), (cell, "mpa")]


def test_a_training_with_an_odd_folder_is_known_by_the_trainers_meta_file(tmp_path):
    cell = Cell("textVQA", "big", "small")
    whole(tmp_path, cell)
    fake.write(
        tmp_path / "mine/train_meta.json", json.loads((tmp_path / "PL_big_small_textVQA/train_meta.json").read_text())
    )
    made = fake.evaluation(tmp_path, str(tmp_path / "mine"), "textVQA", RIGHT["after"])
    guarded = RunFiles(tmp_path, cell).guard_answers("mine")
    for beside in (lambda file: file, records.meta_path):
        beside(guarded).write_bytes(beside(made).read_bytes())
    assert Guard(tmp_path, cell).model("mine") == tmp_path / "mine" and Guard(tmp_path, cell).compare("mine").n == 80
    assert CellContent(tmp_path, cell).evaluations["mine"][1] == "mine"
    assert sorted(t.variant for t in Runs([tmp_path]).trainings) == ["human", "mine", "mpa"]


def test_the_cell_of_an_unfinished_run_is_that_of_its_answers(tmp_path):
    cell = Cell("textVQA", "big", "a_train_b")
    whole(tmp_path, cell)
    files = RunFiles(tmp_path, cell)
    for file in (files.train, files.train_for("human")):
        file.unlink()
    assert RunFolder(tmp_path).cells == [cell]
    files.svlm_answers.unlink()
    assert RunFolder(tmp_path).cells == [cell._replace(svlm="")]


def test_an_export_and_reasons_are_no_results(tmp_path):
    cell = Cell("textVQA", "big", "small")
    whole(tmp_path, cell)
    files = RunFiles(tmp_path, cell)
    for file in (files.train_for("llava"), tmp_path / "PI_big_train_big_mine_okVQA.json"):
        fake.write(file, [{"images": []}])
        fake.write(records.meta_path(file), {"kind": "export sharegpt"})
    fake.write(reasons_path(files.train), [])
    folder = RunFolder(tmp_path)
    assert folder.cells == [cell] and list(folder.parity) == [files.train.stem]
    assert folder.train_files("textVQA") == [files.train, files.train_for("human")]
    assert folder.train_files("okVQA") == []


def test_a_broken_meta_file_leaves_the_name(tmp_path):
    whole(tmp_path, Cell("textVQA", "big", "small"))
    for meta in tmp_path.glob("P*.meta.json"):
        meta.write_text("[")
    assert RunFolder(tmp_path).cells == [Cell("textVQA", "big", "small")]


@pytest.mark.parametrize(
    ("stem", "cell"),
    [
        ("PA_Qwen2vl7b_okVQA", Cell("okVQA", "Qwen2-VL-7B-Instruct")),
        ("PI_Qwen2vl7b_train_Qwen2-VL-7B-Instruct_s_1_okVQA", Cell("okVQA", "Qwen2-VL-7B-Instruct", "s_1")),
        ("PI_Qwen2vl7b_s_1_okVQA", Cell("okVQA", "Qwen2-VL-7B-Instruct", "s_1")),
        ("PI_big_train_big_PL_big_small_okVQA_textVQA", Cell("textVQA", "big", "PL_big_small_okVQA")),
        ("PI_a_train_b_train_a_train_b_s_okVQA", Cell("okVQA", "a_train_b", "s")),
        ("PI_big_2_small_okVQA", Cell("okVQA", "big_2", "small")),
        ("PI_big_a_train_b_okVQA", Cell("okVQA", "big", "a_train_b")),
        ("PI_big_heldout-given_okVQA", Cell("okVQA", "big")),
        ("PI_big_scored-small_okVQA", Cell("okVQA", "big")),
        ("PI_other_small_okVQA", None),
        ("PI_big_small_unknown", None),
        ("Eval_small_okVQA", None),
    ],
)
def test_names_without_a_meta_file(stem, cell):
    known = [Cell("okVQA", name) for name in ("big", "big_2", "Qwen2-VL-7B-Instruct")]
    assert parsed(stem, known) == cell


def test_a_folder_that_is_given_twice_is_read_once(tmp_path):
    whole(tmp_path / "a", Cell("textVQA", "big", "small"))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    paths = [folder.path for folder in find([tmp_path / "b", tmp_path]) if folder.cells]
    assert paths == [tmp_path / "b"]
