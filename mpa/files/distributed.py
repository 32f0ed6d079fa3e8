"""Distributed processes: torchrun, `accelerate launch` or DeepSpeed starts one for each GPU.

In a stage each process answers a part of the requests, and only rank 0 writes results. With one process, `wait`, `end` and
`leave` do nothing.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from functools import cache
from pathlib import Path

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
FIRST = RANK == 0
CONSEQUENCE = 2.0  # seconds, in which another process or the launcher says why a connection was lost


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
    """Destroy the process group, all processes together: one may wait for another, and those that stay behind are ended."""
    if WORLD > 1:
        wait()
        _state().destroy_process_group()


def leave(text: str = "", code: int = 1) -> None:
    """End this process, which has failed or was stopped, at once: cleaning up NCCL may wait for the others, who wait for it.

    `text` goes to stderr if no other process of this machine has said why they end; a failure (code 1) names the rank. Without a
    text, the exception that is handled goes there. It may be the consequence of another's end, which first has time to say why.
    """
    if WORLD == 1:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):  # of a loader's worker, too
        signal.signal(number, signal.SIG_IGN)
    if not text:
        text = traceback.format_exc().rstrip()
        time.sleep(CONSEQUENCE)
    with contextlib.suppress(OSError):  # nobody reads
        if claim(os.environ.get("TORCHELASTIC_ERROR_FILE")):
            print(f"{text} (rank {RANK} of {WORLD})" if code == 1 else text, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)


def claim(error_file: str | None) -> bool:
    """Whether the caller is the first of this machine to say why the processes end. `error_file`: torchrun's of any of them."""
    if not error_file:  # another launcher: said by each rather than by none
        return True
    try:
        Path(error_file).parents[1].joinpath("claimed").touch(exist_ok=False)  # beside the folders of the ranks
    except FileExistsError:
        return False
    return True
