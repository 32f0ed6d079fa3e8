"""Several processes of one stage, as `accelerate launch` or `torchrun` starts them: a GPU and a part of the requests each.

All do the same, but for the requests they answer; only the first writes results. Alone, every function here is trivial.
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

    # On the CPU: these only wait for each other. For as long as the slowest may take.
    return PartialState(cpu=True, timeout=timedelta(days=30))


def wait() -> None:
    """Until every process has come here."""
    if WORLD > 1:
        _state().wait_for_everyone()


def end() -> None:
    """Leave the group in order, so that none waits in vain for another to go."""
    if WORLD > 1:
        _state().destroy_process_group()


def end_with_launcher() -> None:
    """Get SIGTERM when the launcher ends, if there is one: `accelerate launch` of one process does not pass its own on."""
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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
