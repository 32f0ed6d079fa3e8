"""The processes of one training: how many they are on this machine, and what they do together."""

import ctypes
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist


def use_launcher_environment() -> None:
    """To be called first. DeepSpeed's launcher names the ranks of this machine otherwise than torchrun, and accelerate
    would take the missing name for 1. A rank whose launcher is killed gets SIGTERM: it saves and stops."""
    if "LOCAL_SIZE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def all_gather(value) -> list:
    """What each rank gives, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """For all."""
    if dist.is_initialized():
        dist.barrier()


def init_deepspeed() -> None:
    """Before the model is loaded, or ZeRO-3 shards the weights as if this process were alone."""
    import deepspeed

    deepspeed.init_distributed()
    barrier()
    # A buffer of 69 MB that CPU ranks share. All have it open now; by its name DeepSpeed would leave it behind for ever.
    name = "_".join(os.environ[word] for word in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{name}").unlink(missing_ok=True)


def destroy() -> None:
    """All together: a rank that loses another at its end may abort."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
