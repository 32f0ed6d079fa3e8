"""What fits into the memory of the `hf` engine: how an out-of-memory error is recognised, and the probe of a GPU."""

import torch
from PIL import Image

from mpa.engines import Request

OUT_OF_MEMORY = "out of memory; try a smaller --max-pixels"
MEMORY_SHARE = 0.8  # of a GPU's free memory, for batches
PROBE_TOKENS = 8  # of each reply


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
