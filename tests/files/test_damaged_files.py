"""Journals, records, run names and model folders that are damaged are named."""

import json

import pytest
from conftest import STUDENT

from mpa.files.journal import Journal
from mpa.files.records import InputError, read_json, read_records, run_folder
from mpa.models import loading


@pytest.mark.parametrize(
    "lines",
    [
        ['{"settings": {}}', '{"key": "a", "te', '{"key": "b", "text": "x"}'],
        ['{"settings": {}}', '{"other": 1}'],
        ['{"settings": {}}', "\0\0\0"],
        ['{"settings": {}}', '{"key": 3, "text": "x"}'],
        ['{"settings": {}}', '{"key": "a", "text": 3}'],
        ['{"key": "a", "text": "x"}'],
        ["[" * 100_000],
        ["3"],
    ],
    ids=["torn", "foreign", "NUL", "key", "text", "no header", "deep", "number"],
)
def test_a_damaged_journal_is_named_with_its_line(tmp_path, lines):
    (tmp_path / "PA_a_b.journal.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"journal\.jsonl, line \d+: not a line of a journal"):
        Journal(tmp_path / "PA_a_b.json", {})


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    journal = Journal(tmp_path / "PA_a_b.json", {})
    journal.append([{"key": "a", "text": "x"}])
    assert "cannot be locked on this file system" in capsys.readouterr().err


PA_RECORD = {
    "question_id": 1,
    "image_path": "a.png",
    "ground_truth_question": None,
    "ground_truth_answer": None,
    "predicted_question": "q?",
    "predicted_answer": "a",
}


@pytest.mark.parametrize(
    "change",
    [
        {"follow_up": "text"},
        {"follow_up": {"text": 3}},
        {"reply": 3},
        {"question_id": None},
        {"question_id": float("inf")},
        {"question_id": True},
        {"predicted_question": 3},
        {"image_hash": 3},
    ],
    ids=str,
)
def test_a_record_of_another_shape_is_named(tmp_path, change):
    (tmp_path / "PA.json").write_text(json.dumps([PA_RECORD, PA_RECORD | {"question_id": 2} | change]))
    with pytest.raises(InputError, match=r"PA\.json, record 1: "):
        read_records(tmp_path / "PA.json", "PA")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "1" * 5000, "\0", "{", ""], ids=["deep", "long", "NUL", "cut", "empty"]
)
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("run", ["..", ".", "", "-x", "a" * 300, "a\nb", "x/" + "b" * 300, " "])
def test_a_run_is_given_a_name_that_will_do(run):
    with pytest.raises(InputError, match="give a short name"):
        run_folder(run)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"base_model_name_or_path": 3}', '{"base_model_name_or_path": "SELF"}']
)
def test_adapters_that_name_no_model_are_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content.replace("SELF", str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        loading.check_model_path(str(tmp_path))


def test_a_models_own_marks_are_read_from_its_files():
    marks = loading.format_marks(str(STUDENT))
    assert {"<|im_end|>", "<|image_pad|>", "<|vision_start|>"} <= marks
    assert marks <= loading.processor_marks(loading.load_processor(str(STUDENT), 3136, 3136)) | marks
