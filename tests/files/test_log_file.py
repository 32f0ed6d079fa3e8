"""results/<run>/log.txt has all that a command prints; the screen has what a person can follow."""

import io
import subprocess
import sys

import pytest
from conftest import MINI, ROOT, TEACHER, python

from mpa.files import log_file


@pytest.fixture
def install(monkeypatch):
    """`install()` -> stdout and stderr as one buffer, with the log installed; pytest sets its own before each test."""

    def replace() -> io.StringIO:
        shown = io.StringIO()
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setattr(sys, "stderr", shown)
        log_file.install()
        return shown

    return replace


def lines(path):
    return path.read_text().splitlines()[2:]  # below the empty line and the one with time and command


def test_what_was_printed_before_the_log_was_opened_is_in_it(install, tmp_path):
    screen = install()
    print("early")
    log_file.open_log(tmp_path / "run/log.txt")
    print("late", file=sys.stderr)
    assert screen.getvalue() == "early\nlate\n"
    assert lines(tmp_path / "run/log.txt") == ["early", "late"]


@pytest.mark.parametrize("verbose", [False, True])
def test_details_and_noise_are_shown_only_when_asked_for(install, tmp_path, verbose):
    screen = install()
    log_file.open_log(tmp_path / "log.txt", verbose)
    log_file.detail("a detail")
    print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
    print("/x/y.py:3: FutureWarning: soon\n  warnings.warn(\n", end="")
    print("a result about a FutureWarning")
    everything = [
        "a detail",
        "DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully",
        "/x/y.py:3: FutureWarning: soon",
        "  warnings.warn(",
        "a result about a FutureWarning",
    ]
    assert lines(tmp_path / "log.txt") == everything
    assert screen.getvalue().splitlines() == (everything if verbose else everything[-1:])


def test_of_a_progress_bar_the_log_keeps_the_last_state(install, tmp_path):
    screen = install()
    log_file.open_log(tmp_path / "log.txt")
    for percent in (0, 50, 100):
        sys.stderr.write(f"\rPA: {percent}%")
    sys.stderr.write("\n")
    assert lines(tmp_path / "log.txt") == ["PA: 100%"]
    assert screen.getvalue() == "\rPA: 0%\rPA: 50%\rPA: 100%\n"


def test_a_log_that_cannot_be_written_is_a_warning(install, tmp_path):
    screen = install()
    (tmp_path / "log.txt").mkdir()
    log_file.open_log(tmp_path / "log.txt")
    log_file.detail("a detail")
    assert "log.txt: cannot be written" in screen.getvalue() and screen.getvalue().endswith("a detail\n")


def test_where_the_disk_is_full_the_log_ends_and_the_command_goes_on(install, tmp_path):
    screen = install()
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log_file.open_log(tmp_path / "log.txt")
    print("on it goes")
    assert screen.getvalue().count("the log ends here (No space left on device)") == 1
    assert "on it goes" in screen.getvalue()


def test_a_stage_writes_its_log_beside_its_result_and_a_dry_run_none(images, tmp_path):
    common = ("--dataset", "images", "--image-root", images, "--model-path-lvlm", TEACHER, "--limit", 2, *MINI)
    assert python("PA.py", *common, "--run", f"{tmp_path}/dry", "--dry-run").returncode == 0
    assert not (tmp_path / "dry").exists()
    done = python("PA.py", *common, "--run", f"{tmp_path}/run")
    assert done.returncode == 0 and "PA.py" in (tmp_path / "run/log.txt").read_text()
    assert set(done.stdout.splitlines()) <= set(lines(tmp_path / "run/log.txt"))
    command = [sys.executable, ROOT / "scripts/PA.py", *common, "--run", f"{tmp_path}/run", "--seed", 1]
    failed = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == lines(tmp_path / "run/log.txt")[-1]
