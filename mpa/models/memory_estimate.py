"""The memory that a model needs on a device, from its configuration alone: no weight is read.

The model is built on torch's meta device, where tensors have shapes but no content. The sizes of its modules then give the
bytes of weights, key-values and activations, for any family. Not counted: a mixture's experts that do not run, and
attention scores, which only "eager" attention stores.
"""

import math
import os
import re
from dataclasses import dataclass

from mpa.files.printable import as_size

CHECKED = os.environ.get("MEMORY_CHECK") != "0"  # 0: what cannot fit is tried all the same
CANNOT_FIT = 1.1  # this multiple of the free memory, for weights and states alone, is refused
ALL, PRODUCTS, INPUTS = "False", "products", "True"  # activation checkpointing: what a layer saves
# Bytes of a quantised weight, scales included: bitsandbytes' int8, and nf4 with double quantisation.
QUANTISED = {8: 1.002, 4: 0.516}
_QKV = re.compile(r"(?:^|\.)w?(?:q|k|v|qkv|query|key|value|query_key_value)(?:_proj)?$")


@dataclass(frozen=True)
class Batch:
    """The largest batch, or micro-batch of a training.

    `tokens` (padding included) and the vision tower's `patches` are over all `rows`. `pixel_bytes` are those of the
    images, `preparing` what the processor needs at one time where that is the same memory. `new_tokens` are generated in each
    row; in a training, `labelled` positions get logits.
    """

    rows: int
    tokens: int
    patches: int
    pixel_bytes: int = 0
    preparing: int = 0
    new_tokens: int = 0
    labelled: int = 0


@dataclass(frozen=True)
class Layer:
    """Bytes per position of one layer.

    `saved`, by policy of activation checkpointing: what the backward pass needs; `of_labelled`: the part of ALL that the
    last layer has for labelled positions only. `passing`: the most in memory at one time if nothing is saved.
    """

    saved: dict[str, float]
    of_labelled: float
    passing: float


# --- the model's sizes -----------------------------------------------------------------------------------


def meta_model(path: str, trust_remote_code: bool = False):
    """The model without weights, from its config.json; None if the Auto classes cannot build it: loading says why."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:
        return None


def quantisable(model) -> dict:
    """The linear layers of the language model by name, without the output layer: --quantization and --bits apply to them."""
    from torch.nn import Linear

    decoder = {id(module) for module in model.get_decoder().modules()}
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, Linear) and id(m) in decoder and "lora_" not in name
    }


def unquantised(model) -> list[str]:
    """Names of the linear layers that are not `quantisable`."""
    from torch.nn import Linear

    quantised = quantisable(model)
    return [name for name, module in model.named_modules() if isinstance(module, Linear) and name not in quantised]


def stored_bits(model) -> int | None:
    """Bits of the weights of a checkpoint that is quantised (AWQ, GPTQ, FP8 …), at least; None for one that is not."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    config = config if isinstance(config, dict) else config.to_dict()
    bits = config.get("bits") or config.get("w_bit") or (8 if "fp8" in str(config.get("quant_method")) else 4)
    return 8 if bits > 4 else 4


def weight_bytes(model, itemsize: int, bits: int | None = None) -> int:
    """Bytes of all weights, `itemsize` each; with `bits` (4 or 8), or if stored so, the `quantisable` ones are QUANTISED."""
    bits = bits or stored_bits(model)
    total = itemsize * sum(weight.numel() for weight in model.parameters())
    if bits in QUANTISED:
        total -= (itemsize - QUANTISED[bits]) * sum(layer.weight.numel() for layer in quantisable(model).values())
    return round(total)


def layer_size(layer, itemsize: int) -> Layer:
    """The sizes of one layer of attention and feed-forward network, from its linear layers and norms."""
    linears = {name.replace(".base_layer", ""): m for name, m in layer.named_modules() if hasattr(m, "in_features")}
    lora = [name for name in linears if ".lora_" in name]
    plain = {name: m for name, m in linears.items() if name not in lora}
    qkv = [m for name, m in plain.items() if _QKV.search(name)]
    attention = [m for name, m in plain.items() if "attn" in name or "attention" in name]
    *ups, down = [m for m in plain.values() if m not in attention] or [attention[-1]]
    width, inner, up = (
        qkv[0].in_features if qkv else down.out_features,
        down.in_features,
        sum(m.out_features for m in ups),
    )
    heads = next((m.in_features for m in attention if m not in qkv), width)  # all heads together

    def trained(modules) -> bool:
        return any(m.weight.requires_grad for m in modules)

    norms = 0
    for norm in (m for m in layer.modules() if "norm" in type(m).__name__.lower() and hasattr(m, "weight")):
        size = width if norm.weight.numel() == width else heads
        rms = "rms" in type(norm).__name__.lower()  # computed in float32; saves the normalised input too if trained
        norms += size * ((4 + itemsize * norm.weight.requires_grad) if rms else itemsize)
    # Query, key, value and result; of a fused projection also its output, which the value is a view of.
    attended = itemsize * (heads * (7 if len(qkv) == 1 else 4) + width * trained(qkv))
    gated = up > inner
    fed = itemsize * (width * trained(ups) + (1.5 if gated else 1) * up + inner * trained([down]))
    for name in lora:  # its dropout copies the input, and keeps a mask
        more = linears[name].in_features * (itemsize + (".lora_A" in name))
        attended, fed = (attended + more, fed) if "attn" in name or "attention" in name else (attended, fed + more)
    outs = itemsize * sum(m.out_features for m in linears.values())
    saved = {ALL: norms + attended + fed, PRODUCTS: outs + itemsize * (heads + width), INPUTS: itemsize * width}
    passing = max((3 if gated else 2) * inner, sum(m.out_features for m in qkv) + 3 * heads)
    return Layer(saved, fed, itemsize * (3 * width + passing))


