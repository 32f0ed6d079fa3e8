"""The model and its processor."""

import param_groups
import torch
from params import DataArguments, ModelArguments, TrainingArguments
from record_formats import DataError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available


def load(kind, model_args: ModelArguments, **options):
    """The model's processor or weights, as `kind` loads them. Raises DataError when it has none."""
    source, options["trust_remote_code"] = model_args.model_id, model_args.trust_remote_code
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def load_processor(model_args: ModelArguments, data_args: DataArguments):
    """Processor with the pixel limits."""
    processor = load(AutoProcessor, model_args)
    images = processor.image_processor
    if hasattr(images, "merge_size"):  # Qwen-style: the two "edges" are areas in pixels
        images.size = {"shortest_edge": data_args.image_min_pixels, "longest_edge": data_args.image_max_pixels}
    return processor


def load_model(model_args: ModelArguments, args: TrainingArguments):
    """Model in float32 (what it computes in is cast from that), frozen where asked, or with LoRA."""
    flash = not model_args.disable_flash_attn2 and is_flash_attn_2_available() and (args.bf16 or args.fp16)
    attention = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    model = load(AutoModelForImageTextToText, model_args, dtype="float32", use_safetensors=True, **attention)
    if is_deepspeed_zero3_enabled():
        # transformers 5.23 keeps all renamings that its loader knows, used or not, and would save wrong names by them.
        model._weight_conversions = []
    if model_args.lora_enable:
        return param_groups.add_lora(model, model_args)
    param_groups.freeze(model, model_args)
    return model


def save_dtype(model_args: ModelArguments) -> torch.dtype:
    """What the weights are written in at the end: as --save_dtype says, by default as the base's are."""
    if model_args.save_dtype != "auto":
        return getattr(torch, model_args.save_dtype)
    config = load(AutoConfig, model_args)
    of_base = config.dtype or getattr(config.get_text_config(), "dtype", None)
    return of_base if isinstance(of_base, torch.dtype) else torch.float32
