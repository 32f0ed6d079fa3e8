"""A stage that was killed, stopped, or called again: the same bytes, on the embedded pair."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, STUDENT, TEACHER, killed, python
from easy_run import OUTPUTS, STAGES, read


def interrupted(stage: str, easy_run, folder):
    """The content of a stage's files after three kills and an undisturbed call."""
    for before in OUTPUTS["PA"]:
        if stage == "PI":
            shutil.copy(easy_run / f"{before}.json", folder)
    for replies in (1, 17, 33):
        killed(*STAGES[stage], "--run", f"{folder}/", replies=replies)
        assert list(folder.glob("*.journal.jsonl"))
    done = python(*STAGES[stage], "--run", f"{folder}/")
    assert done.returncode == 0, done.stderr
    return {name: (folder / f"{name}.json").read_bytes() for name in OUTPUTS[stage]}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_three_places_and_called_again_the_bytes_are_the_same(easy_run, tmp_path, stage):
    for name, content in interrupted(stage, easy_run, tmp_path).items():
        assert content == (easy_run / f"{name}.json").read_bytes(), name
    assert not list(tmp_path.glob("*.journal.jsonl"))
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_ends_at_once_with_a_word_on_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts/PA.py"),
        *STAGES["PA"][1:],
        "--limit",
        "4000",
        "--run",
        f"{tmp_path}/",
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # what runs the tests may ignore it
    )
    while process.poll() is None and sum(p.read_bytes().count(b"\n") for p in tmp_path.glob("*.jsonl")) < 9:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "stopped. Run the same command again to go on."
    assert "Traceback" not in said


def test_a_model_trained_anew_in_the_same_folder_is_another_model(easy_run, tmp_path):
    model = tmp_path / "student"
    shutil.copytree(STUDENT, model)
    command = [str(model) if argument == str(STUDENT) else argument for argument in STAGES["evaluate"]]
    assert python(*command, "--run", f"{tmp_path}/").returncode == 0
    (model / "train_log.json").write_text("{}")  # says nothing about the model
    assert "already exists" in python(*command, "--run", f"{tmp_path}/").stdout
    shutil.copy(TEACHER / "model.safetensors", model)
    other = python(*command, "--run", f"{tmp_path}/")
    assert other.returncode == 1
    assert "model was 'student@" in other.stderr


def test_a_restart_that_is_killed_does_not_bring_the_old_result_back(easy_run, tmp_path):
    shutil.copytree(easy_run, tmp_path, dirs_exist_ok=True)
    command = [*STAGES["evaluate"], "--preset", "released", "--restart"]
    killed(*command, "--run", f"{tmp_path}/", replies=10)
    assert not (tmp_path / "Eval_student_easyVQA.json").exists()
    assert not (tmp_path / "Eval_student_easyVQA.meta.json").exists()
    assert python(*command[:-1], "--run", f"{tmp_path}/").returncode == 0
    assert read(tmp_path / "Eval_student_easyVQA.meta.json")["settings"]["preset"] == "released"


def test_answers_that_were_edited_are_not_taken_for_those_that_were_asked_about(easy_run, tmp_path):
    shutil.copytree(easy_run, tmp_path, dirs_exist_ok=True)
    annotations = read(tmp_path / "PA_teacher_easyVQA.json")
    next(r for r in annotations if r["predicted_answer"])["predicted_answer"] = "nothing"
    (tmp_path / "PA_teacher_easyVQA.json").write_text(json.dumps(annotations))
    done = python(*STAGES["PI"], "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    assert "was made from other answers; it is made anew" in done.stdout
    for name in OUTPUTS["PI"][:2]:
        records = read(tmp_path / f"{name}.json")
        assert sum(r["PA_answer"] == "nothing" for r in records) == 1
        assert [r["predictions"] for r in records] == [r["predictions"] for r in read(easy_run / f"{name}.json")]


def test_a_second_call_says_that_all_is_done_and_other_settings_are_refused(easy_run):
    before = (easy_run / "PA_teacher_easyVQA.json").stat()
    again = python(*STAGES["PA"], "--run", f"{easy_run}/")
    assert again.returncode == 0
    assert "already exists" in again.stdout
    assert (easy_run / "PA_teacher_easyVQA.json").stat().st_mtime_ns == before.st_mtime_ns
    other = python(*STAGES["PA"], "--run", f"{easy_run}/", "--seed", "5")
    assert other.returncode == 1
    assert "seed was 0, is now 5" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_ends_in_a_message_and_nothing_finished_is_lost(easy_run, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        full = python(*STAGES["PA"], "--run", f"{small}/")
        assert full.returncode == 1
        assert "no space left" in full.stderr
        assert "Traceback" not in full.stderr
        kept = (small / "PA_teacher_easyVQA.journal.jsonl").read_text().splitlines()
        assert len(kept) > 1
        assert [json.loads(line) for line in kept]
        subprocess.run(["mount", "-o", "remount,size=1m", small], check=True)
        assert python(*STAGES["PA"], "--run", f"{small}/").returncode == 0
        assert (small / "PA_teacher_easyVQA.json").read_bytes() == (easy_run / "PA_teacher_easyVQA.json").read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
