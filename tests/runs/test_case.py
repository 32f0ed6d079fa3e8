"""PI's verdict on each sample of a run, and what changed between two evaluations."""

import json
from pathlib import Path

import answered_runs
import pytest
import synthetic_runs as fake
from answered_runs import CELL, sample, word

from mpa.files.records import InputError
from mpa.runs.case import Case
from mpa.runs.comparable import changes
from mpa.runs.evaluations import Evaluation
from mpa.runs.folders import RunFolder, find
from mpa.runs.layout import Cell

SAMPLES = [
    sample(0),
    sample(1, lvlm="else", svlm=None),
    sample(2, svlm=word(2)),
    sample(3, left_out="refusal", annotation=""),
    sample(4, finish_reason="length", svlm=None),
    sample(5, svlm=None),
]


def test_each_sample_has_the_reason_of_its_verdict(tmp_path):
    answered_runs.write(tmp_path, SAMPLES)
    found = Case(tmp_path, CELL).samples
    assert [s.reason for s in found] == [
        "parity",
        "L-VLM disagrees",
        "both right",
        "no usable annotation",
        "L-VLM's reply cut",
        "S-VLM not asked",
    ]
    assert found[0].kept and found[0].svlm_answer == "wrong" and found[0].lvlm_logprob == -0.5
    assert found[1].detail == "it answers 'else'" and found[3].detail == "refusal"


def test_held_out_samples_are_told(tmp_path):
    answered_runs.write(tmp_path, [sample(0), sample(1, svlm=None)], held_out="held.json")
    fake.write(tmp_path / "held.json", [{"question_id": 1}])
    assert [s.reason for s in Case(tmp_path, CELL).samples] == ["parity", "held out"]


def test_an_unfinished_run_says_what_is_not_there(tmp_path):
    train = answered_runs.write(tmp_path, SAMPLES)
    train.unlink()
    (tmp_path / "PI_big_small_textVQA.json").unlink()
    run = Case(tmp_path, CELL)
    assert [path.name for path in run.missing] == ["PI_big_small_textVQA.json", train.name]
    assert run.samples[0].reason == "not reached yet" and run.samples[1].reason == "L-VLM disagrees"
    with pytest.raises(InputError, match=r"PA_other_textVQA.json: no such file. Run PA.sh first"):
        _ = Case(tmp_path, Cell("textVQA", "other", "small")).samples


def test_cells_are_found_by_file_names_also_released_and_unfinished_ones(tmp_path):
    answered_runs.write(tmp_path / "a", SAMPLES)
    released = tmp_path / "b"
    for name in ("PA_Qwen2vl7b_okVQA", "PI_Qwen2vl7b_train_Qwen2-VL-7B-Instruct_tiny_chartVQA", "PA_new_textVQA"):
        fake.write(released / f"{name}.json", [])
    fake.write(tmp_path / "c/notes.json", [])
    assert [folder.path for folder in find([tmp_path]) if folder.cells] == [tmp_path / "a", released]
    assert RunFolder(tmp_path / "a").cells == [CELL]
    assert RunFolder(released).cells == [
        Cell("chartVQA", "Qwen2-VL-7B-Instruct", "tiny"),
        Cell("okVQA", "Qwen2-VL-7B-Instruct", ""),
        Cell("textVQA", "new", ""),
    ]


def test_verdicts_of_a_real_run_add_up_to_its_funnel(easy_run):
    folder = Path(easy_run)
    (cell,) = RunFolder(folder).cells
    run = Case(folder, cell)
    funnel = json.loads(run.train_json.with_suffix(".meta.json").read_text())["funnel"]
    assert sum(s.kept for s in run.samples) == funnel["parity"] > 0
    assert sum(s.reason in ("parity", "both right") for s in run.samples) == funnel["L-consistent"]


def test_changes_between_two_evaluations(tmp_path):
    before, after = (
        Evaluation.read(fake.evaluation(tmp_path, name, "okVQA", right))
        for name, right in (("a", [0, 1, 0, 1]), ("b", [1, 0, 0, 1]))
    )
    assert [c.kind for c in changes(before, after)] == ["fixed", "broken", "still wrong", "still right"]
