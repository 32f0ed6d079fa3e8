"""Which GPUs there are: on fake answers of nvidia-smi and of torch, and never silently the CPU."""

import os

import pytest
import torch
from conftest import STUDENT
from fake_gpus import NEW, OLD, nvidia_smi, seen_by_torch, uuid

from mpa.files import distributed
from mpa.files.records import InputError
from mpa.models import device_memory, gpus, loading

TOO_OLD = RuntimeError(
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
)
NOT_READY = RuntimeError(
    "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized\nCompile with …"
)
NO_DRIVER = RuntimeError("Found no NVIDIA driver on your system.")
WITHOUT_CUDA = AssertionError("Torch not compiled with CUDA enabled")
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """`machine(…)` sets what torch, nvidia-smi and the PCI bus say."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "PCI_DEVICES", tmp_path / "pci")
    gpus._asked.cache_clear()

    def make(capabilities=(), failure=None, counted=None, cuda="13.0", on_bus=False, **smi):
        gpus._asked.cache_clear()
        seen_by_torch(monkeypatch, list(capabilities), failure, counted)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setenv("PATH", f"{nvidia_smi(tmp_path / 'bin', **smi)}:{os.environ['PATH']}")
        for name, vendor, kind in (
            ("0", "0x8086", "0x030000"),
            ("1", "0x10de", "0x040300"),
            ("2", "0x10de", "0x030200"),
        ):
            if on_bus or name != "2":
                (tmp_path / "pci" / name).mkdir(parents=True)
                (tmp_path / "pci" / name / "vendor").write_text(f"{vendor}\n")
                (tmp_path / "pci" / name / "class").write_text(f"{kind}\n")

    yield make
    gpus._asked.cache_clear()


DAMAGED = {
    "old driver": (
        {"failure": TOO_OLD, "counted": 8, "gpus": 8, "driver": OLD},
        ("8 x NVIDIA A100, driver 535.104.05", "built for CUDA 13.0, which needs driver 580 or newer", "whl/cu126"),
    ),
    "old driver, CUDA 12": (
        {"failure": TOO_OLD, "counted": 1, "gpus": 1, "driver": "470.1", "cuda": "12.6"},
        ("driver 470.1", "CUDA 12.6, which needs driver 525"),
    ),
    "torch without CUDA": (
        {"failure": WITHOUT_CUDA, "cuda": None, "gpus": 2},
        ("2 x NVIDIA A100", "it is built without CUDA", "without TORCH_INDEX"),
    ),
    "libraries of another driver": ({"failure": NO_DRIVER, "says": MISMATCH, "on_bus": True}, (MISMATCH, "restart")),
    "no fabric manager": ({"failure": NOT_READY, "counted": 8, "gpus": 8}, ("Error 802", "nvidia-fabricmanager")),
    "no device files": ({"failure": NO_DRIVER, "gpus": 1}, ("Found no NVIDIA driver", f"driver {NEW}")),
    "an old card": (
        {"capabilities": [(8, 0), (6, 1)], "gpus": 2},
        ("GPU 1, A card, has compute capability 6.1, and it is built for 7.5", "CUDA_VISIBLE_DEVICES", "whl/cu126"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_gpus_that_torch_cannot_use_are_an_error_and_the_cpu_is_used_on_purpose_only(damage, machine, monkeypatch):
    settings, told = DAMAGED[damage]
    machine(**settings)
    for ask in (
        gpus.usable,
        loading.pick_device,
        lambda: loading.pick_device("cuda"),
        lambda: loading.resolved_dtype("auto"),
    ):
        with pytest.raises(InputError) as raised:
            ask()
        assert all(words in str(raised.value) for words in told), raised.value
        assert "CUDA_VISIBLE_DEVICES='' uses the CPU on purpose" in str(raised.value)
    assert loading.pick_device("cpu") == "cpu" and loading.resolved_dtype("auto", "cpu") == "float32"
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert loading.pick_device() == "cpu" and gpus.visible() == {}


def test_the_trainer_neither_trains_on_the_cpu_nor_in_float16_with_an_old_driver(
    machine, monkeypatch, tmp_path, capsys
):
    import launch
    import params

    machine(**DAMAGED["old driver"][0])
    flags = ["--model_id", str(STUDENT), "--data_path", "train.json", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(InputError, match="needs driver 580"):
        params.parse(flags)
    assert params.parse([*flags, "--use_cpu", "True"])[2].device.type == "cpu"
    monkeypatch.setattr("sys.argv", ["launch.py", "train", "--standalone", "--", *flags])
    monkeypatch.setenv("ZERO", "zero2.json")
    assert launch.main() == 2 and "needs driver 580" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("says", "on_bus"),
    [("NVIDIA-SMI has failed because it couldn't communicate", False), ("No devices were found", True)],
)
def test_a_machine_without_gpus_uses_the_cpu_although_nvidia_smi_is_installed(says, on_bus, machine):
    machine(failure=NO_DRIVER, says=says, on_bus=on_bus)
    assert gpus.usable() == () and gpus.visible() == {} and loading.pick_device() == "cpu"


def test_cuda_is_asked_in_a_fork_and_once(machine, monkeypatch, tmp_path):
    machine([(9, 0)] * 2)
    asked = tmp_path / "asked"
    monkeypatch.setattr(torch.cuda, "init", lambda: asked.open("a").write(f"{os.getpid()}\n"))
    assert [gpu.uuid for gpu in gpus.usable()] == [uuid(0), uuid(1)]
    assert loading.pick_device() == "cuda:0" and loading.pick_device("cuda:1") == "cuda:1"
    assert loading.resolved_dtype("auto") == "bfloat16"
    assert asked.read_text().split() != [str(os.getpid())] and len(asked.read_text().split()) == 1
    with pytest.raises(InputError, match="cuda:2: no such device"):
        loading.pick_device("cuda:2")


def test_a_process_that_has_asked_cuda_before_is_asked_itself(machine, monkeypatch):
    machine([(9, 0)])
    before = os.getpid()
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: os.getpid() != before)
    assert [gpu.name for gpu in gpus.usable()] == ["A card"]


def test_a_driver_that_ends_the_process_that_asks_is_an_error(machine, monkeypatch):
    machine([(9, 0)], gpus=1)
    monkeypatch.setattr(torch.cuda, "init", lambda: os._exit(1))
    with pytest.raises(InputError, match="the driver ended the process"):
        gpus.usable()


def test_each_gpu_has_its_own_dtype_and_each_process_a_gpu(machine, monkeypatch):
    machine([(7, 5), (8, 6)])
    assert [loading.resolved_dtype("auto", f"cuda:{i}") for i in (0, 1)] == ["float16", "bfloat16"]
    monkeypatch.setattr(distributed, "LOCAL_RANK", 1)
    monkeypatch.setattr(distributed, "LOCAL_WORLD", 2)
    assert loading.pick_device() == "cuda:1" and loading.resolved_dtype("auto") == "bfloat16"
    monkeypatch.setattr(distributed, "LOCAL_WORLD", 8)
    with pytest.raises(InputError, match="8 processes take a GPU each, and 2 can be used here"):
        loading.pick_device()


def test_free_memory_is_that_of_the_gpu_whatever_the_order_of_cuda(machine, monkeypatch):
    machine([(9, 0)] * 3, gpus=3)
    monkeypatch.setattr(gpus, "usable", lambda: tuple(gpus.Gpu("", uuid(i), (9, 0)) for i in (2, 0)))
    assert [device_memory.available_bytes(f"cuda:{i}") for i in (0, 1, 2)] == [3 * 2**30, 2**30, None]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, {"0": uuid(0), "1": uuid(1), "2": uuid(2)}),
        ("2, 0", {"2": uuid(2), "0": uuid(0)}),
        ("1,-1,2", {"1": uuid(1)}),
        ("GPU-1", {"GPU-1": uuid(1)}),
        ("MIG-GPU-8932f937/1/2,MIG-5b3a", {"MIG-GPU-8932f937/1/2": "MIG-GPU-8932f937/1/2", "MIG-5b3a": "MIG-5b3a"}),
        ("0,3", "there is no GPU 3; nvidia-smi has 0, 1, 2"),
        ("GPU-9", "there is no GPU GPU-9"),
        ("all", "there is no GPU all"),
        ("0,1,GPU-0", "names GPU GPU-0 twice"),
    ],
)
def test_visible_gpus_are_named_as_cuda_reads_them(named, expected, machine, monkeypatch):
    machine(gpus=3)
    if named:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    if isinstance(expected, dict):
        assert gpus.visible() == expected
    else:
        with pytest.raises(InputError, match=expected):
            gpus.visible()


def test_a_variable_that_names_no_gpu_is_an_error_not_the_cpu(machine, monkeypatch):
    machine(failure=RuntimeError("No CUDA GPUs are available"), gpus=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=7: there is no GPU 7; nvidia-smi has 0, 1, 2, 3"):
        loading.pick_device()


def test_the_remedies_are_those_of_the_torch_that_is_installed():
    """At the next major version of CUDA: its oldest driver, and another index for older ones."""
    assert gpus.OLDEST_DRIVER[torch.version.cuda.split(".")[0]] == 580 if torch.version.cuda else True
    older = {f"cu{cuda.replace('.', '')}" for cuda in torch.cuda.PYTORCH_RELEASES_CODE_CC}
    assert gpus.OLDER_CUDA.split("/whl/")[1].split()[0] in older
