"""A model type outside the table of families: its first sample goes through the trainer and through a plain forward pass."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from data import IGNORE, encode, whole
from mpa.files.records import InputError
from mpa.models.device_memory import is_out_of_memory
from mpa.models.families import FAMILIES

LABELLED = 4  # last tokens, of which the loss is compared
LOOKED_AT = 64  # samples, of which the longest pads the first one
TOLERANCE = {torch.float32: 1e-3}  # of the loss
HALF_TOLERANCE = 0.05


def refuse_untested(kind: str, data_args, args) -> None:
    """Raises InputError for a flag that asks for a shortcut that this model type is not tested with."""
    known = FAMILIES.get(kind)
    if data_args.packing and known and not known.packing:
        raise InputError(f"--packing: samples of model type {kind} would see each other in one row. Leave it out.")
    if known:
        return
    asked = {"packing": data_args.packing, "use_liger": args.use_liger_kernel}
    for name in (name for name, value in asked.items() if value):
        raise InputError(
            f"--{name}: not tested with model type {kind}, which is not in the table of families. Leave it out."
        )


@contextlib.contextmanager
def tried(model_id: str, kind: str) -> Iterator[None]:
    """Around what was never tried with this model type: an error that is a bug elsewhere is here one line, InputError."""
    try:
        yield
    except (InputError, MemoryError, OSError):
        raise
    except Exception as error:
        if kind in FAMILIES or is_out_of_memory(error):
            raise
        said = str(error).strip().split("\n", 1)[0]
        raise InputError(
            f"{model_id}: its model type, {kind}, is not in the table of families, and cannot be trained here "
            f"({type(error).__name__}: {said})."
        ) from error


@torch.no_grad()
def check(trainer, model) -> None:
    """Raises InputError where the trainer's loss of the first sample is not that of the model's own forward pass. Collective.

    The trainer's batch has a second, longer sample, so that the first one is padded. Both passes get the tokens that the
    processor makes of the whole conversation.
    """
    kind, processor = trainer.model.config.model_type, trainer.processing_class
    with tried(trainer.model.config._name_or_path or kind, kind):
        samples = trainer.train_dataset
        longest = max(range(min(len(samples), LOOKED_AT)), key=samples.lengths.__getitem__)
        plain = whole(samples.samples[0], processor)
        ids = plain["input_ids"][0]
        labels = torch.full_like(ids, IGNORE)
        labels[-LABELLED:] = ids[-LABELLED:]
        first = encode(samples.samples[0], processor) | {"input_ids": ids, "labels": labels, "sample": 0}
        other = encode(samples.samples[longest], processor)
        other |= {"labels": torch.full_like(other["labels"], IGNORE), "sample": 1}
        batch = trainer._prepare_inputs(trainer.data_collator([first, other]))
        model.eval()
        with trainer.compute_loss_context_manager():
            own = trainer.accelerator.unwrap_model(model)
            logits = own(**trainer._prepare_inputs(dict(plain)), use_cache=False).logits[0, -LABELLED - 1 : -1].float()
            targets, smoothing = ids[-LABELLED:].to(logits.device), trainer.args.label_smoothing_factor
            expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing).item()
            world = trainer.args.world_size if trainer.args.average_tokens_across_devices else 1
            found = trainer.compute_loss(model, batch, num_items_in_batch=world).item()
        model.train()
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else torch.float32
    if not abs(found - expected) <= TOLERANCE.get(dtype, HALF_TOLERANCE) * (1 + abs(expected)):
        raise InputError(
            f"model type {kind} is not in the table of families, and the trainer's loss of the first sample is {found:.4f}, "
            f"where the model's own is {expected:.4f}. It cannot be trained here."
        )
