"""Several processes that share a stage write what one would."""

import json
import os
import subprocess
import sys

import pytest
from accelerate import PartialState
from conftest import ROOT, python
from easy_run import OUTPUTS, STAGES, read
from training import free_port

from mpa.files import distributed


def launch(folder, *command) -> subprocess.CompletedProcess:
    """`accelerate launch` with two processes, in a process group of their own."""
    flags = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split(), *command, "--run", f"{folder}/"]
    return subprocess.run(command, capture_output=True, text=True, start_new_session=True)


@pytest.mark.slow
def test_two_processes_share_a_stage_and_write_what_one_would(easy_run, tmp_path):
    """Killed during the run, and then run again."""
    name, *arguments = STAGES["PA"]
    stopped = launch(tmp_path, ROOT / "tests/killed_stage.py", "4", name, *arguments)
    assert stopped.returncode != 0 and list(tmp_path.glob("*.journal*.jsonl")), stopped.stderr
    whole = launch(tmp_path, ROOT / "scripts" / name, *arguments)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("images annotated") == 1
    (output,) = OUTPUTS["PA"]
    assert (tmp_path / f"{output}.json").read_bytes() == (easy_run / f"{output}.json").read_bytes()
    assert not list(tmp_path.glob("*.journal*.jsonl"))
    name, *arguments = STAGES["PI"]
    parity = launch(tmp_path, ROOT / "scripts" / name, *arguments)  # the L-VLM's answers are there
    assert parity.returncode == 0, parity.stderr
    for output in OUTPUTS["PI"]:
        assert (tmp_path / f"{output}.json").read_bytes() == (easy_run / f"{output}.json").read_bytes()


def share(stage: str, folder, rank: int) -> int:
    """A fork of this process as one of two that share a stage -> its id. It ends with the stage's exit code."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        PartialState._reset_state()
        distributed.RANK, distributed.WORLD, distributed.FIRST = rank, 2, rank == 0
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        done = python(*STAGES[stage], "--run", f"{folder}/")
        (folder / f"said.{rank}").write_text(done.stdout + done.stderr)
        code = done.returncode
    finally:
        os._exit(code)


def test_two_forked_processes_share_the_stages_and_write_what_one_would(easy_run, tmp_path, monkeypatch):
    places = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for stage in STAGES:
        for name, value in {**places, "MASTER_PORT": free_port()}.items():
            monkeypatch.setenv(name, value)
        processes = [share(stage, tmp_path, rank) for rank in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("said.*")]
        for name in OUTPUTS[stage]:
            assert (tmp_path / f"{name}.json").read_bytes() == (easy_run / f"{name}.json").read_bytes()
        assert not list(tmp_path.glob("*.journal*.jsonl"))


def test_a_run_that_several_began_one_finishes_alone(easy_run, tmp_path):
    settings = read(easy_run / "Eval_student_easyVQA.meta.json")["settings"]
    answers = {str(r["question_id"]): r for r in read(easy_run / "Eval_student_easyVQA.json")}
    for rank, keys in (("", list(answers)[:3]), ("-1", list(answers)[3:5]), ("-7", list(answers)[5:6])):
        replies = [
            {"key": k, "text": answers[k]["predictions"], "logprob": answers[k]["logprob"], "tokens": 2} for k in keys
        ]
        lines = [json.dumps(line) + "\n" for line in ({"settings": settings}, *replies)]
        (tmp_path / f"Eval_student_easyVQA.journal{rank}.jsonl").write_text("".join(lines) + '{"torn')
    done = python(*STAGES["evaluate"], "--run", f"{tmp_path}/")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "Eval_student_easyVQA.json").read_bytes() == (
        easy_run / "Eval_student_easyVQA.json"
    ).read_bytes()
    assert not list(tmp_path.glob("*.journal*.jsonl"))
