"""Load any supported VLM: checks before loading, device and dtype, processor, weights."""

import os
import sys
from functools import cache
from pathlib import Path

from mpa.files import distributed
from mpa.files.records import InputError, read_json
from mpa.models import conversion, families, gpus, model_files
from mpa.models.device_memory import extend_segments
from mpa.models.identity import adapted
from mpa.models.loading_errors import explained
from mpa.models.memory_estimate import meta_model, stored_bits, unquantised
from mpa.models.model_files import ADAPTER_WEIGHTS, INDEX, WEIGHTS, BrokenModel
from mpa.models.quantization import forbid_packing
from mpa.models.quantization import options as quantization_options

BITS = {"8bit": 8, "4bit": 4}  # values of --quantization
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def check_model_path(path: str) -> None:
    """Raise InputError if a model's folder is incomplete, before anything slow is imported.

    A path that is not an existing folder counts as a hub id, unless it looks like a path.
    """
    folder = Path(path)
    if not folder.is_dir():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not folder.parent.is_dir():
            conversion.original_type(path)  # asks the hub for config.json: a misspelt or gated id is an error here
            return
        raise InputError(f"{path}: no such model folder. Give a folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct.")
    if conversion.original_type(path):
        conversion.check_original(folder)
        return
    if base := adapted(path):
        try:
            check_model_path(base)
        except InputError as error:
            raise InputError(f"{path}: holds adapters for another model. {error}") from None
    elif not (folder / "config.json").exists():
        raise InputError(f"{path}: no config.json in it; is it a model's folder?")
    weights = (WEIGHTS, INDEX, ADAPTER_WEIGHTS)
    if not any((folder / name).exists() for name in weights):
        raise InputError(f"{path}: no safetensors weights in it ({' or '.join(weights)}).")
    if not any((folder / name).exists() for name in PROCESSOR_FILES):
        raise InputError(
            f"{path}: no processor in it ({' or '.join(PROCESSOR_FILES)}). "
            "Copy the base model's processor and tokenizer files into it."
        )
    check_files(path, content=False)


def check_files(path: str, content: bool = True) -> None:
    """`model_files.check` of a model's folder. Raises InputError."""
    try:
        model_files.check(Path(path), content)
    except BrokenModel as error:
        raise InputError(str(error)) from None


def model_type(path: str) -> str | None:
    """The `model_type` of a folder or hub id, for an original checkpoint that of its conversion; None without a config.json."""
    base = adapted(path) or path
    config = Path(base, "config.json") if Path(base).is_dir() else conversion.hub.config_file(base)
    content = read_json(config, finite=False) if config.is_file() else None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        return None
    return conversion.LAYOUTS[kind][0] if kind in conversion.LAYOUTS else kind


def pick_device(device: str = "auto") -> str:
    """The device. "auto": this process's CUDA GPU (by local rank), else Apple's GPU, else the CPU.

    Raises InputError if the device does not exist, or the machine has GPUs that torch cannot use. CUDA is not initialised.
    """
    import mpa.files.light_imports  # noqa: F401  isort: skip
    import torch

    if device != "auto":
        try:
            requested = torch.device(device)
        except RuntimeError as error:
            raise InputError(f"--device {device}: {_first_line(error)}") from None
        counts = {"cuda": lambda: len(gpus.usable()), "mps": lambda: int(torch.backends.mps.is_available())}
        if requested.type in counts and (requested.index or 0) >= counts[requested.type]():
            raise InputError(f"--device {device}: no such device; use auto to select an available one.")
        return f"cuda:{distributed.LOCAL_RANK}" if device == "cuda" else device
    if gpus.usable():
        gpus.refuse_more(distributed.LOCAL_WORLD)
        return f"cuda:{distributed.LOCAL_RANK}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def resolved_dtype(dtype: str, device: str = "auto", path: str | None = None) -> str:
    """The dtype named, or for "auto" that of the model at `path` on this device. It is fixed, so a resumed run uses the same.

    GPU: bfloat16. If the GPU only emulates bfloat16: float16, or float32 for a family that overflows in float16. CPU:
    float32, with which greedy replies do not depend on the batch; bfloat16, the checkpoints' dtype, is hundreds of times
    slower on a CPU without matrix units.
    """
    if dtype != "auto":
        return dtype
    device = pick_device(device)
    if not device.startswith("cuda"):
        return "float32"
    if gpus.usable()[int(device.partition(":")[2] or 0)].has_bfloat16:
        return "bfloat16"
    family = families.FAMILIES.get(model_type(path)) if path else None
    if family is None or not family.overflows:
        return "float16"
    _say_once(f"{family.name} overflows in float16, and this GPU has no bfloat16: {path} computes in float32.")
    return "float32"


@cache
def _say_once(line: str) -> None:
    if distributed.FIRST:
        print(line, file=sys.stderr)


# Used for a model behind a server, whose tokenizer is unknown: the marks of common model families, beside replies.END_TOKENS.
COMMON_MARKS = frozenset(
    "<image> <video> <audio> <unk> <pad> <IMG_CONTEXT> <img> </img> <box> </box> <ref> </ref> <quad> </quad> "
    "<fake_token_around_image> <row_1_col_1> <global-img> <start_of_image> <end_of_image> <image_soft_token> "
    "[IMG] [IMG_BREAK] [IMG_END] <image_placeholder> <|image|>".split()
)


