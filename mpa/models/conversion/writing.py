"""Write a native checkpoint from stored tensors, shard by shard; every tensor is accounted for."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mpa.files import disk_errors
from mpa.files.records import InputError
from mpa.models.conversion.checkpoint import Checkpoint
from mpa.models.model_files import INDEX

SHARD_BYTES = 500_000_000  # the most of an output shard; a single tensor may be larger

# Of a stored name and tensor, the tensors of the native model by name. None: the tensor is knowingly left out.
Renaming = Callable[[str, object], "dict[str, object] | None"]


def write_weights(sources: list[tuple[Checkpoint, Renaming]], model, out: Path) -> str:
    """Write the weights of `model`, which is on the meta device, from the tensors of `sources`. Returns their dtype.

    File names and names within the files are those of `save_pretrained`. Raises InputError, before anything is
    written, if a tensor of the model is missing, comes twice, has another shape or is not finite, or if one is stored that
    the model does not have.
    """
    from safetensors.torch import save_file

    plan = [(checkpoint, renaming, _accounted(checkpoint, renaming)) for checkpoint, renaming in sources]
    _refuse_differences(plan, _expected(model), model)
    for checkpoint, _, targets in plan:
        checkpoint.refuse_not_finite([name for name, made in targets.items() if made])
    names = _names_on_disk(model)
    shards, table, total = [], {}, 0
    shard, size, dtypes = {}, 0, Counter()

    def write_shard() -> None:
        nonlocal shard, size
        shards.append(out / f"shard-{len(shards) + 1}")
        with disk_errors.named(shards[-1]):
            save_file(shard, shards[-1], metadata={"format": "pt"})
        table.update(dict.fromkeys(shard, len(shards)))
        shard, size = {}, 0

    for checkpoint, renaming, targets in plan:
        for stored, tensor in checkpoint.read([name for name, made in targets.items() if made]):
            for target, value in renaming(stored, tensor).items():
                bytes_ = value.numel() * value.element_size()
                if shard and size + bytes_ > SHARD_BYTES:
                    write_shard()
                # A copy: a view would keep the source's pages, and safetensors refuses views of one storage.
                shard[names[target]] = value.clone()
                size, total = size + bytes_, total + bytes_
                dtypes[str(value.dtype).removeprefix("torch.")] += bytes_
    write_shard()

    of = len(shards)
    final = ["model.safetensors"] if of == 1 else [f"model-{n:05}-of-{of:05}.safetensors" for n in range(1, of + 1)]
    for written, name in zip(shards, final, strict=True):
        written.rename(out / name)
    if of > 1:
        weight_map = {name: final[number - 1] for name, number in sorted(table.items())}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return dtypes.most_common(1)[0][0]


def _accounted(checkpoint: Checkpoint, renaming: Renaming) -> dict[str, dict[str, tuple] | None]:
    """For each stored tensor, the native names that it becomes and their shapes."""
    import torch

    made = {}
    for name, shape in checkpoint.shapes.items():
        try:
            targets = renaming(name, torch.empty(shape, device="meta"))
        except (RuntimeError, IndexError, ValueError) as error:
            raise InputError(f"{checkpoint.folder}: {name} has the shape {list(shape)}: {error}") from None
        made[name] = None if targets is None else {target: tuple(value.shape) for target, value in targets.items()}
    return made


def _expected(model) -> dict[str, tuple]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _refuse_differences(plan, expected: dict[str, tuple], model) -> None:
    folder, wrong, found = plan[0][0].folder, [], {}
    unexpected, twice = [], []
    for _, _, made in plan:
        for stored, targets in made.items():
            for target, shape in (targets or {}).items():
                if target not in expected:
                    unexpected.append(stored)
                elif target in found:
                    twice.append(stored)
                elif shape != expected[target]:
                    wrong.append(f"{stored} {list(shape)} instead of {list(expected[target])}")
                found[target] = stored
    missing = [name for name in expected if name not in found]
    problems = {"not in the model": unexpected, "missing": missing, "there twice": twice, "of another shape": wrong}
    said = [f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if said:
        hint = ""
        if any(name.endswith("lm_head.bias") for name in unexpected):
            hint = " The language model's head has a bias; transformers' class has no place for it."
        raise InputError(
            f"{folder}: its tensors are not those of {type(model).__name__}. {'; '.join(said)}.{hint} Nothing was written."
        )


def _names_on_disk(model) -> dict[str, str]:
    """The names that `save_pretrained` writes, by the names within the model.

    SigLIP's keep the `vision_model.` of published checkpoints, which transformers 5 leaves out: it reads both, vLLM 0.32 only these.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names = {}
    for name, tensor in model.state_dict().items():
        names[name] = next(iter(revert_weight_conversion(model, {name: tensor})))
        if model.config.vision_config.model_type == "siglip_vision_model":
            names[name] = names[name].replace("vision_tower.", "vision_tower.vision_model.", 1)
    return names


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
