"""The bash scripts: they pass signals to their commands, and select each engine's Python."""

import os
import signal
import subprocess
import time

import pytest
from conftest import ROOT, STUDENT, TEACHER
from training import MINI as TRAINER_FLAGS
from training import write

SETTINGS = {"LVLM": TEACHER, "SVLM": STUDENT, "DATASET": "easyVQA", "DTYPE": "float32", "BATCH_SIZE": 4}
SETTINGS |= {"MIN_PIXELS": 3136, "MAX_PIXELS": 3136}
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def start(name, *args, **environment) -> subprocess.Popen:
    """Start in a new session, as from a terminal: a shell's background job would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        ["bash", str(ROOT / name), *map(str, args)],
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop_when(process: subprocess.Popen, ready, number: int) -> tuple[int, str]:
    """Send the signal only to the script, once `ready()`. Returns its exit code and output."""
    for _ in range(1200):
        if ready():
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def running(word) -> list[str]:
    """Command lines that contain `word`, without this process's."""
    found = subprocess.run(["pgrep", "-fa", str(word)], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if int(line.split()[0]) != os.getpid()]


FLAGS = ["--limit", "48", "--temperature", "1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    """The PA file of an undisturbed run."""
    run = tmp_path_factory.mktemp("undisturbed")
    assert start("scripts/PA.sh", *FLAGS, **SETTINGS, RUN=f"{run}/").wait(120) == 0
    return (run / "PA_teacher_easyVQA.json").read_bytes()


@pytest.mark.parametrize(("name", "number"), [("scripts/PA.sh", signal.SIGTERM), ("scripts/mpa.sh", signal.SIGINT)])
def test_a_signal_to_a_script_stops_the_stage_and_nothing_finished_is_lost(name, number, tmp_path, undisturbed):
    run = tmp_path / "run/"
    journal = run / "PA_teacher_easyVQA.journal.jsonl"
    arguments, environment = (FLAGS, {}) if name.endswith("PA.sh") else ([], {"PA_FLAGS": " ".join(FLAGS)})

    def some_replies() -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") > 8

    process = start(name, *arguments, **SETTINGS, RUN=f"{run}/", **environment)
    code, said = stop_when(process, some_replies, number)
    assert code == SIGNALS[number], said
    assert "Run the same command again to go on" in said and "Traceback" not in said
    assert running(run) == []
    assert journal.read_bytes().count(b"\n") > 8
    done = start("scripts/PA.sh", *FLAGS, **SETTINGS, RUN=f"{run}/")
    assert done.wait(120) == 0, done.stdout.read()
    assert (run / "PA_teacher_easyVQA.json").read_bytes() == undisturbed and not journal.exists()


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_to_PL_saves_a_checkpoint_through_the_launcher(number, ranks, tmp_path):
    write(tmp_path, 40)
    out, log = tmp_path / "out", tmp_path / "log"
    places = {"MODEL": STUDENT, "DATA": tmp_path / "train.json", "IMAGES": tmp_path, "OUTPUT_DIR": out}
    with open(log, "w") as said:
        process = subprocess.Popen(
            [
                "bash",
                str(ROOT / "PL/Qwen2-VL-Finetune/scripts/finetune.sh"),
                *TRAINER_FLAGS[2:],
                "--num_train_epochs",
                "9",
            ],
            env={
                **os.environ,
                **{k: str(v) for k, v in places.items()},
                "BATCH_SIZE": "2",
                "CPU_PROCESSES": str(ranks),
            },
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    code, _ = stop_when(process, lambda: ": loss " in log.read_text(), number)
    assert code == SIGNALS[number], log.read_text()
    assert "and saved. The same command resumes there" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert len([*out.glob("checkpoint-*")]) == 1
    assert running(out) == []


def test_processes_by_GPUS_share_a_stage_and_write_what_one_would(tmp_path, undisturbed):
    process = start("scripts/PA.sh", *FLAGS, **SETTINGS, RUN=f"{tmp_path}/", GPUS=2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    assert said.count("images annotated") == 1 and "OMP_NUM_THREADS" not in said
    assert (tmp_path / "PA_teacher_easyVQA.json").read_bytes() == undisturbed
    process = start("scripts/PA.sh", **{**SETTINGS, "LVLM": "/none"}, RUN=f"{tmp_path}/", GPUS=2)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 1 and "error: /none: no such model folder" in said and "Traceback" not in said


def test_vllm_runs_in_its_own_environment_and_the_rest_in_the_other(tmp_path):
    for name in ("hf", "vllm"):
        (tmp_path / name / "bin").mkdir(parents=True)
        python = tmp_path / name / "bin/python"
        python.write_text(f'#!/bin/bash\necho "{name}: $(basename "$1")"\n')
        python.chmod(0o755)
    places = {"VENV": tmp_path / "hf", "VLLM_VENV": tmp_path / "vllm", **SETTINGS, "RUN": f"{tmp_path}/run/"}

    def says(name, *args, **more) -> list[str]:
        return start(name, *args, **{**places, **more}).communicate()[0].splitlines()

    assert says("scripts/PA.sh") == ["hf: PA.py"]
    assert says("scripts/PA.sh", "--engine", "vllm") == says("scripts/PA.sh", "--engine=vllm") == ["vllm: PA.py"]
    assert says("scripts/PI.sh", "--engine-lvlm", "vllm") == ["vllm: PI.py"]
    assert says("evaluate.sh", "--engine", "ray", "--ray-engine", "vllm") == ["vllm: evaluate.py"]
    assert says("evaluate.sh", "--model-path", "vllm") == ["hf: evaluate.py"]
    commands = says("scripts/mpa.sh", ENGINE="vllm")
    assert [line for line in commands if line.startswith("vllm")] == [
        "vllm: PA.py",
        "vllm: PI.py",
        "vllm: evaluate.py",
    ]
    assert "hf: launch.py" in commands and "hf: tables.py" in commands

    missing = start("scripts/PA.sh", "--engine", "vllm", **{**places, "VLLM_VENV": tmp_path / "none"})
    said, _ = missing.communicate()
    assert missing.returncode == 1 and "error:" in said and "bash scripts/setup.sh vllm" in said
