"""What only a GPU can tell. Each test prints its figures, for scripts/check_gpu.sh. DEVICE=cpu tries them without one, in miniature."""

import gc
import os

import pytest
import torch
from conftest import STUDENT, TEACHER, bash, close
from PIL import Image
from training import MINI, losses, write

from mpa.engines import Request, open_engine
from mpa.engines.hf import HFEngine
from mpa.files.records import read_records
from mpa.method.prompts import TASK_PROMPTS, answer_prompt
from mpa.models import loading

DEVICE = os.environ.get("DEVICE") or "cuda:0"
GPUS = torch.cuda.device_count() if DEVICE != "cpu" else 0
ON_GPU = pytest.mark.skipif(not GPUS, reason="needs a CUDA GPU")
pytestmark = [pytest.mark.gpu] + [ON_GPU] * (DEVICE != "cpu")
PIXELS = {"min_pixels": 3136, "max_pixels": 3136}


def requests(images, **more) -> list[Request]:
    paths = sorted(images.rglob("*.png"))
    asked = [(path, answer_prompt("what color is the shape?")) for path in paths]
    asked += [(path, TASK_PROMPTS["general"]) for path in paths]
    return [Request(str(i), str(path), prompt, **more) for i, (path, prompt) in enumerate(asked)]


def replies(asked, model, device: str, dtype: str, **settings) -> dict[str, dict]:
    settings = {**PIXELS, "device": device, "dtype": dtype, **settings}
    with open_engine("hf", model_path=str(model), **settings) as engine:
        return {reply["key"]: reply for batch in engine.generate(asked) for reply in batch}


def texts(found: dict[str, dict]) -> list[tuple]:
    return [(found[key].get("text"), found[key].get("follow_up", {}).get("text")) for key in sorted(found)]


def test_every_device_multiplies_in_every_dtype():
    torch.manual_seed(0)
    a, b = (torch.randn(256, 256, dtype=torch.float64) for _ in range(2))
    exact = a @ b
    for device in [f"cuda:{i}" for i in range(GPUS)] or ["cpu"]:
        name, free = "CPU", ""
        if GPUS:
            properties = torch.cuda.get_device_properties(device)
            name, (left, total) = properties.name, torch.cuda.mem_get_info(device)
            free = f", capability {properties.major}.{properties.minor}, {left / 1e9:.1f} of {total / 1e9:.1f} GB free"
        uses, most, errors = loading.resolved_dtype("auto", device), {"float32": 1e-5, "float16": 1e-2}, {}
        most.setdefault(uses, 3e-2)  # bfloat16, where the GPU has it
        for dtype in most:
            product = a.to(device, getattr(torch, dtype)) @ b.to(device, getattr(torch, dtype))
            errors[dtype] = ((product.cpu().double() - exact).abs().max() / exact.abs().max()).item()
        told = ", ".join(f"{dtype} {error:.0e}" for dtype, error in errors.items())
        print(f"\n{device}: {name}{free}; uses {uses}; errors of a product: {told}")
        assert all(errors[dtype] < most[dtype] for dtype in most)


@pytest.mark.parametrize("model", [TEACHER, STUDENT], ids=["teacher", "student"])
def test_float32_replies_and_their_follow_ups_are_the_cpus(images, model):
    asked = requests(images, follow_up="paper") + [
        Request(f"drawn {r.key}", r.image_path, r.prompt, temperature=1.0) for r in requests(images)
    ]
    ours, cpus = (replies(asked, model, device, "float32") for device in (DEVICE, "cpu"))
    equal = sum(a == b for a, b in zip(texts(ours), texts(cpus), strict=True))
    print(f"\n{model.name}, float32: {equal} of {len(asked)} replies are those of the CPU")
    assert texts(ours) == texts(cpus)
    for key, reply in ours.items():
        assert close(reply["logprob"], cpus[key]["logprob"], 1e-3, least=1)  # nat


def test_most_replies_in_the_gpus_own_dtype_are_the_cpus_in_float32(images):
    dtype = loading.resolved_dtype("auto", DEVICE)
    asked = requests(images)
    ours, cpus = replies(asked, TEACHER, DEVICE, dtype), replies(asked, TEACHER, "cpu", "float32")
    equal = sum(a == b for a, b in zip(texts(ours), texts(cpus), strict=True))
    print(f"\nteacher, {dtype}: {equal} of {len(asked)} replies are those of the CPU in float32")
    assert equal > len(asked) / 2


