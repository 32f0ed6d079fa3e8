"""The estimate of the memory, from a configuration, against measured peaks; and what is refused because of it."""

import json
import os
import random
import subprocess
import sys

import activations
import miniatures
import params
import pytest
import train
import training_memory
from conftest import MINI, ROOT, STUDENT, TEACHER, python
from PIL import Image
from training import arguments, build, conversation, write

from mpa.engines import Request, memory
from mpa.engines.hf import HFEngine
from mpa.files.printable import as_size
from mpa.files.records import InputError
from mpa.models import device_memory, memory_estimate

# A Qwen2-VL of 95 M parameters.
TEXT = {"hidden_size": 768, "intermediate_size": 2688, "num_hidden_layers": 10, "num_attention_heads": 12}
VISION = {"embed_dim": 384, "depth": 8, "num_heads": 6, "mlp_ratio": 4, "hidden_size": 768}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}}


# --- against measured peaks --------------------------------------------------------------------------------


def make(folder, family: str, edge: int, n: int) -> None:
    """A model in folder/model, and n samples about images of noise, `edge` pixels square."""
    miniatures.make(family, folder / "model")
    rng, records = random.Random(1), []
    for i in range(n):
        Image.frombytes("RGB", (edge, edge), rng.randbytes(3 * edge * edge)).save(folder / f"{i}.png")
        records.append(conversation(f"{i}.png", "<image>\nwhat is it?", "a red one") | {"id": i})
    (folder / "train.json").write_text(json.dumps(records))


def peaks(folder, kind: str, *flags) -> tuple[int, int]:
    """(measured, estimated) bytes, in a process of its own.

    Freed memory is given back at once there: what glibc keeps of it is no tensor, and depends on the run.
    """
    command = [sys.executable, ROOT / "tests/memory_peak.py", kind, folder, folder / "model", *flags]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(kind, *flags, found["measured"], found["estimated"])
    return found["measured"], sum(found["estimated"].values())


PIXELS = "--image_min_pixels 3136 --image_max_pixels 200704 --gradient_accumulation_steps 1".split()


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", *(pytest.param(f, marks=pytest.mark.slow) for f in miniatures.FAMILIES if f != "qwen2_vl")],
)
def test_the_estimate_for_replies_of_a_tiny_model_is_within_a_quarter_of_the_peak(tmp_path, family):
    make(tmp_path, family, 224, 96)
    measured, estimated = peaks(tmp_path, "reply", "96")
    assert estimated == pytest.approx(measured, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "smolvlm", "llava_next", "llava_onevision"])
def test_the_estimate_for_training_a_tiny_model_is_within_a_quarter_of_the_peak(tmp_path, family):
    make(tmp_path, family, 224, 96)
    measured, estimated = peaks(tmp_path, "train", *PIXELS, "--per_device_train_batch_size", "48")
    assert estimated == pytest.approx(measured, rel=0.25)


@pytest.fixture(scope="module")
def hundred_million(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hundred_million")
    made = miniatures._qwen("qwen2_vl", VISION, 14, **TEXT, **ROPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniatures, "_qwen2", lambda family: made)
        make(folder, "qwen2_vl", 280, 16)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--gradient_accumulation_steps 2",
        "--activation_checkpointing True",
        "--activation_checkpointing products",
        "--lora_enable True",
        "--freeze_vision_tower True",
    ],
)
def test_the_estimate_for_a_hundred_million_parameters_is_within_a_quarter_of_the_peak(hundred_million, flags):
    measured, estimated = peaks(hundred_million, "train", *PIXELS, "--per_device_train_batch_size", "4", *flags.split())
    assert estimated == pytest.approx(measured, rel=0.25)
    if not flags:
        for rows in ("1", "16"):
            measured, estimated = peaks(hundred_million, "reply", rows)
            assert estimated == pytest.approx(measured, rel=0.25)


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_weights_are_those_of_the_file(tmp_path, family):
    model = memory_estimate.meta_model(miniatures.make(family, tmp_path))
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert memory_estimate.weight_bytes(model, 4) == pytest.approx(stored, rel=0.02)
    in_four = memory_estimate.weight_bytes(model, 4, bits=4)
    quantised = sum(layer.weight.numel() for layer in memory_estimate.quantisable(model).values())
    assert 0 < in_four == memory_estimate.weight_bytes(model, 4) - round(quantised * (4 - 0.516))


