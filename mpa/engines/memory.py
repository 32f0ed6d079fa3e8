"""What fits into the memory of the `hf` engine: the estimate before the weights are loaded, and the probe of a GPU after it."""

import mpa.files.light_imports  # noqa: F401  isort: skip

import math
import sys
from collections.abc import Sequence

import torch
from PIL import Image

from mpa.engines import Request
from mpa.engines.prefix_cache import reset_rope_deltas
from mpa.files.image_files import ImageError, open_image
from mpa.files.printable import as_size
from mpa.files.records import InputError
from mpa.models import gpus, loading, memory_estimate
from mpa.models.device_memory import available_bytes, is_out_of_memory
from mpa.models.memory_estimate import CANNOT_FIT, described, meta_model

OUT_OF_MEMORY = "out of memory; try a smaller --max-pixels"
MEMORY_SHARE = 0.8  # of a GPU's free memory, for batches
PROBE_TOKENS = 8  # of each reply
STEP_BYTES = 80  # for each word of the vocabulary, in each row: logits, and the sort in float64 that samples a token
LOOKED_AT = 64  # requests


def check_weights(path: str, settings, quantization: str | None):
    """Raise InputError if the weights alone clearly do not fit into the device's free memory. Reads the configuration only.

    Returns the model without weights; None if it cannot be built.

    `settings` has device, dtype, device_map and trust_remote_code: an engine, or a stage's arguments.
    """
    device = loading.pick_device(settings.device)
    model, free = _without_weights(path, settings), free_bytes(settings)
    if model is None or free is None or not memory_estimate.CHECKED:
        return model
    itemsize = _itemsize(str(settings.dtype), device, path)
    needed = memory_estimate.weight_bytes(model, itemsize, loading.BITS.get(quantization))
    if needed > CANNOT_FIT * free:
        raise InputError(
            f"{path}: its weights need {as_size(needed)}, and {device} has {as_size(free)} free. Use "
            f"{'' if quantization else '--quantization 4bit (for an L-VLM), '}--device-map auto over several GPUs, or a smaller "
            "model. MEMORY_CHECK=0 tries it all the same."
        )
    return model


def _without_weights(path: str, settings):
    return meta_model(loading.adapted(path) or path, settings.trust_remote_code)


def free_bytes(settings) -> int | None:
    """The device's free memory, with a device map that of all GPUs; None if it cannot be known."""
    device = loading.pick_device(settings.device)
    if not (settings.device_map and device.startswith("cuda")):
        return available_bytes(device)
    each = [available_bytes(f"cuda:{index}") for index in range(len(gpus.usable()))]
    return None if None in each else sum(each)


def _itemsize(dtype: str, device: str, path: str) -> int:
    """Bytes of a weight."""
    return getattr(torch, loading.resolved_dtype(dtype.removeprefix("torch."), device, path)).itemsize


def estimate(engine, requests: Sequence[Request], model) -> dict[str, int]:
    """Bytes by purpose for the largest of the first requests, in all rows of a batch and in all processes of the engine.

    `model` is without weights, or None. On a GPU of one row: there, a probe finds how many rows fit. {} if it cannot be told.
    """
    request = max(requests[:LOOKED_AT], key=engine.plan.estimated_length, default=None)
    if model is None or request is None:
        return {}
    try:
        image = open_image(request.image_path)
        inputs = engine.preprocessor.process([image], [request.prompt])
    except (ImageError, ValueError, RuntimeError, MemoryError):
        return {}
    on_gpu = engine.device.startswith("cuda")
    rows, pixels = 1 if on_gpu else engine.plan.batch_size, inputs["pixel_values"]
    # What a processor makes of an image: a picture, a tensor, a stack of tensors; then patches, or tiles that are padded.
    copies = 2 if pixels.ndim < 3 else 2.75
    batch = memory_estimate.Batch(
        rows,
        tokens=rows * inputs["input_ids"].shape[1],
        patches=rows * memory_estimate.patches(model, pixels.shape),
        pixel_bytes=rows * 4 * pixels.size,
        preparing=0 if on_gpu else round(rows * (copies * 4 * pixels.size + 3 * 3 * image.width * image.height)),
        new_tokens=request.max_new_tokens,
    )
    itemsize = _itemsize(str(engine.dtype), engine.device, engine.model_path)
    processes = 1 if on_gpu else max(1, engine.workers or 0)
    return memory_estimate.generation(model, batch, itemsize, loading.BITS.get(engine.quantization), processes)


def line(engine, requests: Sequence[Request]) -> str:
    """`estimate` as text, beside the free memory; "" if there is none."""
    sizes, free = estimate(engine, requests, _without_weights(engine.model_path, engine)), free_bytes(engine)
    known = "" if free is None else f" of {as_size(free)} free on {engine.device}"
    rows, tokens = f"{engine.plan.batch_size} rows", engine.plan.batch_tokens
    on_gpu = engine.device.startswith("cuda")
    rows = f"a row; a batch has at most {rows} and {tokens} tokens" if on_gpu else f"{rows} in each process"
    return f"{described(sizes)}{known} with {rows}" if sizes else ""


def check(engine, requests: Sequence[Request]) -> None:
    """`check_weights`, and a warning if the `estimate` is above the free memory."""
    model = check_weights(engine.model_path, engine, engine.quantization)
    sizes, free = estimate(engine, requests, model), free_bytes(engine)
    if free is not None and sum(sizes.values()) > free:
        print(
            f"warning: {engine.model_path}: memory may run out: {described(sizes)} of {as_size(free)} free. A smaller "
            "--batch-size, --workers or --max-pixels needs less.",
            file=sys.stderr,
        )


def tokens_that_fit(engine) -> tuple[int, int]:
    """(tokens of a batch that fit into the free memory of a CUDA GPU, or of each that shares the model; `row_tokens`).

    The tokens are rounded down to four binary digits, by 1/16 on average: where the free memory differs a little when a run
    is resumed, its batches are mostly the same.

    Measures the peak memory of a batch of one and of three rows, with images of the largest size. Their difference is
    the memory of two rows; the weights and other constant costs cancel out. Where three rows do not fit, one is taken to.

    The peak is that of the prompts' activations. Later tokens need only key-values, which are a part of it: to count a
    reply of any length by the same bytes is safe. What a step needs for each row, however short, is STEP_BYTES.
    """
    edge = int(engine.pixels[1] ** 0.5)
    image, request = Image.new("RGB", (edge, edge)), Request("", "", "What is it?", max_new_tokens=PROBE_TOKENS)
    devices, peaks = {weight.device for weight in engine.model.parameters() if weight.is_cuda}, {}
    for rows in (1, 3):
        inputs = engine.preprocessor.process([image] * rows, [request.prompt] * rows)
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        try:
            engine.reply([request] * rows, inputs)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reset_rope_deltas(engine.model)
            torch.cuda.empty_cache()
            return inputs["input_ids"].shape[1] + PROBE_TOKENS, 0
        peaks[rows] = {device: torch.cuda.max_memory_allocated(device) for device in devices}
    torch.cuda.empty_cache()
    tokens = 2 * (inputs["input_ids"].shape[1] + PROBE_TOKENS)
    each = {device: max(1, peaks[3][device] - peaks[1][device]) / tokens for device in devices}  # bytes of a token
    fitting = min(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] / size for device, size in each.items())
    step = STEP_BYTES * engine.model.config.get_text_config().vocab_size
    digits = max(0, int(fitting).bit_length() - 4)
    return max(1, int(fitting) >> digits << digits), math.ceil(step / min(each.values()))
