"""The bash scripts: they pass signals to their commands, and select each engine's Python."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import MINI, ROOT, STUDENT, TEACHER, bash, python
from fake_gpus import OLD, nvidia_smi
from fake_server import annotate_or_answer
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


# A python of an environment asks the real one where the files of a run are.
LAYOUT = f'#!/bin/bash\n[[ $* != *mpa.runs.layout* ]] || exec {sys.executable} "$@"\n'


def running(word) -> list[str]:
    """Command lines that contain `word`, without this process's."""
    found = subprocess.run(["pgrep", "-fa", str(word)], capture_output=True, text=True).stdout.splitlines()
    return [line for line in found if int(line.split()[0]) != os.getpid()]


@pytest.mark.parametrize(("name", "number"), [("scripts/PA.sh", signal.SIGTERM), ("scripts/mpa.sh", signal.SIGINT)])
def test_a_signal_to_a_script_stops_the_stage_and_nothing_finished_is_lost(name, number, images, serve, tmp_path):
    """Four replies have come, four are under way, four are not sent yet."""
    ready, gate = threading.Semaphore(0), threading.Event()

    def rule(body, nth):
        if nth > 4:
            ready.release()
            gate.wait()
        return annotate_or_answer(body)

    server, run = serve(rule), tmp_path / "run/"
    flags = ["--base-url", server.url, "--concurrency", "4", "--no-fused"]
    by_flag = ["--engine", "openai", "--image-root", images, *flags]
    settings = {**SETTINGS, "DATASET": "images", "LVLM": "big"}
    if name.endswith("PA.sh"):
        process = start(name, *by_flag, **settings, RUN=f"{run}/")
    else:
        more = {"IMAGES": images, "LVLM_ENGINE": "openai", "PA_FLAGS": " ".join(flags)}
        process = start(name, **settings, **more, RUN=f"{run}/")
    for _ in range(4):
        assert ready.acquire(timeout=240), process.stdout.read()
    process.send_signal(number)
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("stopping: "):
            gate.set()
    assert process.wait() == SIGNALS[number], said
    assert "Run the same command again to go on" in said and "Traceback" not in said
    assert running(run) == []
    journal = run / "PA_big_images.journal.jsonl"
    assert journal.read_bytes().count(b"\n") == 9  # with that of the settings
    for folder in (run, tmp_path / "whole"):
        done = start("scripts/PA.sh", *by_flag, **settings, RUN=f"{folder}/")
        said, _ = done.communicate()
        assert done.returncode == 0, said
    assert not journal.exists()
    assert (run / "PA_big_images.json").read_bytes() == (tmp_path / "whole/PA_big_images.json").read_bytes()


@pytest.mark.parametrize(
    ("number", "ranks"), [pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow), (signal.SIGINT, 1)]
)
def test_a_signal_to_PL_saves_a_checkpoint_through_the_launcher(number, ranks, tmp_path):
    write(tmp_path, 40)
    out = tmp_path / "out"
    places = {"MODEL": STUDENT, "DATA": tmp_path / "train.json", "IMAGES": tmp_path, "OUTPUT_DIR": out}
    flags = [*TRAINER_FLAGS[2:], "--num_train_epochs", "999"]
    process = start("PL/Qwen2-VL-Finetune/scripts/finetune.sh", *flags, **places, BATCH_SIZE=2, CPU_PROCESSES=ranks)
    said = ""
    for line in process.stdout:
        said += line
        if ": loss " in line and number:
            process.send_signal(number)
            sent, number = number, None
    assert process.wait() == SIGNALS[sent], said
    assert "and saved. The same command resumes there" in said
    assert "Traceback" not in said
    assert len([*out.glob("checkpoint-*")]) == 1
    assert running(out) == []


@pytest.mark.slow
def test_processes_by_GPUS_share_a_stage_and_write_what_one_would(tmp_path, monkeypatch):
    flags = ["--limit", "24", "--temperature", "1"]
    assert (
        python(
            "PA.py",
            "--dataset",
            "easyVQA",
            "--batch-size",
            "4",
            *MINI,
            *flags,
            "--model-path-lvlm",
            TEACHER,
            "--run",
            f"{tmp_path}/one/",
        ).returncode
        == 0
    )
    monkeypatch.delenv("OMP_NUM_THREADS")  # the script sets it
    process = start("scripts/PA.sh", *flags, **SETTINGS, RUN=f"{tmp_path}/two/", GPUS=2)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert said.count("images annotated") == 1 and "OMP_NUM_THREADS" not in said
    name = "PA_teacher_easyVQA.json"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    process = start("scripts/PA.sh", **{**SETTINGS, "LVLM": "/none"}, RUN=f"{tmp_path}/none/", GPUS=2)
    said, _ = process.communicate()
    assert process.returncode == 1 and "error: /none: no such model folder" in said and "Traceback" not in said


def test_vllm_runs_in_its_own_environment_and_the_rest_in_the_other(tmp_path):
    for name in ("hf", "vllm"):
        (tmp_path / name / "bin").mkdir(parents=True)
        python = tmp_path / name / "bin/python"
        python.write_text(LAYOUT + f'echo "{name}: $(basename "$1")"\n')
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