@pytest.mark.parametrize(
    ("size", "expected"), [(982_000, "982 kB"), (999_600, "1 MB"), (15.24e9, "15.2 GB"), (1.236e12, "1.24 TB")]
)
def test_a_size_has_three_digits_and_its_unit(size, expected):
    assert as_size(size) == expected


def test_zero_divides_the_states_and_offloading_moves_them(tmp_path):
    model = memory_estimate.meta_model(str(STUDENT))
    n = sum(weight.numel() for weight in model.parameters())
    sharding = memory_estimate.Sharding
    assert memory_estimate.states(model, 2, sharding(2, 4)) == {
        "weights": 2 * n,
        "gradients": round(4 * n / 4),
        "optimizer state": round(12 * n / 4),
    }
    offloaded = memory_estimate.states(model, 2, sharding(2, 4, True))
    assert offloaded == {"weights": 2 * n, "offloaded": round(16 * n / 4)}
    sharded = memory_estimate.states(model, 2, sharding(3, 4, True, True))
    assert sharded["offloaded"] == round(18 * n / 4) and sharded["weights"] < 2 * n
    assert memory_estimate.described(sharded).endswith(" MB offloaded")


# --- the free memory ---------------------------------------------------------------------------------------


def machine(root, available: int, cgroup: str = "", limits: dict | None = None):
    """A machine's /proc and /sys with so many free kB, and files of cgroups."""
    for name, text in {
        "proc/meminfo": f"MemTotal: 900 kB\nMemAvailable: {available} kB\nSwapFree: 10 kB\n",
        "proc/self/cgroup": cgroup,
        **(limits or {}),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def limited(
    folder: str, limit, used: int, cached: int, names=("memory.max", "memory.current", "inactive_file")
) -> dict:
    found = {names[0]: f"{limit}\n", names[1]: f"{used}\n", "memory.stat": f"anon 5\n{names[2]} {cached}\n"}
    return {f"{folder}/{name}": text for name, text in found.items()}


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("", {}, 510 * 1024),
        ("0::/job", limited("sys/fs/cgroup/job", 100_000, 60_000, 1000), 41_000),
        ("0::/job", limited("sys/fs/cgroup/job", "max", 60_000, 0), 510 * 1024),
        ("0::/job/part", limited("sys/fs/cgroup/job", 90_000, 60_000, 0), 30_000),
        ("0::/", limited("sys/fs/cgroup", 80_000, 60_000, 0), 20_000),
        (
            "3:cpu:/x\n4:memory:/job",
            limited(
                "sys/fs/cgroup/memory/job",
                70_000,
                60_000,
                0,
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ),
            10_000,
        ),
    ],
)
def test_a_cpu_has_what_is_available_within_the_limit_of_its_cgroups(tmp_path, cgroup, limits, expected):
    assert device_memory.available_bytes("cpu", machine(tmp_path, 500, cgroup, limits)) == expected


def test_without_proc_nothing_is_known(tmp_path):
    assert device_memory.available_bytes("cpu", tmp_path) is None


# --- what is said and refused ------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """`free(bytes)`: so much is free, for stages and trainer."""

    def set_free(size: int) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda device: size)
        monkeypatch.setattr(activations, "available_bytes", lambda device: size)

    return set_free


def test_a_dry_run_prints_the_memory(images, tmp_path):
    common = ("--dataset", "images", "--image-root", images, "--run", f"{tmp_path}/run", "--limit", 4, *MINI)
    done = python("PA.py", *common, "--model-path-lvlm", TEACHER, "--dry-run")
    assert done.returncode == 0 and "  memory, estimated: weights " in done.stdout and " free on cpu" in done.stdout


