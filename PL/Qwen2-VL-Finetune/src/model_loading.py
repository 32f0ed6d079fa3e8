"""Loading of the model and its processor."""

import param_groups
import torch
from loading_errors import explain, incomplete
from params import DataArguments, ModelArguments, TrainingArguments
from record_formats import DataError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available


def load_processor(model_args: ModelArguments, data_args: DataArguments):
    """The model's processor with the pixel limits of `data_args`. Raises DataError if it cannot be loaded."""
    processor = _from_pretrained(AutoProcessor, model_args)
    if getattr(processor.image_processor, "original_backend", "") == "pil":  # set by scripts/convert.py
        processor.image_processor = _from_pretrained(AutoImageProcessor, model_args, backend="pil")
    image_processor = processor.image_processor
    if hasattr(image_processor, "merge_size"):  # Qwen-style: the two "edges" are areas in pixels
        image_processor.size = {
            "shortest_edge": data_args.image_min_pixels,
            "longest_edge": data_args.image_max_pixels,
        }
    return processor


def load_model(model_args: ModelArguments, args: TrainingArguments):
    """The model in float32 (autocast makes it compute in bfloat16 or float16), with frozen parts or LoRA adapters.

    Raises DataError if it cannot be loaded.
    """
    flash = not model_args.disable_flash_attn2 and is_flash_attn_2_available() and (args.bf16 or args.fp16)
    attention = {"attn_implementation": "flash_attention_2" if flash else "sdpa"}
    model, info = _from_pretrained(
        AutoModelForImageTextToText,
        model_args,
        dtype="float32",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `incomplete` reports them
        **attention,
    )
    if wrong := incomplete(model_args.model_id, info):
        raise DataError(wrong)
    if is_deepspeed_zero3_enabled():
        # transformers 5.23 keeps every renaming that its loader knows, used or not, and would save wrong names.
        model._weight_conversions = []
    if model_args.lora_enable:
        return param_groups.add_lora(model, model_args)
    param_groups.freeze(model, model_args)
    return model


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
    try:
        return auto_class.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(explain(source, error)) from None
