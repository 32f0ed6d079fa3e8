"""A training in which ranks fail: `python tests/failing_training.py RANK:PLACE:HOW … -- --model_id …`.

PLACE: before (the model is loaded), step (the second), evaluation, save (of the first checkpoint), loader (in its worker process).
HOW: raise, refuse (an error of the user), kill (as when memory ran out), leave (exit code 0), hang (in a system call).
The time of the first failure goes to $FAILED_AT.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "PL/Qwen2-VL-Finetune/src"))

import evaluation
import train
from torch.utils.data import get_worker_info
from trainer import Leveler

from data import Samples
from mpa.files.records import InputError


def fail(how: str) -> None:
    with open(os.environ["FAILED_AT"], "a") as file:
        file.write(f"{time.time()}\n")
    if how == "raise":
        raise ZeroDivisionError("a bug")
    if how == "refuse":
        raise InputError("a file is missing")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "leave":
        os._exit(0)
    while how == "hang":
        time.sleep(1000)


def fail_in(owner, name: str, how: str, when=lambda: True) -> None:
    original = getattr(owner, name)

    def replaced(*args, **kwargs):
        if when():
            fail(how)
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


def prepare(place: str, how: str) -> None:
    if place == "step":
        calls = []
        fail_in(Leveler, "training_step", how, lambda: calls.append(0) or len(calls) == 2)
    elif place == "loader":
        fail_in(Samples, "__getitem__", how, get_worker_info)
    else:
        owner, name = {
            "before": (train, "load_model"),
            "evaluation": (evaluation, "exact"),
            "save": (Leveler, "_save_checkpoint"),
        }[place]
        fail_in(owner, name, how)


if __name__ == "__main__":
    end = sys.argv.index("--")
    for rank, place, how in (word.split(":") for word in sys.argv[1:end]):
        if rank == os.environ["RANK"]:
            prepare(place, how)
    del sys.argv[1 : end + 1]
    sys.exit(train.run())
