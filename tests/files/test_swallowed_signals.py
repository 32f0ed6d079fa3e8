"""A signal whose exception rises in a destructor, where Python drops it, stops the command at the next batch."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

import data
from mpa.files import signals

SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from mpa.stages import cli
from mpa.engines import Request, ask
from mpa.files.journal import Journal

class Library:
    def __del__(self):
        os.kill(os.getpid(), {number})
        for _ in range(1000):  # the handler runs here
            pass

class Engine:
    def generate(self, requests, done):
        for i, request in enumerate(requests):
            if i == 3:
                Library()
            yield [dict(key=request.key, text="x")]
    def status(self):
        return ""

def main():
    if {early}:
        Library()
    ask(Engine(), [Request(str(i), "x", "x") for i in range(50)], Journal({journal!r}, {{}}), "PI")
    print("to its end")

cli.run(main)
"""


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_stage_stops_with_the_replies_that_it_has(tmp_path, number, code, early):
    script = SCRIPT.format(root=str(ROOT), number=int(number), journal=str(tmp_path / "PI.json"), early=early)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.splitlines()[-1] == "stopped. Run the same command again to go on."
    assert "Traceback" not in done.stderr
    # The reply after the destructor is there: the exception was dropped.
    lines = (tmp_path / "PI.journal.jsonl").read_text().splitlines()
    assert [json.loads(line).get("key") for line in lines] == [None, *([] if early else "0123")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_trainer_stops_while_it_prepares_samples(monkeypatch):
    seen, before = [], signal.getsignal(signal.SIGTERM)

    class Library:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass

    class Encoder(list):
        def __getitem__(self, index):
            seen.append(index)
            if index == 3:
                Library()
            return "no image"

    monkeypatch.setattr(data, "_Check", lambda samples, *_: Encoder(samples))
    monkeypatch.setattr(signals.Heard, "signal", 0)
    signal.signal(signal.SIGTERM, signals.Heard.handle)
    try:
        with pytest.raises(KeyboardInterrupt):
            data.check_all([{"id": i, "where": "x"} for i in range(50)], None, 10, "error")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [0, 1, 2, 3]
    assert signals.Heard.signal == signal.SIGTERM
