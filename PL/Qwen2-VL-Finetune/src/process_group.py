"""The distributed processes of one training: launcher environment, collectives, start and end."""

import contextlib
import ctypes
import os
import signal
import sys
import threading

import torch.distributed as dist


def use_launcher_environment() -> None:
    """Adapt to the launcher; call this first.

    DeepSpeed's launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE; accelerate would assume 1. Under
    torchrun, a rank whose launcher is killed gets SIGTERM: it saves and stops.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.environ.pop("LAUNCHER_PID", str(os.getppid())) != str(os.getppid()):
            sys.exit(128 + signal.SIGTERM)  # it was killed before this, while the rank imported torch


def local_world_size() -> int:
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def all_gather(value) -> list:
    """The value of each rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks; nothing to wait for without a process group."""
    if dist.is_initialized():
        dist.barrier()


def use_gloo() -> None:
    """Ranks on a CPU exchange tensors by gloo. DeepSpeed would compile an extension of its own for it: call this before it starts."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def init_deepspeed() -> None:
    """Start DeepSpeed's process group; call this before the model is loaded, or ZeRO-3 does not shard its weights."""
    import deepspeed

    deepspeed.init_distributed()
    barrier()


def destroy() -> None:
    """End the process group on all ranks together: a rank may abort if another ends before it."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


class Heard:
    """The last signal that asked this process to stop; 0: none."""

    signal = 0

    @classmethod
    def handle(cls, number, _frame) -> None:
        """A signal's handler. Python drops an exception that rises in a destructor: `stop_if_asked` raises it then."""
        cls.signal = number
        raise KeyboardInterrupt


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