@pytest.mark.parametrize("script", ["scripts/PA.sh", "PL/Qwen2-VL-Finetune/scripts/PL.sh"])
def test_an_old_driver_ends_a_stage_before_it_writes(script, tmp_path):
    """nvidia-smi lists two GPUs, and the real torch finds no driver that it can use."""
    places = {"PATH": f"{nvidia_smi(tmp_path / 'bin', 2, OLD)}:{os.environ['PATH']}", "RUN": f"{tmp_path}/run/"}
    done = bash(script, **SETTINGS | places)
    assert done.returncode != 0 and done.stderr.startswith("error: torch ") and "Traceback" not in done.stderr
    assert "(2 x NVIDIA A100, driver 535.104.05)" in done.stderr
    assert {path.name for path in tmp_path.glob("run/*")} <= {"log.txt"}


def test_setup_says_at_once_that_torch_cannot_use_the_gpus(tmp_path):
    """uv installs nothing here; the environment's Python is that of the tests."""
    binaries = nvidia_smi(tmp_path / "bin", 2, OLD)
    (binaries / "uv").write_text("#!/bin/bash\n")
    (binaries / "uv").chmod(0o755)
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (tmp_path / "venv/bin/python").chmod(0o755)
    places = {"VENV": tmp_path / "venv", "PATH": f"{binaries}:{os.environ['PATH']}"}
    done = bash("scripts/setup.sh", **places)
    assert done.returncode == 0 and "warning: torch " in done.stderr and "driver 535.104.05" in done.stderr, done.stderr
    assert bash("scripts/setup.sh", **places).stderr == ""  # nothing to install


@pytest.fixture
def told(tmp_path) -> dict[str, str]:
    """Variables with which each `python FILE …` of a script says its file and $RUN, and does nothing."""
    (tmp_path / "fake/bin").mkdir(parents=True)
    python = tmp_path / "fake/bin/python"
    python.write_text(LAYOUT + 'echo "$(basename -- "$1") $RUN"\n')
    python.chmod(0o755)
    return {"VENV": f"{tmp_path}/fake", **SETTINGS}


SWITCHES = ("GUARD", "REMEDY", "REPORT", "VERBOSE", "MEMORY_CHECK")
NUMBERS = ("LIMIT", "GPUS", "CPU_PROCESSES", "BATCH_SIZE", "SEED", "EPOCHS", "LEARNING_RATE")
REFUSED = [
    *(("scripts/mpa.sh", name, value) for name in SWITCHES for value in ("no", "2", " 1")),
    *(("scripts/mpa.sh", name, value) for name in NUMBERS for value in ("two", "-1", "a[$(id)]")),
    *(("scripts/mpa.sh", name, value) for name in ("LIMIT", "BATCH_SIZE") for value in ("0", "08", "1.5", "0x2")),
    *(("scripts/demo.sh", name, "off") for name in ("GUARD", "REPORT", "LIMIT", "QUESTIONS", "SEEDS", "VERBOSE")),
    ("scripts/mpa.sh", "ZERO", "zero1"),
    *(("scripts/guard.sh", name, "yes") for name in ("REMEDY", "ANCHORS", "EPOCHS")),
    *((f"scripts/{name}.sh", "GPUS", "all") for name in ("PA", "PI", "evaluate")),
    *(("PL/Qwen2-VL-Finetune/scripts/PL.sh", name, "two") for name in ("CPU_PROCESSES", "VERBOSE", "MEMORY_CHECK")),
]


@pytest.mark.parametrize(("script", "name", "value"), REFUSED)
def test_a_switch_or_number_that_is_none_is_refused_before_anything_runs(script, name, value, told, tmp_path):
    done = bash(script, **{**told, "RUN": f"{tmp_path}/run/", name: value})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {name if name != 'SEEDS' else 'SEED'} is ") and done.stderr.count("\n") == 1


def test_switches_and_numbers_as_they_should_be_are_taken(told, tmp_path):
    given = {"GUARD": 0, "REMEDY": "", "REPORT": 0, "VERBOSE": 0, "GPUS": 0, "EPOCHS": ".5"}
    done = bash("scripts/mpa.sh", **told, RUN=f"{tmp_path}/run/", **given, LEARNING_RATE="1e-5", LIMIT="")
    assert done.returncode == 0, done.stderr
    assert "guard.py" not in done.stdout and "report.py" not in done.stdout and "diagnose.py" in done.stdout


@pytest.mark.parametrize("name", ["round-robin", "round-2", "a round-3", "runs/round-2", "./-x"])
def test_the_name_of_a_run_decides_nothing(name, told, tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "scripts/mpa.sh"],
        cwd=tmp_path,
        env=os.environ | {k: str(v) for k, v in told.items()} | {"RUN": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    files = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(name) and ".py" in line]
    assert files == ["PA.py", "PI.py", "launch.py", "evaluate.py", "tables.py", "diagnose.py", "report.py"]


