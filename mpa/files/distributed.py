"""Distributed inference: `accelerate launch` or `torchrun` starts one process per GPU.

Each process answers a part of the requests. Only rank 0 writes results. With one process, `wait` and `end` do nothing.
"""

import os
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
