"""Loading of the model and its processor."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import param_groups
import torch
from params import DataArguments, ModelArguments, TrainingArguments
from record_formats import DataError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available

from mpa.models import families, memory_estimate, model_files, quantization
from mpa.models.loading_errors import explain

ORIGINALS = ("internvl_chat", "tiny_llava_stablelm", "tinyllava")  # model types that transformers does not know
OF_RANKS = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
CONVERT = Path(__file__).resolve().parents[3] / "scripts/convert.py"


def native(model_id: str) -> str:
    """The folder to load: of an original InternVL2 or TinyLLaVA its conversion, made once by scripts/convert.py; else `model_id`.

    Every rank may call this: one converts, the others wait. Raises DataError if it cannot be converted.
    """
    if _config(model_id).get("model_type") not in ORIGINALS:
        return model_id
    if not CONVERT.is_file():
        raise DataError(f"{model_id}: an original checkpoint, and {CONVERT}, which converts it, is not there.")
    command = [sys.executable, str(CONVERT), "--cached", model_id]
    # It is no rank of this training: it prints, whichever rank asks, and waits for no other.
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise DataError(done.stderr.strip().removeprefix("error: "))
    print(done.stderr, end="", flush=True)
    return done.stdout.strip()


def _config(model_id: str) -> dict:
    """The content of config.json; {} if it cannot be read: loading the model says why."""
    try:
        return PreTrainedConfig.get_config_dict(model_id)[0]
    except (OSError, ValueError):
        return {}


def load_processor(model_args: ModelArguments, data_args: DataArguments):
    """The model's processor with the limits of `data_args`. Raises DataError if it cannot be loaded, or cannot obey."""
    processor = _from_pretrained(AutoProcessor, model_args)
    families.use_original_pixels(processor, model_args.model_id)
    try:
        families.apply_limits(processor, model_type(model_args), *_limits(data_args))
    except ValueError as error:
        raise DataError(f"{model_args.model_id}: --{error}") from None
    return processor


def _limits(data_args: DataArguments) -> tuple:
    return data_args.image_min_pixels, data_args.image_max_pixels, data_args.max_tiles


def said_of_limits(model_args: ModelArguments, data_args: DataArguments) -> str:
    """One line about given limits that the model does not know, or ""."""
    return families.said_of_limits(model_type(model_args), *_limits(data_args))


def model_type(model_args: ModelArguments) -> str:
    return _from_pretrained(AutoConfig, model_args).model_type


def load_model(model_args: ModelArguments, args: TrainingArguments):
    """The model in float32 (autocast makes it compute in bfloat16 or float16), with frozen parts or LoRA adapters.

    Raises DataError if it cannot be loaded.
    """
    kind = model_type(model_args)
    warning = param_groups.check_parts(kind, model_args, args)
    if warning and args.process_index == 0:
        print(warning, file=sys.stderr)
    flash = not model_args.disable_flash_attn2 and is_flash_attn_2_available() and (args.bf16 or args.fp16)
    flash = flash and kind in families.FAMILIES and not families.FAMILIES[kind].both_ways
    attention = {"attn_implementation": "flash_attention_2"} if flash else {}  # else PyTorch's, or Gemma 2's own
    quantised = _quantised(model_args, args) if model_args.bits != 16 else {}
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


def _quantised(model_args: ModelArguments, args: TrainingArguments) -> dict:
    """Arguments of `from_pretrained` for --bits. Raises DataError if the base is quantised already."""
    planned = memory_estimate.meta_model(model_args.model_id, model_args.trust_remote_code)
    if planned is None:
        return {}  # loading says what is wrong
    if memory_estimate.stored_bits(planned):
        raise DataError(f"{model_args.model_id}: is stored quantised. Name the original model, for --bits.")
    kept = memory_estimate.unquantised(planned)
    return quantization.options(model_args.bits, kept, compute_dtype(args), {"": args.device})


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """Dtype that the model computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def save_dtype(model_args: ModelArguments) -> torch.dtype:
    """Dtype of the final weights: --save_dtype, by default the base model's."""
    if model_args.save_dtype != "auto":
        return getattr(torch, model_args.save_dtype)
    config = _from_pretrained(AutoConfig, model_args)
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _from_pretrained(auto_class, model_args: ModelArguments, **options):
    source, options["trust_remote_code"] = model_args.model_id, model_args.trust_remote_code
    with explained(source):
        return auto_class.from_pretrained(source, **options)


@contextlib.contextmanager
def explained(source: str):
    """Raises DataError, in one sentence, for what loading the folder or hub id `source` raises."""
    try:
        yield
    except model_files.BrokenModel as error:
        raise DataError(str(error)) from None
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # a package for quantised weights may lack
        raise DataError(explain(source, error)) from None
