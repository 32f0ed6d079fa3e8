"""The parts of a model (vision, merger, language) by family: freezing, learning rates, LoRA."""

import re
from collections import Counter

import torch

from mpa.files.records import InputError
from mpa.models.families import FAMILIES

# What PEFT inserts into the names of parameters and modules.
PEFT = re.compile(r"^base_model\.model\.|(?<=\.)(?:modules_to_save\.[^.]+|original_module|base_layer)(?:\.|$)")
PARTS = ("vision", "merger", "language")


def part_of(name: str, model_type: str) -> str:
    """The part that a parameter or module with this full name belongs to; "language" for an unknown family."""
    if model_type not in FAMILIES:  # `check_parts` was asked
        return "language"
    name = PEFT.sub("", name).removeprefix("model.") + "."
    for part in ("merger", "vision"):
        if name.startswith(FAMILIES[model_type].parts[part]):
            return part
    return "language"


def check_parts(model_type: str, model_args, args) -> str:
    """Raises InputError if a flag names a part of a family whose parts are not known.

    Without such a flag an unknown family is trained as one part. Returns a warning then, and "" for a known family.
    """
    if model_type in FAMILIES:
        return ""
    rates = {name: getattr(args, name) for name in ("vision_lr", "merger_lr")}
    flags = [name for name, rate in rates.items() if rate != args.learning_rate]
    flags += [
        name
        for name in ("freeze_vision_tower", "freeze_merger", "freeze_llm", "lora_enable")
        if getattr(model_args, name)
    ]
    if flags:
        raise InputError(
            f"--{flags[0]}: the parts of model type {model_type} are not known. Leave it out (PL.sh: VISION_LR and MERGER_LR "
            f"equal to LEARNING_RATE), or add the type to FAMILIES in mpa/models/families.py: {', '.join(FAMILIES)}."
        )
    return (
        f"warning: model type {model_type} is not in the table of families: all its weights are trained as one part, and "
        "its labels are not tested. The first sample's loss is compared with that of a plain forward pass."
    )


def freeze(model, args) -> None:
    """Freeze the parts that the `--freeze_…` flags name, and unfreeze the others."""
    frozen = {"vision": args.freeze_vision_tower, "merger": args.freeze_merger, "language": args.freeze_llm}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not frozen[part_of(name, model.config.model_type)]


def groups(model, decaying: set[str], args) -> list[dict]:
    """The optimizer's parameter groups: one per part, with and without weight decay, each with its `lr` and `part`.

    `decaying` names the parameters with weight decay.
    """
    rates = {"vision": args.vision_lr, "merger": args.merger_lr, "language": args.learning_rate}
    by_part = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = part_of(name, model.config.model_type), name in decaying
            by_part.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": args.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in by_part.items()
    ]


def counts(model) -> dict[str, tuple[int, int]]:
    """Number of parameters of each part: (all, trained), without PEFT's copies; under ZeRO-3 of the whole model."""
    total, trained = Counter(), Counter()
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        part, size = part_of(name, model.config.model_type), getattr(parameter, "ds_numel", parameter.numel())
        if (state := getattr(parameter, "quant_state", None)) is not None:  # two weights in a byte
            size = state.shape.numel()
        total[part] += size
        trained[part] += size if parameter.requires_grad else 0
    return {part: (total[part], trained[part]) for part in PARTS}


def add_lora(model, args):
    """The model with LoRA on the linear layers of the language model and, with `--vision_lora`, of the vision tower.

    A part that is neither frozen nor adapted is trained in full. It is saved with the adapter, so that the adapter's
    folder holds all that was learnt. Raises InputError if no layer is left to adapt.
    """
    from peft import LoraConfig, get_peft_model

    model_type = model.config.model_type
    adapted = {"language"} | ({"vision"} if args.vision_lora else set())
    head = model.get_output_embeddings()
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and part_of(name, model_type) in adapted
        and not any(word in name for word in args.lora_namespan_exclude)
    ]
    if args.num_lora_modules > 0:
        targets = targets[-args.num_lora_modules :]
    if not targets:
        raise InputError("--lora_enable: no linear layer is left to adapt. See --lora_namespan_exclude.")
    in_full = {"vision": not args.freeze_vision_tower, "merger": not args.freeze_merger, "language": False}
    saved = modules_of({part for part, trained in in_full.items() if trained and part not in adapted}, model)
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def modules_of(parts: set[str], model, name: str = "") -> list[str]:
    """Names of the largest modules, at or below `name`, all of whose parameters belong to `parts`.

    Module lists and dicts are not named, but what they hold: PEFT cannot copy them.
    """
    module, model_type = model.get_submodule(name), model.config.model_type
    prefix = f"{name}." if name else ""
    found = {part_of(prefix + parameter, model_type) for parameter, _ in module.named_parameters()}
    if not found & parts:
        return []
    if found <= parts and name and not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
        return [name]
    return [below for child, _ in module.named_children() for below in modules_of(parts, model, prefix + child)]
