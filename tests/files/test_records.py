import json
import os

import pytest
from conftest import DATA

from mpa.files.records import InputError, read_json, read_records, run_folder, short_name, write_json
from mpa.runs.layout import Cell, RunFiles


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "empty"), ("[1, 2", "not JSON"), ('{"a": 1}', "expected a list"), ('[{"question_id": 1}]', "no field")],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, content, says):
    path = tmp_path / "PA.json"
    path.write_text(content)
    with pytest.raises(InputError, match=says) as error:
        read_records(path, "PA")
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_json(tmp_path / "x.json")


def test_an_id_twice_is_refused_even_as_text_and_number(tmp_path):
    record = {
        "id": 1,
        "image": "a.png",
        "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}],
    }
    write_json(tmp_path / "t.json", [record, {**record, "id": "1"}])
    with pytest.raises(InputError, match="records 0 and 1 have the same id, '1'"):
        read_records(tmp_path / "t.json", "train")


def test_the_released_files_read():
    for path in (DATA / "official").glob("*.json"):
        name = path.name
        kind = "train" if "_train_" in name else name.split("_")[0]
        assert read_records(path, kind)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


def test_names():
    assert short_name("Qwen/Qwen2-VL-2B-Instruct") == short_name("/models/Qwen2-VL-2B-Instruct/")
    assert run_folder("today").parts[-2:] == ("results", "today")
    assert str(run_folder("/elsewhere/today")) == "/elsewhere/today"


def test_the_released_name_of_the_lvlm_is_an_alias_when_reading():
    files = RunFiles(DATA / "official", Cell("textVQA", "Qwen2-VL-7B-Instruct"))
    assert files.needed(files.pa, "--pa-json", "PA.sh").name == "PA_Qwen2vl7b_textVQA.json"
    files = RunFiles(DATA / "official", Cell("stVQA", "Qwen2-VL-7B-Instruct"))
    with pytest.raises(InputError, match=r"Run PA.sh first, or name the file with --pa-json"):
        files.needed(files.pa, "--pa-json", "PA.sh")
