"""Which GPUs torch can use here, and why it cannot use those that are there. Engines, trainer, launcher and runner ask this file.

    usable()     the GPUs in torch's order; an error where the machine has some that torch cannot use
    visible()    their names for $CUDA_VISIBLE_DEVICES, from nvidia-smi alone

    python -m mpa.models.gpus     says what is wrong; scripts/setup.sh calls it

Neither initialises CUDA in this process, unless it was asked here before, or NVML does not know the GPUs (MIG, Jetson).
nvidia-smi counts in PCI order and CUDA the fastest first, so nvidia-smi is asked about a GPU of torch by its UUID.
"""

import multiprocessing
import os
import subprocess
import sys
import warnings
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from mpa.files.records import InputError
from mpa.files.signals import signals_held

OLDEST_DRIVER = {"12": 525, "13": 580}  # for each CUDA: docs.nvidia.com/deploy/cuda-compatibility
# Wheels of the same torch for older drivers, and for cards from Maxwell to Volta.
OLDER_CUDA = "remove .venv, then TORCH_INDEX=https://download.pytorch.org/whl/cu126 bash scripts/setup.sh"
PCI_DEVICES, NVIDIA, DISPLAY = Path("/sys/bus/pci/devices"), "0x10de", "0x03"


class Gpu(NamedTuple):
    """A GPU that torch can use."""

    name: str
    uuid: str
    capability: tuple[int, int]

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bfloat16, which older cards only emulate."""
        return self.capability >= (8, 0)


def usable() -> tuple[Gpu, ...]:
    """The GPUs that this process may use; () if there is none, or $CUDA_VISIBLE_DEVICES hides them.

    Raises InputError if the machine has GPUs and torch cannot use them, or one of them.
    """
    import torch

    if _named() == [] or not (torch.cuda.device_count() or _driver_has_gpus()):
        return ()
    why_not, found = _asked()
    if why_not:
        visible()  # a wrong $CUDA_VISIBLE_DEVICES is a clearer reason
        raise InputError(_explained(why_not, found))
    return found


def refuse_more(processes: int) -> None:
    """Raise InputError for more processes than GPUs, of which each takes one. Without a GPU they run on the CPU."""
    n = len(usable())
    if 0 < n < processes:
        raise InputError(f"{processes} processes take a GPU each, and {n} can be used here. Start at most {n}.")


def visible() -> dict[str, str]:
    """{name for $CUDA_VISIBLE_DEVICES: UUID} of the GPUs that are visible, in the order of nvidia-smi or of the variable.

    The UUID is the name where nvidia-smi does not know it, as for a MIG device. Raises InputError for the name of no GPU.
    """
    rows, _ = nvidia_smi("index", "uuid")
    uuids, named, found = dict(rows), _named(), {}
    for name in uuids if named is None else named:
        uuid = uuids.get(name) or next((uuid for uuid in uuids.values() if uuid.startswith(name)), name)
        unknown = uuids and uuid not in uuids.values() and not uuid.startswith("MIG-")
        if unknown or uuid in found.values():
            given, known = os.environ["CUDA_VISIBLE_DEVICES"], ", ".join(uuids)
            why = f"there is no GPU {name}; nvidia-smi has {known}" if unknown else f"names GPU {name} twice"
            raise InputError(f"CUDA_VISIBLE_DEVICES={given}: {why}.")
        found[name] = uuid
    return found


def nvidia_smi(*fields: str, gpu: str | None = None) -> tuple[list[list[str]], str]:
    """(these fields of each GPU, what nvidia-smi says if it fails); ([], "") where it is not installed."""
    of = ["-i", gpu] if gpu else []
    command = ["nvidia-smi", *of, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return [], ""
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode:
        return [], lines[0] if lines else f"exit status {done.returncode}"
    return [[field.strip() for field in line.split(",")] for line in lines], ""


def _named() -> list[str] | None:
    """What $CUDA_VISIBLE_DEVICES names, up to the first that is no name, as CUDA reads it; None if it is not set."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    names = (name.strip() for name in given.split(","))
    return list(takewhile(lambda name: name not in ("", "NoDevFiles") and name[0] != "-", names))