@cache
def format_marks(path: str | None, trust_remote_code: bool = False) -> frozenset[str]:
    """The special tokens of a model's prompt format, with image and video placeholders. No annotation may hold one.

    `path` is None for a model behind a server; the result is then COMMON_MARKS.
    """
    if path is None:
        return COMMON_MARKS
    folder = Path(adapted(path) or path)
    if not (folder / "tokenizer.json").is_file():
        return processor_marks(load_processor(str(folder), families.MIN_PIXELS, families.MAX_PIXELS, trust_remote_code))
    marks = set()  # read from the files: loading a processor takes seconds
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *PROCESSOR_FILES):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        tokens = content.get("added_tokens", []) + list(content.get("added_tokens_decoder", {}).values())
        marks |= {token["content"] for token in tokens if _is_mark(token["content"], token.get("special"))}
        named = (value for key, value in content.items() if key.endswith("_token") and value)
        marks |= {str(value.get("content", "") if isinstance(value, dict) else value) for value in named}
    return frozenset(mark for mark in marks if len(mark.strip()) > 1)


def processor_marks(processor) -> frozenset[str]:
    """`format_marks` for a loaded processor."""
    tokenizer = processor.tokenizer
    marks = {str(token) for token in tokenizer.added_tokens_decoder.values() if _is_mark(str(token), token.special)}
    for name in (
        "image_token",
        "video_token",
        "fake_image_token",
        "global_image_tag",
        "end_of_utterance_token",
        "start_image_token",
    ):
        for owner in (processor, tokenizer):
            mark = getattr(owner, name, None)
            marks.add(str(getattr(mark, "content", mark) or ""))
    return frozenset(mark for mark in {*marks, *tokenizer.all_special_tokens} if len(mark.strip()) > 1)


def _is_mark(token: str, special: bool | None) -> bool:
    return bool(special) or (token[:1] in "<[" and token[-1:] in ">]")


def load_processor(
    path: str, min_pixels: int, max_pixels: int, trust_remote_code: bool = False, max_tiles: int | None = None
):
    """The model's processor with left padding, to generate from. See `limited_processor`."""
    processor = limited_processor(path, min_pixels, max_pixels, max_tiles, trust_remote_code)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def limited_processor(
    path: str, min_pixels: int, max_pixels: int, max_tiles: int | None = None, trust_remote_code: bool = False
):
    """The model's own processor with the limits that it knows (`families.image_settings`). Raises InputError if it cannot be loaded."""
    from transformers import AutoProcessor

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with explained(path):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not hasattr(processor, "tokenizer"):
        raise InputError(f"{path}: has no processor for images and text, only a {type(processor).__name__}.")
    families.use_original_pixels(processor, path)
    try:
        families.apply_limits(processor, model_type(path), min_pixels, max_pixels, max_tiles)
    except ValueError as error:
        raise InputError(f"{path}: --{error}") from None
    return processor


def load_model(path: str, device: str, dtype, trust_remote_code=False, quantization=None, device_map=None):
    """The model, ready to generate. `transformers` selects the class from the checkpoint's config.

    LoRA adapters are merged into their base model, unless that is quantised ("8bit" or "4bit"). `device_map` "auto"
    spreads the model over all GPUs; its inputs then go to `model.device`.
    """
    import torch
    from transformers.utils import logging

    if device.startswith("cuda"):
        import torch

        extend_segments()
        torch.cuda.set_device(device)  # kernels of bitsandbytes, Triton and flash-attention run on the current one
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # cuDNN's default in convolutions, which the patches go through
    base = adapted(path)
    options = {"device_map": device_map} if device_map else {}
    if quantization:
        places = device_map or {"": device}
        options = quantised(base or path, "--quantization", BITS[quantization], dtype, places, trust_remote_code)
    with explained(path):
        try:
            model = model_files.load(
                base or path, path if base else None, dtype=dtype, trust_remote_code=trust_remote_code, **options
            )
        except ImportError as error:  # a checkpoint that is quantised in another way
            raise InputError(
                f"{path}: --engine hf lacks a package that it needs: {_first_line(error)} --engine vllm reads AWQ, GPTQ and FP8."
            ) from None
        if base:
            model = model.get_base_model() if quantization else model.merge_and_unload()
    forbid_packing(model)
    return (model if options else model.to(device)).eval()


def quantised(path: str, flag: str, bits: int, dtype, device_map, trust_remote_code: bool) -> dict:
    """Arguments of `from_pretrained` that quantise the language model. Raises InputError, which names `flag`, if it is quantised already."""
    planned = meta_model(path, trust_remote_code)
    if planned is None:
        return {}  # loading says what is wrong
    if stored_bits(planned):
        raise InputError(f"{path}: is stored quantised. Leave out {flag}, or name the original model.")
    return quantization_options(bits, unquantised(planned), dtype, device_map)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
