"""Signals that ask a command to stop: none is lost, and none leaves a lock taken."""

import contextlib
import ctypes
import os
import signal
import sys
import threading


def end_with_launcher() -> None:
    """Receive SIGTERM when the launcher ends: `accelerate launch` with one process does not forward its own SIGTERM."""
    if sys.platform == "linux" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.environ.pop("LAUNCHER_PID", str(os.getppid())) != str(os.getppid()):
            sys.exit(128 + signal.SIGTERM)  # the launcher was killed before this


def follow_parent(*_) -> None:
    """In a worker process: its parent handles the signals that ask to stop, and the worker ends with it, however it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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