@pytest.mark.parametrize("name", ["..", ".", " ", "-x", "a\nb"])
@pytest.mark.parametrize(
    "script", ["scripts/mpa.sh", "scripts/demo.sh", "scripts/guard.sh", "PL/Qwen2-VL-Finetune/scripts/PL.sh"]
)
def test_a_run_that_would_be_another_folder_is_refused(script, name, told):
    done = bash(script, **told, RUN=name)
    assert done.returncode == 2 and done.stderr.startswith("error: --run ") and done.stderr.count("\n") == 1
    assert "give a short name" in done.stderr


def test_setup_empties_no_folder_that_is_not_an_environment(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("kept")
    (tmp_path / "uv").write_text(f'#!/bin/bash\necho "$*" >>{tmp_path}/asked\n')
    (tmp_path / "uv").chmod(0o755)
    for place in (mine, mine / "thesis.txt"):
        done = bash("scripts/setup.sh", VENV=place, PATH=f"{tmp_path}:{os.environ['PATH']}")
        assert done.returncode == 1 and f"error: {place}: is not an environment of Python" in done.stderr
    assert not (tmp_path / "asked").exists() and (mine / "thesis.txt").read_text() == "kept"


@pytest.mark.parametrize("script", ["evaluate.sh", "scripts/PA.sh", "PL/Qwen2-VL-Finetune/scripts/PL.sh"])
def test_a_script_is_the_same_through_a_link_with_CDPATH_and_from_a_folder_that_is_gone(script, told, tmp_path):
    link, gone = tmp_path / "link.sh", tmp_path / "gone"
    link.symlink_to(ROOT / script)
    gone.mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/environment.sh").write_text("echo another")
    commands = [
        f"bash {link}",
        f"cd {ROOT} && CDPATH={tmp_path} bash {script}",
        f"cd {gone} && rmdir {gone} && bash {ROOT / script}",
    ]
    for command in commands:
        environment = os.environ | {k: str(v) for k, v in told.items()} | {"RUN": "x"}
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "another" not in done.stdout, done.stderr
        assert done.stdout.split()[-2] in ("evaluate.py", "PA.py", "launch.py")


@pytest.mark.parametrize("script", ["scripts/mpa.sh", "scripts/demo.sh"])
def test_a_script_that_is_set_by_variables_lists_them_and_refuses_flags(script):
    told = bash(script, "--help")
    assert told.returncode == 0 and "Variables, with their defaults:" in told.stdout
    assert "  LIMIT=${LIMIT:-" in told.stdout
    assert ("  DATASET=textVQA\n" in told.stdout) == script.endswith("mpa.sh")
    refused = bash(script, "--dry-run")
    assert refused.returncode == 2 and "takes only -v and -h" in refused.stderr


@pytest.mark.parametrize("script", ["scripts/PA.sh", "scripts/PI.sh", "evaluate.sh"])
def test_a_stages_script_shows_the_first_flags_or_all_and_its_variables(script):
    first, every = (bash(script, flag).stdout for flag in ("-h", "--help-all"))
    assert "--dataset" in first and "--tensor-parallel-size" not in first and "--tensor-parallel-size" in every
    assert "  BATCH_SIZE  --batch-size  " in first and "up to 64; else 8)" in first


def test_a_stage_gets_the_variables_that_are_set_and_no_others(told):
    fake = Path(told["VENV"], "bin/python")
    fake.write_text(LAYOUT + 'printf "%s\n" "${@:2}"\n')
    unset = dict.fromkeys([*SETTINGS, "RUN"], "")
    assert bash("scripts/PA.sh", VENV=told["VENV"], **unset).stdout == "\n"
    assert bash("evaluate.sh", "--limit", "1", VENV=told["VENV"], **unset).stdout.split() == ["--limit", "1"]
    flags = bash("evaluate.sh", **told | unset | {"MODEL": "a b", "RUN": "-x", "DTYPE": "float32"}).stdout.split()
    assert flags == ["--model-path", "a", "b", "--run=-x", "--dtype", "float32"]
    flags = bash("scripts/PA.sh", **told | unset | {"IMAGES": "my pictures"}).stdout.splitlines()
    assert flags == ["--image-root", "my pictures", "--dataset", "images"]


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mpa.stages.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
COMMANDS = [
    [path]
    for path in [*sorted(ROOT.glob("scripts/*.py")), ROOT / "data/prepare.py"]
    if "\n    cli.run(" in path.read_text()
]
COMMANDS += [["-m", name] for name in ("experiments.plan", "mpa.analysis.remedies")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[-1] if words[0] == "-m" else words[0].name)
def test_ctrl_c_during_the_imports_says_nothing(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_another_program_keeps_its_handler_of_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    assert python("PA.py", "--help").returncode == 0
    assert signal.getsignal(signal.SIGINT) == before
    code = "import mpa, signal; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, preexec_fn=lambda: signal.signal(2, 0))


def test_images_and_another_dataset_contradict_each_other(tmp_path):
    done = bash("scripts/mpa.sh", IMAGES=tmp_path, DATASET="textVQA")
    assert done.returncode == 2 and "Unset one of them" in done.stderr
