"""Loading of the model and its processor."""

import memory_estimate
import param_groups
import quantization
import torch
from params import DataArguments, ModelArguments, TrainingArguments
from record_formats import DataError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_flash_attn_2_available


def load_processor(model_args: ModelArguments, data_args: DataArguments):
    """The model's processor with the pixel limits of `data_args`. Raises DataError if it cannot be loaded."""
    processor = _from_pretrained(AutoProcessor, model_args)
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
    quantised = _quantised(model_args, args) if model_args.bits != 16 else {}
    model = _from_pretrained(
        AutoModelForImageTextToText, model_args, dtype="float32", use_safetensors=True, **attention, **quantised
    )
    quantization.forbid_packing(model)
    if is_deepspeed_zero3_enabled():
        # transformers 5.23 keeps every renaming that its loader knows, used or not, and would save wrong names.
        model._weight_conversions = []
    if model_args.lora_enable:
        return param_groups.add_lora(model, model_args)
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
    try:
        return auto_class.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None
