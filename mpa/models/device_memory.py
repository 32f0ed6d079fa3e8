"""The free memory of a GPU, or of a CPU within the limits of its container; how a lack of it is recognised, and holes avoided."""

import os
import sys
from pathlib import Path

from mpa.models import gpus


def available_bytes(device: str, root: Path = Path("/")) -> int | None:
    """Memory that is free on a device: a GPU's, or on a CPU MemAvailable and free swap within the cgroup's limit.

    None if it cannot be known. CUDA is not initialised by this: processes may still be forked.
    """
    if device.startswith("cuda"):
        return _free_on_gpu(int(device.partition(":")[2] or 0))
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    meminfo = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    free = meminfo["MemAvailable"] + meminfo.get("SwapFree", 0)
    return min([free, *_free_in_cgroups(root)])


def extend_segments() -> None:
    """Have torch extend its segments of a GPU's memory, unless the user has set its allocator. Call it before the first tensor.

    A cache of key-values that grows by concatenation needs a little more at each step. Without this, every size leaves a hole
    that the next does not fit into. Linux only; a virtual GPU without CUDA's virtual memory needs "expandable_segments:False".
    """
    set_by_user = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys()
    if sys.platform == "linux" and not set_by_user:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def is_out_of_memory(error: BaseException) -> bool:
    """Recognises the errors of torch on GPUs and CPUs, and of the libraries below it, by their messages."""
    words = ("out of memory", "not enough memory", "allocate memory", "alloc_failed", "bad_alloc", "unable to allocate")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _free_in_cgroups(root: Path) -> list[int]:
    """What is left below the limit of this process's cgroup and of those above it, versions 1 and 2."""
    found, mounts = [], root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        base, names = mounts, ("memory.max", "memory.current", "inactive_file")
        if controllers:
            base, names = mounts / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if "memory" not in controllers.split(","):
                continue
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                if limit != "max":
                    found.append(max(0, int(limit) - int(used) + int(stat.get(names[2], 0))))
            except (OSError, ValueError):
                pass
            if folder == base:
                break
    return found


def _free_on_gpu(index: int) -> int | None:
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.mem_get_info(index)[0]
    found = gpus.usable()
    rows, _ = gpus.nvidia_smi("memory.free", gpu=found[index].uuid) if index < len(found) else ([], "")
    return int(rows[0][0]) * 2**20 if rows and rows[0][0].isdigit() else None