def test_a_stage_refuses_weights_that_cannot_fit_and_warns_of_the_rest(images, tmp_path, free, monkeypatch, capsys):
    size = memory_estimate.weight_bytes(memory_estimate.meta_model(str(TEACHER)), 4)
    common = ("--dataset", "images", "--image-root", images, "--run", f"{tmp_path}/run", "--limit", 4, *MINI)
    free(size // 2)
    done = python("PA.py", *common, "--model-path-lvlm", TEACHER)
    assert done.returncode == 1 and "its weights need 8.44 MB" in done.stderr and "MEMORY_CHECK=0" in done.stderr
    asked = [Request("0", str(next(images.rglob("*.png"))), "What is it?", 8)]
    with HFEngine(str(TEACHER), device="cpu", dtype="float32", min_pixels=3136, max_pixels=3136) as engine:
        free(size + 1000)
        engine.load(asked)
    assert "memory may run out: weights " in capsys.readouterr().err
    free(size // 2)
    monkeypatch.setattr(memory_estimate, "CHECKED", False)
    HFEngine(str(TEACHER), device="cpu", dtype="float32", min_pixels=3136, max_pixels=3136).load()


def test_the_s_vlm_is_checked_before_the_l_vlm_is_asked(images, tmp_path, free):
    common = ("--dataset", "images", "--image-root", images, "--run", f"{tmp_path}/run", "--limit", 4, *MINI)
    annotations = [{"question_id": 0, "image_path": str(next(images.rglob("*.png")))}]
    annotations[0] |= {"predicted_question": "what is it?", "predicted_answer": "red"}
    annotations[0] |= {"ground_truth_question": None, "ground_truth_answer": None}
    (tmp_path / "PA.json").write_text(json.dumps(annotations))
    small, large = (memory_estimate.weight_bytes(memory_estimate.meta_model(str(p)), 4) for p in (STUDENT, TEACHER))
    free((small + large) // 2)
    both = ("--model-path-lvlm", STUDENT, "--model-path-svlm", TEACHER, "--pa-json", tmp_path / "PA.json")
    done = python("PI.py", *common, *both)
    assert done.returncode == 1 and f"{TEACHER}: its weights need" in done.stderr
    assert not list((tmp_path / "run").glob("PI_*"))


def test_the_trainer_says_what_it_needs_and_refuses_what_cannot_fit(tmp_path, free, monkeypatch, capsys):
    write(tmp_path, 4)
    build(tmp_path)
    assert "PL: memory (est.): weights " in capsys.readouterr().out
    model_args, _, args = params.parse(arguments(tmp_path))
    size = training_memory.on_device(
        training_memory.states_of(training_memory.planned_model(model_args, args), 16, args), args.device
    )
    free(int(size * 0.95))
    build(tmp_path)
    assert "warning: memory may run out: weights " in capsys.readouterr().err
    free(size // 2)
    loaded = []
    monkeypatch.setattr(train, "load_model", lambda *_: loaded.append(1))
    with pytest.raises(InputError, match=r"needs weights .* has 0\.\d+ GB free .*--lora_enable True"):
        build(tmp_path)
    assert not loaded


def test_auto_is_estimated_as_the_first_policy_that_fits(tmp_path, free):
    write(tmp_path, 8)
    sizes = {}
    for policy, available in (("False", 10**12), ("True", 10**12), ("auto", 10**12), ("auto", 10**6)):
        free(available)
        flags = ("--activation_checkpointing", policy, "--per_device_train_batch_size", "4", "--max_steps", "1")
        model_args, data_args, args = params.parse(arguments(tmp_path, *flags, "--gradient_accumulation_steps", "2"))
        samples = train.read(data_args.data_path, data_args, args)
        checked = train.prepare(samples, train.load_processor(model_args, data_args), data_args)
        model = memory_estimate.meta_model(str(STUDENT))
        sizes[policy, available] = training_memory.estimate(model, model_args, data_args, args, checked)["activations"]
    assert sizes["auto", 10**12] == sizes["False", 10**12] > sizes["True", 10**12] == sizes["auto", 10**6]
