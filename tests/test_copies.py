"""The trainer works without `mpa`: what both need is one file, in both folders."""

import pytest
from conftest import ROOT

STAGES, TRAINER = ROOT / "mpa", ROOT / "PL/Qwen2-VL-Finetune/src"
SHARED = [
    "device_memory.py",
    "disk_errors.py",
    "families.py",
    "image_files.py",
    "light_imports.py",
    "loading_errors.py",
]
SHARED += ["log_file.py", "memory_estimate.py", "model_files.py", "quantization.py"]


def test_a_name_in_both_folders_is_a_shared_file():
    assert sorted({path.name for path in STAGES.glob("*.py")} & {path.name for path in TRAINER.glob("*.py")}) == SHARED


@pytest.mark.parametrize("name", SHARED)
def test_both_copies_are_the_same_file(name):
    assert (STAGES / name).read_bytes() == (TRAINER / name).read_bytes()