def layers(model) -> tuple[list, list]:
    """(the vision tower's layers, the language model's), without the originals of which PEFT trains copies."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder, found = {id(module) for module in model.get_decoder().modules()}, ([], [])
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and ".original_module." not in name:
            found[id(module) in decoder].append(module)
    return found


def patches(model, shape) -> int:
    """The vision tower's positions for pixel values of this shape: [..., patches, size], or [..., channels, height, width]."""
    edge = getattr(model.config.vision_config, "patch_size", 14)
    edge = edge[0] if isinstance(edge, list | tuple) else edge
    return math.prod(shape) // (shape[-1] if len(shape) < 4 else shape[-3] * edge**2)


# --- estimates -------------------------------------------------------------------------------------------


def generation(model, batch: Batch, itemsize: int, bits: int | None = None, processes: int = 1) -> dict[str, int]:
    """Bytes by purpose for generating replies to a batch, in each of `processes` that share the weights."""
    text = model.config.get_text_config()
    vision, language = ([layer_size(layer, itemsize) for layer in part] for part in layers(model))
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    columns = batch.tokens + batch.rows * batch.new_tokens
    cached = 2 * len(language) * (getattr(text, "num_key_value_heads", None) or heads) * head * itemsize * columns
    width = itemsize * text.hidden_size
    # The images go through the tower first; then their features and the prompts through the language model.
    passing = max(
        batch.preparing,
        batch.patches * max((layer.passing for layer in vision), default=0) + 2 * batch.pixel_bytes,
        batch.tokens * (max(layer.passing for layer in language) + 2 * width) + batch.pixel_bytes,
    )
    logits = batch.rows * text.vocab_size * (itemsize + 3 * 4)  # float32 scores, log-probabilities
    each = {"key-values": cached, "activations": round(passing + logits)}
    return {"weights": weight_bytes(model, itemsize, bits), **{name: processes * size for name, size in each.items()}}


def saved_bytes(model, batch: Batch, itemsize: int, policy: str) -> int:
    """Bytes that a training's forward pass saves for its backward pass; recomputed layers add the largest of them."""
    vision, language = layers(model)
    text, total, largest = model.config.get_text_config(), 0, 0
    inside = {id(weight) for layer in language for weight in layer.parameters()}
    before = any(weight.requires_grad and id(weight) not in inside for weight in model.parameters())
    for part, positions, flows in ((vision, batch.patches, False), (language, batch.tokens, before)):
        for layer in part:
            flows = flows or any(weight.requires_grad for weight in layer.parameters())
            if flows:  # there is something to train in it or before it
                size = layer_size(layer, itemsize)
                skipped = size.of_labelled * max(0, positions - batch.labelled) * (layer is language[-1])
                total += size.saved[policy] * positions - skipped * (policy == ALL)
                largest = max(largest, size.saved[ALL] * positions - skipped)
    outside = batch.pixel_bytes + 4 * itemsize * text.hidden_size * batch.tokens  # embeddings, final norm
    logits = batch.labelled * text.vocab_size * (itemsize + 2 * 4)
    return round(total + outside + logits + largest * (policy != ALL))


@dataclass(frozen=True)
class Sharding:
    """How a training is spread: DeepSpeed's ZeRO `stage` (0: none), number of ranks, and what the machine's memory holds."""

    stage: int = 0
    world: int = 1
    optimizer_offloaded: bool = False
    weights_offloaded: bool = False


def states(model, itemsize: int, shards: Sharding, bits: int | None = None, state: int = 8) -> dict[str, int]:
    """Bytes by purpose of weights, gradients and optimizer state on each device; "offloaded" is in the machine's memory.

    `itemsize` is that of the compute dtype. Without ZeRO, weights and gradients are float32. DeepSpeed keeps the weights in the
    compute dtype, with a float32 copy in the optimizer, and adds up the gradients in float32 (its estimate_zero2_ and
    estimate_zero3_model_states_mem_needs, with gradients of 4 bytes). `state` are the optimizer's own bytes per trained
    weight: 8 for Adam.
    """
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if not shards.stage:
        return {"weights": weight_bytes(model, 4, bits), "gradients": 4 * trained, "optimizer state": state * trained}
    whole = shards.stage == 3
    weights = weight_bytes(model, itemsize, bits) / (shards.world if whole else 1)
    gradients, optimizer = 4 * trained / shards.world, (4 + state) * trained / shards.world
    offloaded = (gradients + optimizer) * shards.optimizer_offloaded + weights * shards.weights_offloaded
    gradients, optimizer = (0, 0) if shards.optimizer_offloaded else (gradients, optimizer)
    weights = 0 if shards.weights_offloaded else weights
    if whole:  # one layer at a time is whole
        largest = max(sum(w.numel() for w in layer.parameters()) for part in layers(model) for layer in part)
        weights += 2 * itemsize * max(largest, model.get_input_embeddings().weight.numel())
    sizes = {"weights": weights, "gradients": gradients, "optimizer state": optimizer, "offloaded": offloaded}
    return {name: round(size) for name, size in sizes.items() if size}


# --- as text -------------------------------------------------------------------------------------------


def described(sizes: dict[str, int]) -> str:
    """ "weights 4.4 GB, key-values 0.2 GB: 4.6 GB", with what is offloaded, to the machine's memory, after the sum."""
    there = dict(sizes)
    offloaded = there.pop("offloaded", 0)
    parts = ", ".join(f"{name} {as_size(n)}" for name, n in there.items())
    return f"{parts}: {as_size(sum(there.values()))}" + f", and {as_size(offloaded)} offloaded" * bool(offloaded)
