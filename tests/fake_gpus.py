"""A machine with GPUs, for tests: an `nvidia-smi` that answers for them, and what torch says of them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

OLD, NEW = "535.104.05", "580.95.05"
SMI = """#!{python} -SI
import sys
says, rows = {says!r}, {rows!r}
if says:
    sys.exit(print(says) or 18)
fields = next(word for word in sys.argv if word.startswith("--query-gpu=")).split("=")[1].split(",")
for row in rows:
    if "-i" not in sys.argv or sys.argv[sys.argv.index("-i") + 1] == row["uuid"]:
        print(", ".join(row[field] for field in fields))
"""


def uuid(index: int) -> str:
    return f"GPU-{index}aaaaaaa-0000-0000-0000-000000000000"


def nvidia_smi(folder: Path, gpus: int = 0, driver: str = NEW, says: str = "") -> Path:
    """Write folder/nvidia-smi, which lists so many GPUs, or `says` why it fails. GPU i has i + 1 GiB free. Returns the folder, for $PATH."""
    rows = [
        {
            "index": str(i),
            "uuid": uuid(i),
            "name": "NVIDIA A100",
            "driver_version": driver,
            "memory.free": f"{1024 * (i + 1)}",
        }
        for i in range(gpus)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(SMI.format(python=sys.executable, says=says, rows=rows))
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def seen_by_torch(
    monkeypatch, capabilities: list[tuple[int, int]], failure: Exception | None = None, counted=None
) -> None:
    """torch finds GPUs of these capabilities, or fails when it asks CUDA; `counted` by NVML: as many as there are."""

    def init():
        if failure:
            raise failure

    def properties(index):
        return SimpleNamespace(
            name="A card",
            uuid=uuid(index).removeprefix("GPU-"),
            major=capabilities[index][0],
            minor=capabilities[index][1],
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities) if counted is None else counted)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)  # as in a process that has not asked CUDA yet
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120", "compute_120"])
