"""Loading a model with the language model's linear layers quantised by bitsandbytes.

Vision tower, merger, embeddings and output layer keep their precision, as in Qwen2-VL-Finetune.
"""

import logging


def options(bits: int, kept: list[str], compute_dtype, device_map) -> dict:
    """Arguments of `from_pretrained` for int8 (8 bits) or nf4 with double quantisation (4 bits).

    `kept` are the linear layers that are not quantised (`memory_estimate.unquantised`).
    """
    from transformers import BitsAndBytesConfig

    # It warns of int8's casts to float16 at each of them.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return {"quantization_config": config, "device_map": device_map}


def forbid_packing(model) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a CPU's bfloat16 kernel, after a model is loaded.

    It does so in the first forward pass in eval mode. That kernel has no gradient: a layer that is trained on afterwards
    passes none on, with no more than a warning (bitsandbytes 0.50.2). And its results are not float32's.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
