"""Result files of any maker: what is read, what is refused, what is not compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from conftest import ROOT
from test_interchange import OFFICIAL, RESULT

from mpa.files.records import InputError, read_json, read_records
from mpa.runs import comparable
from mpa.runs.evaluations import Evaluation
from mpa.stages.predictions import read_predictions


def test_a_released_result_file_takes_all_ten_answers_from_the_annotations(tmp_path):
    eval_file = OFFICIAL / "Eval_Qwen2-VL-2B-Instruct_textVQA.json"
    released = read_json(eval_file)
    data = [
        {"question_id": r["question_id"], "image_id": "x", "question": r["GT_question"], "answers": ["?"] * 9 + ["!"]}
        for r in released
    ]
    (tmp_path / "val.json").write_text(json.dumps({"data": data}))
    args = evaluate.arguments(["--predictions", str(eval_file), "--annotations", str(tmp_path / "val.json")])
    assert args.dataset == "textVQA"
    assert all(r["answers"][-1] == "!" for r in read_predictions(args, eval_file))
    data[0]["question"] = "what else?"
    (tmp_path / "val.json").write_text(json.dumps({"data": data}))
    with pytest.raises(InputError, match="these are not the same questions"):
        read_predictions(args, eval_file)
    (tmp_path / "val.json").write_text(json.dumps({"data": data[1:]}))
    with pytest.raises(InputError, match=r"questions are in the annotation file\. Is it of another dataset"):
        read_predictions(args, eval_file)


def test_files_of_other_questions_with_the_same_ids_are_not_compared():
    other = [{**r, "GT_question": "how few?"} for r in RESULT]
    with pytest.raises(InputError, match="question 0 is 'how many\\?' in the one file and 'how few\\?' in the other"):
        comparable.compare(
            *(Evaluation.of(Path(name), r, "chartVQA", "paper") for name, r in (("a", RESULT), ("b", other)))
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answers": "12"}, "'answers' should be a list of text"),
        ({"answers": ""}, "'answers' should be a list of text"),
        ({"answers": {}}, "'answers' should be a list of text"),
        ({"answers": [True]}, "'answers' should be a list of text"),
        ({"raw_answers": [["x"]]}, "'raw_answers' should be a list of text"),
        ({"type": ["human"]}, "'type' should be str or null"),
        ({"left_out": {"why": 1}}, "'left_out' should be str or null"),
        ({"question_id": None}, "'question_id' should be text or a whole number"),
        ({"question_id": [1]}, "'question_id' should be text or a whole number"),
        ({"question_id": float("inf")}, "'question_id' is inf"),
        ({"question_id": True}, "'question_id' should be text or a whole number"),
    ],
)
def test_a_result_file_of_another_shape_is_named(tmp_path, change, says):
    (tmp_path / "Eval_a_chartVQA.json").write_text(json.dumps([RESULT[0], {**RESULT[1], **change}]))
    with pytest.raises(InputError, match=f"record 1: {says}"):
        read_records(tmp_path / "Eval_a_chartVQA.json", "Eval")


def test_result_files_without_labels_are_refused_with_their_count(tmp_path):
    file = tmp_path / "Eval_a_textVQA.json"
    file.write_text(json.dumps([RESULT[0], *({**r, "answers": [""] * 10, "GT_answer": ""} for r in RESULT[1:])]))
    args = evaluate.arguments(["--predictions", str(file)])
    with pytest.raises(InputError, match="record 1: no answer to score against; 2 more of 4"):
        read_predictions(args, file)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("20250101_120000_samples_chartqa.jsonl", "chartVQA"),
        ("samples_textvqa_val.jsonl", "textVQA"),
        ("20250101_120000_samples_ok_vqa_val2014_lite.jsonl", "okVQA"),
        ("20260102_030405_samples_stvqa.jsonl", "stVQA"),
        ("Eval_PL_a_b_textVQA_chartVQA.json", "chartVQA"),
    ],
)
def test_a_files_name_tells_the_data_set_with_lmms_evals_date_before_it(name, dataset):
    assert evaluate.arguments(["--predictions", f"some/textvqa.d/{name}"]).dataset == dataset


def test_files_of_two_data_sets_are_not_compared(capsys):
    for names in (("samples_mmmu_val.jsonl", "x.json"), ("Eval_a_textVQA.json", "samples_chartqa.jsonl")):
        with pytest.raises(SystemExit):
            evaluate.arguments(["--compare", *names])
    assert "the files are from several datasets: chartVQA, textVQA" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_quietly(unbuffered):
    command = (
        f"{sys.executable} {ROOT}/scripts/evaluate.py --predictions {OFFICIAL}/Eval_Qwen2-VL-2B-Instruct_textVQA.json"
    )
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert (done.returncode, done.stderr) == (141, "")
