"""Loading of the model and its processor."""

import os
import subprocess
import sys

import param_groups
import torch
from params import DataArguments, ModelArguments, TrainingArguments
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from mpa.files import records
from mpa.files.records import InputError
from mpa.models import conversion, families, loading, model_files, quantization
from mpa.models.loading_errors import explained

OF_RANKS = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
CONVERT = records.REPOSITORY / "scripts/convert.py"


def converted(model_id: str) -> str:
    """The folder to load (`mpa.models.conversion`), of an original its conversion. Raises InputError if it cannot be converted.

    It is converted by scripts/convert.py, as DeepSpeed shards whatever model this process builds, and ranks wait for each other.
    """
    if conversion.original_type(model_id) is None:
        return model_id
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    done = subprocess.run(
        [sys.executable, CONVERT, "--cached", model_id], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise InputError(done.stderr.strip().removeprefix("error: "))
    print(done.stderr, end="", flush=True)
    return done.stdout.strip()


def load_processor(model_args: ModelArguments, data_args: DataArguments):
    """The model's processor with the limits of `data_args`. Raises InputError if it cannot be loaded, or cannot obey."""
    limits = _limits(data_args)
    return loading.limited_processor(model_args.model_id, *limits, trust_remote_code=model_args.trust_remote_code)


def _limits(data_args: DataArguments) -> tuple:
    return data_args.image_min_pixels, data_args.image_max_pixels, data_args.max_tiles


def said_of_limits(model_args: ModelArguments, data_args: DataArguments) -> str:
    """One line about given limits that the model does not know, or ""."""
    return families.said_of_limits(model_type(model_args), *_limits(data_args))


def model_type(model_args: ModelArguments) -> str:
    return _config(model_args).model_type


def _config(model_args: ModelArguments):
    with explained(model_args.model_id):
        return AutoConfig.from_pretrained(model_args.model_id, trust_remote_code=model_args.trust_remote_code)


def load_model(model_args: ModelArguments, args: TrainingArguments):
    """The model in float32 (autocast makes it compute in bfloat16 or float16), with frozen parts or LoRA adapters.

    Raises InputError if it cannot be loaded.
    """
    kind = model_type(model_args)
    warning = param_groups.check_parts(kind, model_args, args)
    if warning and args.process_index == 0:
        print(warning, file=sys.stderr)
    flash = not model_args.disable_flash_attn2 and is_flash_attn_2_available() and (args.bf16 or args.fp16)
    flash = flash and kind in families.FAMILIES and not families.FAMILIES[kind].both_ways
    attention = {"attn_implementation": "flash_attention_2"} if flash else {}  # else PyTorch's, or Gemma 2's own
    quantised = {}
    if model_args.bits != 16:
        places, trusted = {"": args.device}, model_args.trust_remote_code
        quantised = loading.quantised(
            model_args.model_id, "--bits", model_args.bits, compute_dtype(args), places, trusted
        )
    base = {} if model_args.lora_enable else None
    with explained(model_args.model_id):
        model = model_files.load(
            model_args.model_id,
            record=base,
            dtype="float32",
            trust_remote_code=model_args.trust_remote_code,
            **attention,
            **quantised,
        )
    quantization.forbid_packing(model)
    if is_deepspeed_zero3_enabled():
        # transformers 5.23 keeps every renaming that its loader knows, used or not, and would save wrong names.
        model._weight_conversions = []
    if model_args.lora_enable:
        model = param_groups.add_lora(model, model_args)
        model.base_digests = base  # saved with the adapters
        return model
    param_groups.freeze(model, model_args)
    return model


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """Dtype that the model computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def save_dtype(model_args: ModelArguments) -> torch.dtype:
    """Dtype of the final weights: --save_dtype, by default the base model's."""
    if model_args.save_dtype != "auto":
        return getattr(torch, model_args.save_dtype)
    config = _config(model_args)
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
