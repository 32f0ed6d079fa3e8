"""What fits into the memory of the `hf` engine: the estimate before the weights are loaded, the probe of a GPU after it, and
how an out-of-memory error is recognised."""

import sys
from collections.abc import Sequence

import torch
from PIL import Image

from mpa import memory_estimate, models
from mpa.engines import Request
from mpa.image_files import ImageError, open_image
from mpa.memory_estimate import CANNOT_FIT, available_bytes, described, meta_model
from mpa.records import InputError

OUT_OF_MEMORY = "out of memory; try a smaller --max-pixels"
MEMORY_SHARE = 0.8  # of a GPU's free memory, for batches
PROBE_TOKENS = 8  # of each reply
LOOKED_AT = 64  # requests


def check_weights(path: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> None:
    """Raise InputError if the weights alone clearly do not fit into the device's free memory. Reads the configuration only."""
    device = models.pick_device(device)
    model = meta_model(models.adapted(path) or path, trust_remote_code)
    free = available_bytes(device)
    if model is None or free is None or not memory_estimate.CHECKED:
        return
    needed = memory_estimate.weight_bytes(
        model, getattr(torch, models.resolved_dtype(dtype.removeprefix("torch."), device)).itemsize
    )
    if needed > CANNOT_FIT * free:
        raise InputError(
            f"{path}: its weights need {needed / 1e9:.3g} GB, and {device} has {free / 1e9:.3g} GB free. Use a larger "
            "device or a smaller model. MEMORY_CHECK=0 tries it all the same."
        )


def _itemsize(dtype: str, device: str) -> int:
    """Bytes of a weight. Does not ask a GPU, which would initialise CUDA before the workers are forked."""
    if dtype == "auto" and device.startswith("cuda"):
        return 2  # bfloat16 or float16
    return getattr(torch, models.resolved_dtype(dtype.removeprefix("torch."), device)).itemsize


def estimate(engine, requests: Sequence[Request]) -> dict[str, int]:
    """Bytes by purpose for the largest of the first requests, in all rows of a batch and in all processes of the engine.

    On a GPU of one row: there, a probe finds how many rows fit. {} if it cannot be told.
    """
    model = meta_model(models.adapted(engine.model_path) or engine.model_path, engine.trust_remote_code)
    request = max(requests[:LOOKED_AT], key=engine.plan.estimated_length, default=None)
    if model is None or request is None:
        return {}
    try:
        image = open_image(request.image_path)
        inputs = engine.preprocessor.process([image], [request.prompt])
    except (ImageError, ValueError, RuntimeError):
        return {}
    on_gpu = engine.device.startswith("cuda")
    rows, pixels = 1 if on_gpu else engine.plan.batch_size, inputs["pixel_values"]
    copies = 2 if pixels.ndim < 4 else 4  # that a processor makes of images on the way to patches, or to tiles
    batch = memory_estimate.Batch(
        rows,
        tokens=rows * inputs["input_ids"].shape[1],
        patches=rows * memory_estimate.patches(model, pixels.shape),
        pixel_bytes=rows * 4 * pixels.size,
        preparing=0 if on_gpu else rows * (copies * 4 * pixels.size + 2 * 3 * image.width * image.height),
        new_tokens=request.max_new_tokens,
    )
    itemsize = _itemsize(str(engine.dtype), engine.device)
    return memory_estimate.generation(model, batch, itemsize, processes=1 if on_gpu else max(1, engine.workers or 0))


def line(engine, requests: Sequence[Request]) -> str:
    """`estimate` as text, beside the free memory; "" if there is none."""
    sizes, free = estimate(engine, requests), available_bytes(engine.device)
    known = "" if free is None else f" of {free / 1e9:.3g} GB free on {engine.device}"
    rows = "a row" if engine.device.startswith("cuda") else f"{engine.plan.batch_size} rows in each process"
    return f"{described(sizes)}{known} with {rows}" if sizes else ""


def check(engine, requests: Sequence[Request]) -> None:
    """`check_weights`, and a warning if the `estimate` is above the free memory."""
    check_weights(engine.model_path, engine.device, str(engine.dtype), engine.trust_remote_code)
    sizes, free = estimate(engine, requests), available_bytes(engine.device)
    if free is not None and sum(sizes.values()) > free:
        print(
            f"warning: {engine.model_path}: memory may run out: {described(sizes)} of {free / 1e9:.3g} GB free. A smaller "
            "--batch-size, --workers or --max-pixels needs less.",
            file=sys.stderr,
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Recognises the errors of torch on GPUs and CPUs, and of the libraries below it, by their messages."""
    words = ("out of memory", "not enough memory", "allocate memory", "alloc_failed", "bad_alloc", "unable to allocate")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def tokens_that_fit(engine) -> int:
    """How many tokens of a batch fit into a CUDA GPU's free memory.

    Measures the peak memory of a batch of one and of three rows, with images of the largest size. Their difference is
    the memory of two rows; the weights and other constant costs cancel out.
    """
    edge = int(engine.pixels[1] ** 0.5)
    image, request = Image.new("RGB", (edge, edge)), Request("", "", "What is it?", max_new_tokens=PROBE_TOKENS)
    peaks = {}
    for rows in (1, 3):
        inputs = engine.preprocessor.process([image] * rows, [request.prompt] * rows)
        torch.cuda.reset_peak_memory_stats(engine.device)
        engine.reply([request] * rows, inputs)
        peaks[rows] = torch.cuda.max_memory_allocated(engine.device)
    per_token = max(1, peaks[3] - peaks[1]) / (2 * (inputs["input_ids"].shape[1] + PROBE_TOKENS))
    torch.cuda.empty_cache()
    return max(1, int(MEMORY_SHARE * torch.cuda.mem_get_info(engine.device)[0] / per_token))
