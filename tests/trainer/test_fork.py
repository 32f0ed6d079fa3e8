"""Ctrl-C while worker processes are forked: it ends the command, and leaves no lock taken."""

import logging
import os
import signal

import pytest
from conftest import STUDENT
from training import build, write

from mpa.data import image_check
from mpa.data.protocol import Sample
from mpa.engines.hf import HFEngine

armed = False


def _interrupt_once():
    global armed
    if armed:
        armed = False
        os.kill(os.getpid(), signal.SIGINT)


os.register_at_fork(before=_interrupt_once)


@pytest.fixture
def ctrl_c():
    global armed
    before, armed = signal.signal(signal.SIGINT, signal.default_int_handler), True
    yield
    signal.signal(signal.SIGINT, before)
    assert not armed, "nothing was forked"
    assert logging._lock.acquire(blocking=False)
    logging._lock.release()


def test_the_hf_engine_starts_its_workers(ctrl_c):
    engine = HFEngine(str(STUDENT), device="cpu", workers=1, min_pixels=3136, max_pixels=3136)
    with pytest.raises(KeyboardInterrupt), engine:
        engine.load()


def test_the_check_of_a_dataset_starts_its_workers(ctrl_c, images):
    samples = [Sample("0", str(images / "01.png"), "?", ["red"])]
    with pytest.raises(KeyboardInterrupt):
        image_check.check(samples, 1, 3136, 3136)


def test_the_check_of_the_train_samples_starts_its_workers(ctrl_c, tmp_path):
    write(tmp_path, 70)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
