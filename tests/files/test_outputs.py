"""--out never overwrites what another command made, or a person; and may repeat what the same command made."""

import json
import os
import shutil

import pytest
from conftest import STUDENT, TEACHER, python, snapshot
from easy_run import EASY

from mpa.files.records import read_json

PA, LVLM = "PA_teacher_easyVQA.json", "PI_teacher_teacher_easyVQA.json"
SVLM, TRAIN = "PI_teacher_student_easyVQA.json", "PI_teacher_train_teacher_student_easyVQA.json"
EVAL = "Eval_student_easyVQA.json"
MODELS = ["--dataset", "easyVQA", "--model-path-lvlm", "teacher", "--model-path-svlm", "student"]


@pytest.fixture(scope="module")
def run(easy_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "run"
    shutil.copytree(easy_run, folder)
    (folder / "mine.txt").write_text("mine")
    (folder / "mine.json").write_text((folder / TRAIN).read_text())  # in our format, without a meta file
    (folder / "mine.jsonl").write_text("{}\n")
    (folder / "page").mkdir()
    (folder / "page/index.html").write_text("<html>mine</html>")
    (folder / "link.json").symlink_to(folder / SVLM)
    os.link(folder / SVLM, folder / "hard.json")
    return folder


COMMANDS = {
    "evaluate predictions": ["evaluate.py", "--predictions", EVAL, "--out"],
    "evaluate compare": ["evaluate.py", "--compare", EVAL, EVAL, "--out"],
    "export llava": ["export.py", TRAIN, "--to", "llava", "--out"],
    "export sharegpt": ["export.py", TRAIN, "--to", "sharegpt", "--out"],
    "export ms-swift": ["export.py", TRAIN, "--to", "ms-swift", "--out"],
    "PI": ["PI.py", *MODELS, "--lvlm-json", LVLM, "--svlm-json", SVLM, "--restart", "--out"],
    "PA": ["PA.py", *EASY, "--limit", "2", "--model-path-lvlm", str(TEACHER), "--restart", "--out"],
    "evaluate": ["evaluate.py", *EASY, "--limit", "2", "--model-path", str(STUDENT), "--restart", "--out"],
    "tables": ["tables.py", ".", "--out"],
    "checks": ["checks.py", "coverage", ".", "--out"],
    "corrupt": [
        *("corrupt.py", "--dataset", "easyVQA", "--train-json", TRAIN, "--lvlm-json", LVLM, "--svlm-json", SVLM),
        *("--type", "color", "--share", "0.3", "--out"),
    ],
    "report": ["report.py", ".", "--single-file", "--out"],
}
OWN = {"PI": TRAIN, "PA": PA, "evaluate": EVAL}  # --restart may replace these
OTHERS = [
    PA,
    LVLM,
    SVLM,
    TRAIN,
    EVAL,
    "mine.txt",
    "mine.json",
    "mine.jsonl",
    "link.json",
    "hard.json",
    f"./{SVLM}",
    "log.txt",
]
OTHERS += ["PA_teacher_easyVQA.meta.json", f"../run/{SVLM}"]


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_overwrites_what_another_made(run, name, monkeypatch):
    monkeypatch.chdir(run)
    script, *arguments = COMMANDS[name]
    before = snapshot(run)
    for other in OTHERS:
        if other == OWN.get(name):
            continue
        refused = python(script, *arguments, other)
        assert refused.returncode in (1, 2), (other, refused.stdout, refused.stderr)
        assert "Traceback" not in refused.stderr and os.path.basename(other)[:3] in refused.stderr, refused.stderr
        assert snapshot(run) == before, other


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in OWN])
def test_the_same_command_may_write_its_result_again(run, name, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    script, *arguments = COMMANDS[name]
    out = tmp_path / ("out.md" if name in ("tables", "checks") else "out.json")
    for _ in range(2):
        done = python(script, *arguments, out)
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for another in COMMANDS:
        if another not in (*OWN, name):
            script, *arguments = COMMANDS[another]
            content = out.read_bytes()
            assert python(script, *arguments, out).returncode == 1, another
            assert out.read_bytes() == content


def test_a_meta_file_is_never_replaced_by_that_of_a_file_with_another_ending(run, monkeypatch):
    monkeypatch.chdir(run)
    before = (run / "PA_teacher_easyVQA.meta.json").read_bytes()
    refused = python("export.py", TRAIN, "--to", "ms-swift", "--out", "PA_teacher_easyVQA.jsonl")
    assert refused.returncode == 1 and "belongs to a file of another command" in refused.stderr
    done = python("tables.py", ".", "--out", "PA_teacher_easyVQA.md")
    assert done.returncode == 0 and read_json("PA_teacher_easyVQA.md.meta.json")["kind"] == "tables"
    assert (run / "PA_teacher_easyVQA.meta.json").read_bytes() == before


def test_a_page_of_another_is_left_alone_and_ours_is_made_anew(run, monkeypatch, tmp_path):
    monkeypatch.chdir(run)
    refused = python("report.py", ".", "--out", "page")
    assert refused.returncode == 1 and "index.html: exists" in refused.stderr
    assert (run / "page/index.html").read_text() == "<html>mine</html>"
    assert [python("report.py", ".", "--out", tmp_path / "new").returncode for _ in range(2)] == [0, 0]


def test_baselines_do_not_overwrite_a_parity_set_with_such_a_name(run, easy_run, monkeypatch, tmp_path):
    for file in (PA, TRAIN):
        for path in (run / file, run / file.replace(".json", ".meta.json")):
            shutil.copy(path, tmp_path)
    human = TRAIN.replace(".json", "_human.json")
    for ending in (".json", ".meta.json"):
        shutil.copy(run / TRAIN.replace(".json", ending), tmp_path / human.replace(".json", ending))
    command = ["baselines.py", "--pa-json", tmp_path / PA, "--train-json", tmp_path / TRAIN]
    before = snapshot(tmp_path)
    refused = python(*command)
    assert refused.returncode == 1 and f"{human}: " in refused.stderr
    assert snapshot(tmp_path) == before
    for ending in (".json", ".meta.json"):
        (tmp_path / human.replace(".json", ending)).unlink()
    assert [python(*command).returncode for _ in range(2)] == [0, 0]


def test_exports_in_the_run_folder_are_no_parity_sets(run, monkeypatch, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    monkeypatch.chdir(tmp_path / "run")
    before = python("tables.py", ".").stdout
    for to in ("llava", "sharegpt", "ms-swift"):
        assert python("export.py", TRAIN, "--to", to).returncode == 0
        assert python("export.py", TRAIN, "--to", to).returncode == 0
    assert python("tables.py", ".").stdout == before
    assert (
        json.loads((tmp_path / "run" / TRAIN.replace(".json", "_llava.meta.json")).read_text())["kind"]
        == "export llava"
    )
