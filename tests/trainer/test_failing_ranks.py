"""One of several ranks fails: all end soon, and it is said once which and why. Told to stop, they have time to save."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from training import TRAINER, TWO, arguments, write, zero

# Ranks that hear no signal, as inside a collective; what `$HOW` says happens in rank 1 alone.
RANK = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from mpa.files import distributed

def told(*_):
    if {how!r} == "fails when told" and distributed.RANK:
        distributed.leave("error: the disk is full")
    if {how!r} == "saves when told":
        time.sleep(2.5)  # longer than the others of a failed rank have
        os.write(1, b"saved\\n")
        os._exit(143)

signal.signal(signal.SIGTERM, told)
os.write(1, b"ready\\n")
if distributed.RANK == 1:
    if {how!r} == "raises":
        try:
            1 / 0
        except ZeroDivisionError:
            distributed.leave()
    if {how!r} == "is refused":
        distributed.leave("error: a.json: no such file")
    if {how!r} == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if {how!r} == "ends early":
        os._exit(0)
while True:
    time.sleep(1000)
"""
LAUNCHER = """
import sys
sys.path.insert(0, {trainer!r})
import launch, ranks
ranks.GRACE = 1.0
sys.exit(launch.run_ranks())
"""


def start(*command, ranks: int = 2, **variables) -> subprocess.Popen:
    launcher = LAUNCHER.format(trainer=str(TRAINER / "src"))
    flags = f"--standalone --local-addr 127.0.0.1 --nproc-per-node {ranks} --shutdown-timeout 3600".split()
    return subprocess.Popen(
        [sys.executable, "-u", "-c", launcher, *flags, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def ended(process: subprocess.Popen, tell_at: str = "", ranks: int = 2) -> tuple[int, str, float]:
    """Exit code, output without the ranks' "ready", and the seconds since all were. The launcher gets SIGTERM at `tell_at`."""
    said, ready, since = [], 0, time.monotonic()
    for line in process.stdout:
        if line == "ready\n":
            ready, since = ready + 1, time.monotonic()
        else:
            said.append(line)
        if tell_at and tell_at in line and ready in (0, ranks):
            process.send_signal(signal.SIGTERM)
            tell_at = ""
    return process.wait(60), "".join(said), time.monotonic() - since


@pytest.mark.parametrize(
    ("how", "ranks", "code", "why"),
    [
        ("raises", 2, 1, "ZeroDivisionError: division by zero (rank 1 of 2)"),
        ("is refused", 3, 1, "error: a.json: no such file (rank 1 of 3)"),
        ("is killed", 2, 137, "error: rank 1 was ended by signal 9, most likely because memory ran out."),
        ("ends early", 2, 137, "error: a rank ended without an error, and the others were still running 1 s later."),
    ],
)
def test_one_rank_fails_and_all_end(tmp_path, how, ranks, code, why):
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT), how=how))
    exit_code, said, seconds = ended(start(tmp_path / "rank.py", ranks=ranks))
    assert (exit_code, said.count("error: "), said.count("Traceback")) == (code, how != "raises", how == "raises"), said
    assert why in said and seconds < 10


@pytest.mark.parametrize(
    ("how", "said"),
    [("fails when told", "error: the disk is full (rank 1 of 2)\n"), ("saves when told", "saved\n" * 2)],
)
def test_ranks_that_are_told_to_stop_have_time_to_save_unless_one_fails(tmp_path, how, said):
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT), how=how))
    code, told, seconds = ended(start(tmp_path / "rank.py"), tell_at="ready")
    assert (code, told) == (143, said) and seconds < 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "code", "why"),
    [
        (["1:before:raise"], 1, "ZeroDivisionError: a bug (rank 1 of 2)\n"),
        (["0:step:refuse", "1:step:refuse"], 1, "error: a file is missing (rank "),
        (["1:step:kill"], 137, "error: rank 1 was ended by signal 9"),
        (["1:save:raise", "0:save:hang"], 1, "ZeroDivisionError: a bug (rank 1 of 2)\n"),
        (["1:loader:kill"], 1, "(rank 1 of 2)\n"),
    ],
    ids=str,
)
def test_a_training_of_which_one_rank_fails_ends_and_says_once_why(tmp_path, faults, code, why):
    write(tmp_path, 12)
    flags = [*arguments(tmp_path, *TWO, *zero("zero2")), "--save_steps", "2", "--dataloader_num_workers", "1"]
    file = tmp_path / "failed_at"
    process = start(
        ROOT / "tests/failing_training.py", *faults, "--", *flags, DS_ACCELERATOR="cpu", FAILED_AT=str(file)
    )
    exit_code, said, _ = ended(process)
    assert exit_code == code and why in said, said
    assert said.count("error: ") + said.count("Traceback") <= 2 and said.count(why) == 1, said
    assert time.time() - float(file.read_text().split()[0]) < 20
    assert not (tmp_path / "out/checkpoint-2").exists() and not (tmp_path / "out/train_meta.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("faults", "saved"), [(["9:step:raise"], True), (["1:save:kill", "0:save:hang"], False)], ids=str
)
def test_a_training_that_is_told_to_stop_saves_and_does_not_wait_for_a_dead_rank(tmp_path, faults, saved):
    write(tmp_path, 12)
    flags = [*arguments(tmp_path, *TWO, *zero("zero2")), "--save_steps", "100", "--dataloader_num_workers", "1"]
    file = str(tmp_path / "failed_at")
    process = start(ROOT / "tests/failing_training.py", *faults, "--", *flags, DS_ACCELERATOR="cpu", FAILED_AT=file)
    code, said, _ = ended(process, tell_at="step 1 of")
    assert code == 143 and bool(list(tmp_path.glob("out/checkpoint-*/manifest.json"))) == saved, said
    assert ("and saved. The same command resumes there." in said) == saved
    assert ("error: rank 1 was ended by signal 9" in said) == (not saved)