def _driver_has_gpus() -> bool:
    """Whether nvidia-smi lists GPUs, or fails on a machine that has one."""
    rows, failure = nvidia_smi("index")
    if rows or not failure or failure.startswith("No devices"):
        return bool(rows)
    found = ((d / "vendor", d / "class") for d in PCI_DEVICES.glob("*"))
    return any(v.read_text().strip() == NVIDIA and c.read_text().startswith(DISPLAY) for v, c in found)


@cache
def _asked() -> tuple[str, tuple[Gpu, ...]]:
    """`_ask` in a fork of this process: in this one CUDA stays uninitialised, and processes may still be forked from it."""
    import torch

    if torch.cuda.is_initialized() or sys.platform != "linux":
        return _ask()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    fork = multiprocessing.get_context("fork").Process(target=lambda: sender.send(_ask()))
    with signals_held():
        fork.start()
    sender.close()
    try:
        return receiver.recv() or _ask()
    except EOFError:
        return "the driver ended the process that asked for them", ()
    finally:
        fork.join()


def _ask() -> tuple[str, tuple[Gpu, ...]] | None:
    """(why torch cannot use the GPUs, or "", the GPUs). None in a fork of a process that has asked CUDA before: no fork can."""
    import torch

    if torch.cuda._is_in_bad_fork():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what is an error here
        try:
            torch.cuda.init()
            found = tuple(map(_gpu, range(torch.cuda.device_count())))
        except Exception as error:
            return str(error).strip().split("\n")[0].removesuffix("."), ()
        built_for = [int("".join(filter(str.isdigit, code))) for code in torch.cuda.get_arch_list() if "_" in code]
    oldest = divmod(min(built_for, default=0), 10)
    for index, gpu in enumerate(found):
        if gpu.capability < oldest:
            compared = "compute capability {}.{}, and it is built for {}.{} and newer".format(*gpu.capability, *oldest)
            return f"GPU {index}, {gpu.name}, has {compared}", found
    return "", found


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, f"GPU-{properties.uuid}", (properties.major, properties.minor))


def _explained(why_not: str, found: tuple[Gpu, ...]) -> str:
    """The error, with the driver's version and the remedy. `found` are the GPUs if one of them is too old."""
    import torch

    cuda, (rows, failure) = torch.version.cuda, nvidia_smi("name", "driver_version")
    name, driver = rows[0] if rows else ("", "")
    oldest = OLDEST_DRIVER.get(str(cuda).partition(".")[0], 0)
    told = f"{len(rows)} x {name}, driver {driver}" if rows else f"nvidia-smi: {failure or 'not installed'}"
    if found:
        remedy = f"Name the other GPUs in CUDA_VISIBLE_DEVICES, or install torch for an older CUDA: {OLDER_CUDA}"
    elif not cuda:
        why_not = "it is built without CUDA"
        remedy = "Install it with CUDA: remove .venv, then bash scripts/setup.sh without TORCH_INDEX"
    elif driver.partition(".")[0].isdigit() and int(driver.partition(".")[0]) < oldest:
        why_not = f"it is built for CUDA {cuda}, which needs driver {oldest} or newer"
        remedy = f"Update the driver, or install torch for an older CUDA: {OLDER_CUDA}"
    else:
        remedy = "After an update of the driver restart the machine; one with NVSwitch also needs nvidia-fabricmanager"
    return (
        f"torch {torch.__version__} cannot use the GPUs of this machine ({told}): {why_not}. {remedy}. "
        "CUDA_VISIBLE_DEVICES='' uses the CPU on purpose."
    )


if __name__ == "__main__":
    try:
        usable()
    except InputError as error:
        print(f"warning: {error}", file=sys.stderr)
