"""Whether a training fits into memory: estimated from the configuration, before the weights are loaded."""

import contextlib
import math
import sys

import param_groups
import torch
from activations import DESCRIPTIONS, INPUTS, USABLE_SHARE, free_bytes
from batching import StepBatchSampler, step_sampler
from model_loading import compute_dtype
from params import DataArguments, ModelArguments, TrainingArguments

from data import IGNORE, Samples
from mpa.files.records import InputError
from mpa.models import memory_estimate
from mpa.models.device_memory import is_out_of_memory
from mpa.models.families import FAMILIES
from mpa.models.memory_estimate import CANNOT_FIT, Batch, Sharding, described, saved_bytes

ROWS_ENCODED = 16  # of the largest micro-batch, to count labels and pixels
SMALLER = (
    "Smaller micro-batches (a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, or "
    "--batch_tokens) or a smaller --image_max_pixels need less."
)


def planned_model(model_args: ModelArguments, args: TrainingArguments):
    """The model to train, without weights, with frozen parts and LoRA; None if its configuration cannot be read.

    Raises InputError if its weights, gradients and optimizer state clearly do not fit into the free memory, and if its
    weights are stored quantised and would be trained themselves.
    """
    model = memory_estimate.meta_model(model_args.model_id, model_args.trust_remote_code)
    if model is None:
        return None
    if memory_estimate.stored_bits(model) and not model_args.lora_enable:
        raise InputError(
            f"{model_args.model_id}: is stored quantised. Name the original model, or add --lora_enable True."
        )
    if model_args.lora_enable:
        model = param_groups.add_lora(model, model_args)
    else:
        param_groups.freeze(model, model_args)
    sizes = states_of(model, model_args.bits, args)
    _refuse_too_large(sizes, args.device, model_args, args)
    if args.device.type != "cpu":  # each rank loads the model in the machine's memory; ZeRO-3 shards it there
        loaded = 0 if _sharding(args).stage == 3 else memory_estimate.weight_bytes(model, 4, model_args.bits)
        in_memory = {"weights": loaded} if loaded > sizes.get("offloaded", 0) else {"offloaded": sizes["offloaded"]}
        _refuse_too_large(in_memory, torch.device("cpu"), model_args, args)
    return model


def _refuse_too_large(sizes: dict[str, int], device: torch.device, model_args, args) -> None:
    needed, free = on_device(sizes, device), free_bytes(device)
    if memory_estimate.CHECKED and free is not None and needed > CANNOT_FIT * free:
        raise InputError(
            f"{model_args.model_id}: needs {described(sizes)} without activations, and {device} has {free / 1e9:.3g} GB "
            f"free for each process. {_remedy(model_args, args)} MEMORY_CHECK=0 tries it all the same."
        )


def _remedy(model_args: ModelArguments, args: TrainingArguments) -> str:
    remedies = [] if model_args.lora_enable else ["--lora_enable True"]
    if model_args.bits == 16:
        remedies.append("--lora_enable True --bits 4" if remedies else "--bits 4")
    if args.device.type == "cuda" and not _sharding(args).weights_offloaded:
        remedies.append("ZERO=zero3_offload")
    return f"Use {', '.join([*remedies, 'more devices'])} or a smaller model."


def states_of(model, bits: int, args: TrainingArguments) -> dict[str, int]:
    """`memory_estimate.states` of the training."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    state = 8 if "adamw" in optimizer else 4  # moments; others have one, or less
    state = 2 if "8bit" in optimizer else state
    return memory_estimate.states(model, compute_dtype(args).itemsize, _sharding(args), bits, state)


def _sharding(args: TrainingArguments) -> Sharding:
    config = args.hf_deepspeed_config.config.get("zero_optimization", {}) if args.deepspeed else {}
    offloaded = {
        name: config.get(name, {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param")
    }
    return Sharding(config.get("stage", 0), args.world_size, offloaded["offload_optimizer"], offloaded["offload_param"])


def on_device(sizes: dict[str, int], device: torch.device) -> int:
    """The bytes that are in this device's memory."""
    return sum(size for name, size in sizes.items() if name != "offloaded" or device.type == "cpu")


def estimate(
    model, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, samples: Samples
) -> dict[str, int]:
    """Bytes by purpose on each device, for `model` of `planned_model`, at the largest micro-batch of the first epoch."""
    sizes, itemsize = states_of(model, model_args.bits, args), compute_dtype(args).itemsize
    sampler, _ = step_sampler(samples.lengths, args, data_args.batch_tokens)
    batch, policy = largest_batch(model, sampler, data_args, samples), args.activation_policy
    if policy == "auto":
        left = USABLE_SHARE * ((free_bytes(args.device) or math.inf) - on_device(sizes, args.device))
        policy = next((p for p in DESCRIPTIONS if saved_bytes(model, batch, itemsize, p) <= left), INPUTS)
    activations = saved_bytes(model, batch, itemsize, policy)
    if args.device.type == "cpu":
        activations += 2 * batch.pixel_bytes  # the loader is a batch ahead
    if not args.deepspeed and itemsize < 4:  # autocast keeps a copy of the weights
        activations += memory_estimate.weight_bytes(model, itemsize)
    if not args.deepspeed and sampler.micro_batches == 1:  # in the backward pass, gradients come as activations go
        activations = max(0, activations - sizes["gradients"])
    if args.deepspeed:  # the optimizer's step, which has no activations, copies the gradients
        activations = max(activations, sizes.get("gradients", 0))
    return {**sizes, "activations": activations}


def line(model, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, samples: Samples) -> str:
    """The estimate as a line. If it is above the free memory, a warning on stderr says what needs less."""
    sizes, free = estimate(model, model_args, data_args, args, samples), free_bytes(args.device)
    known = "" if free is None else f" of {free / 1e9:.3g} GB free"
    if free is not None and on_device(sizes, args.device) > free:
        print(
            f"warning: memory may run out: {described(sizes)}{known}. {SMALLER}",
            file=sys.stderr,
        )
    return f"PL: memory {'per device ' * (args.world_size > 1)}(est.): {described(sizes)}{known}."


@contextlib.contextmanager
def must_fit(rows: int):
    """Around what the largest micro-batch, of so many samples, goes through. Raises InputError where the memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is a CPU's
        if not is_out_of_memory(error):
            raise
        raise InputError(f"the largest micro-batch, of {rows} samples, does not fit into memory. {SMALLER}") from None


def largest_batch(model, sampler: StepBatchSampler, data_args: DataArguments, samples: Samples) -> Batch:
    """The micro-batch with the most tokens in the first epoch."""

    def tokens(batch: list[int]) -> int:
        lengths = [samples.lengths[i] for i in batch]
        return sum(lengths) if data_args.packing else max(lengths, default=0) * len(lengths)

    rows = max(sampler.epoch_batches(0), key=tokens)
    with must_fit(len(rows)):
        encoded = [samples[i] for i in rows[-ROWS_ENCODED:]]  # sorted by length
    pixels = [sample["pixel_values"] for sample in encoded if "pixel_values" in sample]
    counts = {
        "patches": sum(memory_estimate.patches(model, values.shape) for values in pixels),
        "pixel_bytes": sum(4 * values.numel() for values in pixels),
        "labelled": sum(int((sample["labels"] != IGNORE).sum()) for sample in encoded)
        if model.config.model_type in FAMILIES
        else sum(len(sample["labels"]) for sample in encoded),
    }
    return Batch(len(rows), tokens(rows), **{name: n * len(rows) // len(encoded) for name, n in counts.items()})
