"""The distributed processes of one training: launcher environment, collectives, start and end."""

import os

import torch.distributed as dist

from mpa.files import signals


def use_launcher_environment() -> None:
    """Adapt to the launcher; call this first.

    DeepSpeed's launcher says LOCAL_SIZE where torchrun says LOCAL_WORLD_SIZE; accelerate would assume 1. A rank whose
    launcher is killed gets SIGTERM: it saves and stops.
    """
    if "LOCAL_SIZE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["LOCAL_SIZE"]
    signals.end_with_launcher()


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
