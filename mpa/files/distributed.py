"""Distributed inference: `accelerate launch` or `torchrun` starts one process per GPU.

Each process answers a part of the requests. Only rank 0 writes results. With one process, `wait` and `end` do nothing.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from datetime import timedelta
from functools import cache

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
FIRST = RANK == 0


@cache
def _state():
    from accelerate import PartialState

    # The processes only need a barrier, so the group is on the CPU. The slowest rank may take days.
    return PartialState(cpu=True, timeout=timedelta(days=30))


def wait() -> None:
    """Block until every process has called this."""
    if WORLD > 1:
        _state().wait_for_everyone()


def end() -> None:
    """Destroy the process group. Otherwise a process may wait for one that has already exited."""
    if WORLD > 1:
        _state().destroy_process_group()


def end_with_launcher() -> None:
    """Receive SIGTERM when the launcher ends: `accelerate launch` with one process does not forward its own SIGTERM."""
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.environ.pop("LAUNCHER_PID", str(os.getppid())) != str(os.getppid()):
            sys.exit(128 + signal.SIGTERM)  # the launcher was killed before this


class Heard:
    """The last signal that asked this process to stop; 0: none."""

    signal = 0

    @classmethod
    def handle(cls, number, _frame) -> None:
        """A signal's handler. Python drops an exception that rises in a destructor: `stop_if_asked` raises it then."""
        cls.signal = number
        raise KeyboardInterrupt


def say_unraisable(dropped) -> None:
    """`sys.unraisablehook`: quiet about an exception of `Heard.handle` that Python dropped."""
    if not (Heard.signal and issubclass(dropped.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(dropped)


def stop_if_asked() -> None:
    """Raise KeyboardInterrupt if a signal has come. Call it between batches."""
    if Heard.signal:
        raise KeyboardInterrupt


@contextlib.contextmanager
def signals_held():
    """SIGINT, SIGTERM and SIGHUP wait until this block is left: for a fork.

    Python drops an exception that a signal handler raises in a fork hook, and the lock that the hook takes (logging's)
    then stays taken: the signal is lost, and the process hangs later. A signal mask would not do: it is per thread.
    """
    came, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(number)) and threading.current_thread() is threading.main_thread():
            before[number] = signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