@ON_GPU
def test_a_model_leaves_no_memory_behind(images):
    loaded, left = [], []
    for _ in range(3):
        with HFEngine(str(TEACHER), device=DEVICE, **PIXELS) as engine:
            list(engine.generate(requests(images, follow_up="paper")))
            loaded.append(torch.cuda.memory_allocated())
        gc.collect()
        left.append(torch.cuda.memory_allocated())  # cuBLAS keeps some
    print(f"\nbytes while the teacher is loaded, three times: {loaded}; after each: {left}")
    assert left[2] - left[0] < (loaded[0] - left[0]) / 4


@pytest.mark.slow  # it fills the GPU, which other tests may need at the same time
@ON_GPU
def test_batches_as_large_as_the_probe_allows_fit(tmp_path):
    """All but 3 GB of the GPU are taken, so that some hundred images fill it."""
    Image.effect_noise((448, 448), 60).convert("RGB").save(tmp_path / "a.png")
    gc.collect()
    torch.cuda.empty_cache()
    taken = torch.empty(max(0, torch.cuda.mem_get_info(DEVICE)[0] - 3 * 10**9), dtype=torch.uint8, device=DEVICE)
    settings = {"batch_size": 10_000, "min_pixels": 448**2, "max_pixels": 448**2, "device": DEVICE}
    with HFEngine(str(TEACHER), **settings) as engine:
        engine.load()
        limit = engine.plan.batch_tokens
        asked = [Request(str(i), str(tmp_path / "a.png"), TASK_PROMPTS["general"], 64) for i in range(10_000)]
        length = engine.plan.estimated_length(asked[0]) + 64
        asked = asked[: max(1, int(limit / length))]
        torch.cuda.reset_peak_memory_stats(DEVICE)
        found = [reply for batch in engine.generate(asked) for reply in batch]
        peak = torch.cuda.max_memory_allocated(DEVICE) - taken.numel()
        print(f"\nthe probe allows {limit:,} tokens in 3 GB: {len(asked)} images took {peak / 1e9:.2f} GB at most")
        assert not [reply for reply in found if "error" in reply]
        assert engine.plan.batch_tokens == limit, "a batch did not fit"


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA GPUs")
def test_two_processes_with_a_gpu_each_write_what_one_writes(images, tmp_path):
    settings = {"LVLM": TEACHER, "IMAGES": images, "DTYPE": "float32", "MIN_PIXELS": 3136, "MAX_PIXELS": 3136}
    for gpus in (1, 2):
        done = bash("scripts/PA.sh", RUN=f"{tmp_path}/{gpus}/", GPUS=gpus, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (read_records(tmp_path / f"{gpus}/PA_teacher_images.json", "PA") for gpus in (1, 2))
    asked = ("image_path", "predicted_question", "predicted_answer", "left_out")
    assert [[record[name] for name in asked] for record in one] == [[record[name] for name in asked] for record in two]
    print("\ntwo processes with a GPU each write what one writes")


@pytest.mark.slow
def test_training_has_the_losses_of_a_training_on_the_cpu(tmp_path):
    """As PL.sh trains: on a GPU with DeepSpeed, in bfloat16 or float16."""
    write(tmp_path, 16)
    steps = "--learning_rate 1e-4 --merger_lr 1e-4 --vision_lr 1e-4 --save_strategy no --max_steps 6".split()
    pixels = MINI[MINI.index("--image_min_pixels") :]
    settings = {"MODEL": STUDENT, "DATA": tmp_path / "train.json", "IMAGES": tmp_path, "ZERO": "zero2"}
    settings |= {"BATCH_SIZE": 2, "ACCUMULATION": 2, "NPROC_PER_NODE": 1}
    for out, visible in (("cpu", {"CUDA_VISIBLE_DEVICES": ""}), ("device", {})):
        done = bash(
            "PL/Qwen2-VL-Finetune/scripts/finetune.sh",
            *pixels,
            *steps,
            OUTPUT_DIR=tmp_path / out,
            **settings,
            **visible,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    cpus, ours = losses(tmp_path / "cpu"), losses(tmp_path / "device")
    print(f"\nlosses on {DEVICE}: {ours}; on the CPU in float32: {cpus}")
    assert close(ours, cpus, 0.03)
