"""What the trainer's bash scripts launch."""

import gc
import os
import sys
from pathlib import Path

import launch
import params
import pytest
import torch
from conftest import STUDENT, bash

from mpa.models.gpus import Gpu


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """`launched(SCRIPT, FLAGS…, gpus, bf16, VARIABLE=…)`: the command that a script starts, with mocked GPUs; nothing runs.

    The first word is "here" for a training in the launcher's own process, "torchrun", or "deepspeed".
    """
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    ask = f'[[ $* != *mpa.runs.layout* ]] || exec {sys.executable} "$@"\n'  # where the files of a run are
    python.write_text(f'#!/bin/bash\n{ask}printf "%s\\n" "$ZERO" "$@"\n')
    python.chmod(0o755)
    seen = []

    def started(name):
        def start(*_, **__):
            seen[:] = [name, *sys.argv]
            raise SystemExit

        return start

    def deepspeed(name, command):
        seen[:] = command
        raise SystemExit

    def run(name: str = "PL.sh", *flags, gpus: int = 1, bf16: bool = True, environ=None, **variables) -> list[str]:
        done = bash(f"PL/Qwen2-VL-Finetune/scripts/{name}", *flags, VENV=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
        configuration, *command = done.stdout.splitlines()
        environ = {} if environ is None else environ  # of the launcher, which changes it
        environ |= {**os.environ, **{key: str(value) for key, value in variables.items()}, "ZERO": configuration}
        seen.clear()
        with monkeypatch.context() as mocked, pytest.raises(SystemExit):
            mocked.setattr(launch.runpy, "run_path", started("here"))
            mocked.setattr(launch, "run_ranks", started("torchrun"))
            mocked.setattr(os, "execvp", deepspeed)
            mocked.setattr(os, "environ", environ)
            mocked.setattr(launch.gpus, "usable", lambda: (Gpu("T4", "GPU-1", (8 if bf16 else 7, 5)),) * gpus)
            mocked.setattr(torch, "set_num_threads", lambda count: None)
            mocked.setattr(sys, "argv", command)
            sys.exit(launch.main())
        gc.enable()
        return [*seen]

    return run


def flag_value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_script_trains_in_bfloat16_only_where_the_gpu_has_it(launched, monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS")
    (tmp_path / "config.json").write_text('{"model_type": "smolvlm"}')
    new, old = launched(environ=(environ := {}), gpus=2), launched(bf16=False, SVLM=tmp_path)
    assert environ["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert ("--bf16" in new, "--fp16" in new) == (True, False)
    assert ("--bf16" in old, "--fp16" in old) == (False, True)
    assert flag_value(old, "--fp16") == "True"
    chosen = launched("PL.sh", "--bf16", "True", bf16=False, SVLM=tmp_path)  # by the user, who is not contradicted
    assert flag_value(chosen, "--bf16") == "True" and "--fp16" not in chosen
    overflowing = launched(bf16=False, SVLM=STUDENT)  # Qwen2-VL's family: in float32
    assert not {"--bf16", "--fp16", "--use_cpu"} & set(overflowing) and "--deepspeed" in overflowing
    assert new[0] == "torchrun" and flag_value(new, "--nproc_per_node") == "gpu"
    assert Path(flag_value(new, "--deepspeed")).name == "zero2.json"


def test_two_trainings_on_one_machine_do_not_share_a_port(launched):
    assert "--standalone" in launched()  # torchrun takes one that is free
    machines = launched(NNODES=2, MASTER_ADDR="there", MASTER_PORT=4321)
    assert "--standalone" not in machines and flag_value(machines, "--master_port") == "4321"


def test_machines_of_a_hostfile_are_deepspeeds_to_reach_by_flag_or_environment(launched):
    by_flag = launched("PL.sh", "--hostfile", "/a b/hosts", "--seed", "3")
    by_name = launched("PL.sh", "--seed", "3", HOSTFILE="/a b/hosts")
    for words in (by_flag, by_name):
        assert words[0] == "deepspeed"
        assert words.index("--hostfile") < words.index("--deepspeed")
        assert (flag_value(words, "--hostfile"), words[-2:]) == ("/a b/hosts", ["--seed", "3"])
    assert len(by_flag) == len(by_name)


def test_one_process_on_a_cpu_trains_without_deepspeed_and_several_with_it(launched, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    environ, cores = {}, len(os.sched_getaffinity(0))
    alone = launched(gpus=0, environ=environ)
    assert alone[:2] == ["here", launch.TRAINER] and "--deepspeed" not in alone
    assert (flag_value(alone, "--use_cpu"), environ["OMP_NUM_THREADS"]) == ("True", str(cores))
    two = launched(gpus=0, environ=(environ := {}), CPU_PROCESSES=2)
    assert two[0] == "torchrun" and flag_value(two, "--nproc_per_node") == "2"
    assert Path(flag_value(two, "--deepspeed")).name == "zero2.json"
    assert environ["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    resumed = launched("PL.sh", "--deepspeed", "zero2.json", gpus=0)
    assert resumed[0] == "torchrun" and resumed[-1] == "zero2.json"


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CPU_PROCESSES": "two"}, "CPU_PROCESSES is two: give a whole number above 0"),
        ({"CPU_PROCESSES": 0}, "CPU_PROCESSES is 0: give a whole number above 0"),
        ({"NPROC_PER_NODE": 0}, "NPROC_PER_NODE is 0: give a whole number above 0"),
        ({"SHUTDOWN_TIMEOUT": "1h"}, "SHUTDOWN_TIMEOUT is 1h: give a whole number"),
        ({"ZERO": "zero9"}, "zero9.json: no such configuration of DeepSpeed"),
    ],
)
def test_a_wrong_number_of_processes_or_configuration_is_named(variables, why):
    done = bash("PL/Qwen2-VL-Finetune/scripts/PL.sh", **variables)
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr


def test_more_processes_than_gpus_are_refused_with_both_numbers(launched, capsys):
    assert flag_value(launched(gpus=4, NPROC_PER_NODE=4), "--nproc_per_node") == "4"
    assert launched(gpus=4, NPROC_PER_NODE=8) == []
    assert "error: 8 processes take a GPU each, and 4 can be used here" in capsys.readouterr().err


def test_a_stage_in_more_processes_than_gpus_is_refused_with_both_numbers(monkeypatch, capsys):
    """`GPUS=8 bash scripts/PA.sh` calls this; without a GPU the processes share the CPU."""
    monkeypatch.setattr(sys, "argv", ["launch.py", "--standalone", "--nproc-per-node", "8", "--", "scripts/PA.py"])
    monkeypatch.setattr(launch, "run_ranks", lambda: 0)
    for gpus, code in ((4, 2), (8, 0), (0, 0)):
        monkeypatch.setattr(launch.gpus, "usable", lambda gpus=gpus: (Gpu("T4", "GPU-1", (7, 5)),) * gpus)
        assert launch.main() == code
    assert "error: 8 processes take a GPU each, and 4 can be used here" in capsys.readouterr().err


def test_the_script_takes_its_paths_from_the_environment(launched):
    words = launched(TRAIN_JSON="/a b/train.json", OUTPUT_DIR="/a b/out")
    assert flag_value(words, "--data_path") == "/a b/train.json"
    assert flag_value(words, "--output_dir") == "/a b/out"


@pytest.mark.parametrize("name", ["PL.sh", "finetune.sh", "finetune_lora.sh", "finetune_lora_vision.sh"])
def test_every_script_gives_flags_that_the_trainer_takes(launched, name):
    words = launched(name, DATA="a.json:0.9 b.json:0.1", MODEL="m", OUTPUT_DIR="out")
    flags = words[words.index(next(word for word in words if word.endswith("train.py"))) + 1 :]
    assert flags[0] == "--deepspeed" and Path(flags[1]).is_file()
    model, images, _ = params.parse(["--use_cpu" if flag == "--bf16" else flag for flag in flags[2:]])
    assert (model.lora_enable, model.vision_lora) == ("lora" in name, "vision" in name)
    assert name == "PL.sh" or images.data_path == ["a.json:0.9", "b.json:0.1"]
