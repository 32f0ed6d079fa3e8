"""TinyLLaVA as released → transformers' LlavaForConditionalGeneration.

Two layouts: TinyLLaVABench (2d2105f; TinyLLaVA-2.0B: SigLIP-so400m and StableLM-2), whose vision tower lies in a
repository of its own, and TinyLLaVA_Factory (53f12c7), which has all in one.
"""

import re
from pathlib import Path

from mpa.files.records import InputError
from mpa.models.conversion.checkpoint import Checkpoint, read_config
from mpa.models.conversion.layout import Layout, layers_as_stored, refuse, refuse_other_attention, rope, text_config
from mpa.models.conversion.prompts import dialogue_template

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN = "<image>"
PROJECTOR = {"0.": "linear_1.", "2.": "linear_2."}
TOWER = "model.vision_tower.vision_tower.vision_model."  # within TinyLLaVABench's main checkpoint
FACTORY_TOWER = "vision_tower._vision_tower.vision_model."
LAYER = r"vision_model\.encoder\.layers\.(\d+)\."  # of SigLIP
FACTORY_TEXT_MODELS = ("phi", "stablelm", "llama", "qwen2")


def bench_layout(checkpoint: Checkpoint, image_token_id: int | None, vision_tower: str | None) -> Layout:
    """TinyLLaVABench's. Raises InputError for what the native class cannot represent."""
    config = checkpoint.config
    _refuse_what_has_no_place(checkpoint)
    tower = Checkpoint(find_tower(checkpoint.folder, config, vision_tower))
    refuse_other_attention(checkpoint, "", config, ())
    layers = _layers_but_the_last(tower)
    vision = _vision_config(tower.config, layers)
    text = text_config(config, "stablelm", layers_as_stored(checkpoint, config, r"model\.layers\.(\d+)\."))
    text |= {
        "layer_norm_eps": config.get("norm_eps", 1e-5),
        "use_qkv_bias": config.get("use_qkv_bias", False),
        # Given as `rope_pct`, it would be ignored without a word.
        "rope_parameters": rope(config) | {"partial_rotary_factor": config.get("rope_pct", 0.25)},
    }
    return _llava(
        [(checkpoint, _bench_name), (tower, lambda name, tensor: _tower_name(name, tensor, layers))],
        text,
        vision,
        strategy="full",
        layer=-1,
        means=([0.5] * 3, [0.5] * 3),  # the original class reads none from files
        image_token_id=image_token_id,
        notes=_differing_copy(checkpoint, tower),
    )


def factory_layout(checkpoint: Checkpoint, image_token_id: int | None, vision_tower: str | None) -> Layout:
    """TinyLLaVA_Factory's. Raises InputError for what cannot be represented."""
    if vision_tower:
        raise InputError("--vision-tower: TinyLLaVA_Factory's vision tower lies in its checkpoint. Leave the flag out.")
    config, text = checkpoint.config, checkpoint.config["text_config"]
    if text["model_type"] not in FACTORY_TEXT_MODELS:
        refuse(checkpoint, "text_config.model_type", text["model_type"], f"known are {', '.join(FACTORY_TEXT_MODELS)}")
    if config["vision_config"]["model_type"] != "siglip_vision_model":
        refuse(checkpoint, "vision_config.model_type", config["vision_config"]["model_type"], "only SigLIP is known")
    if config.get("connector_type") != "mlp2x_gelu":
        refuse(checkpoint, "connector_type", config.get("connector_type"), "only mlp2x_gelu is known")
    if config.get("vision_feature_select_strategy", "patch") not in ("patch", "cls_patch"):
        refuse(checkpoint, "vision_feature_select_strategy", config["vision_feature_select_strategy"], "not known")
    scalings = () if text["model_type"] == "qwen2" else ("linear", "dynamic")
    refuse_other_attention(checkpoint, "text_config.", text, scalings)
    tower = re.escape(FACTORY_TOWER) + r"encoder\.layers\.(\d+)\."
    vision = _vision_config(config["vision_config"], layers_as_stored(checkpoint, config["vision_config"], tower))
    native = text_config(
        text, text["model_type"], layers_as_stored(checkpoint, text, r"language_model\.model\.layers\.(\d+)\.")
    )
    native["rope_parameters"] = rope(text)
    if part := {"phi": 0.5, "stablelm": 0.25}.get(text["model_type"]):
        native["rope_parameters"]["partial_rotary_factor"] = text.get("partial_rotary_factor", part)
    # "patch" drops the first patch, as if it were a class token: transformers' "default".
    strategy = "default" if config.get("vision_feature_select_strategy", "patch") == "patch" else "full"
    return _llava(
        [(checkpoint, lambda name, tensor: _factory_name(name, tensor, vision["num_hidden_layers"]))],
        native,
        vision,
        strategy=strategy,
        layer=config.get("vision_feature_layer", -2),
        means=_means(checkpoint.folder, config["vision_config"]),
        image_token_id=image_token_id,
    )


def _llava(sources, text, vision, *, strategy, layer, means, image_token_id, notes=()) -> Layout:
    checkpoint = sources[0][0]
    aspect = checkpoint.config.get("image_aspect_ratio") or "square"
    if aspect not in ("pad", "square"):
        refuse(checkpoint, "image_aspect_ratio", aspect, "known are pad and square")
    side = vision["image_size"] // vision["patch_size"]
    config = {
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "image_seq_length": side**2 - (strategy == "default"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    return Layout(
        config=config,
        sources=sources,
        image_token=IMAGE_TOKEN,
        image_token_id=image_token_id,
        end_of_turn=None,
        chat_template=lambda end: dialogue_template(SYSTEM, end, IMAGE_TOKEN),
        processor=lambda tokenizer, template: _processor(vision, strategy, aspect, means, tokenizer, template),
        end_token_id=text.get("eos_token_id"),
        notes=notes,
    )


def _refuse_what_has_no_place(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    if config.get("mm_projector_type") != "mlp2x_gelu":
        refuse(checkpoint, "mm_projector_type", config.get("mm_projector_type"), "only mlp2x_gelu is known")
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if config.get(name):
            refuse(checkpoint, name, config[name], "tokens around an image are not written by the native processor")


def find_tower(folder: Path, config: dict, given: str | None) -> Path:
    """The folder of the vision tower: the one given, or one of its last name inside or beside the checkpoint.

    Else it is looked for on the hub. Raises InputError if it is nowhere.
    """
    from mpa.models.conversion import hub

    named = given or config.get("mm_vision_tower")
    if not isinstance(named, str) or not named:
        raise InputError(f"{folder / 'config.json'}: names no mm_vision_tower. Give it with --vision-tower.")
    last = Path(named).name
    beside = [folder / last, folder.parent / last] if last not in ("", "..") else []
    candidates = [Path(named)] if given else beside
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    try:
        return hub.download(named)
    except InputError as error:
        raise InputError(
            f"{folder}: its vision tower, {named}, is needed: {error} A folder {last} inside or beside the checkpoint is "
            "found by itself; another is named with scripts/convert.py --vision-tower."
        ) from None


def _layers_but_the_last(tower: Checkpoint) -> int:
    """Layers of TinyLLaVABench's vision tower: its class drops the last that the configuration counts, stored or not."""
    said, stored = _vision(tower.config)["num_hidden_layers"], tower.count(LAYER)
    if stored not in (said, said - 1):
        raise InputError(
            f"{tower.folder}: config.json says {said} layers, the weights hold {stored}. Download it again."
        )
    return said - 1


def _vision(config: dict) -> dict:
    """SigLIP's configuration of its vision tower; the whole one has it inside."""
    return config.get("vision_config", config)


def _vision_config(tower: dict, layers: int) -> dict:
    tower = _vision(tower)
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    return {name: tower[name] for name in fields} | {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": layers,
        "hidden_act": tower.get("hidden_act", "gelu_pytorch_tanh"),
        "layer_norm_eps": tower.get("layer_norm_eps", 1e-6),
        "vision_use_head": False,
    }


def _bench_name(name: str, tensor) -> dict | None:
    """Of the main checkpoint. Its copy of the vision tower is left out: the original reads the tower's own repository."""
    if name.startswith(TOWER):
        return None
    if name.startswith("model.mm_projector."):
        return _projector(name.removeprefix("model.mm_projector."), tensor)
    if name.startswith("model."):
        return {f"model.language_model.{name.removeprefix('model.')}": tensor}
    return {name: tensor}


def _differing_copy(checkpoint: Checkpoint, tower: Checkpoint) -> tuple[str, ...]:
    """A note if the main checkpoint's copy of the vision tower has other weights than the tower's own repository."""
    import torch

    both = [name for name in tower.shapes if TOWER + name.removeprefix("vision_model.") in checkpoint.shapes]
    copies = checkpoint.read([TOWER + name.removeprefix("vision_model.") for name in both])
    pairs = zip(tower.read(both), copies, strict=True)
    differing = sum(not torch.equal(own.float(), copy.float()) for (_, own), (_, copy) in pairs)
    if not differing:
        return ()
    return (
        f"{differing} of {len(both)} tensors of the vision tower differ from those in {tower.folder}, "
        "which are used, as the original code does.",
    )


def _tower_name(name: str, tensor, layers: int) -> dict | None:
    """Without SigLIP's pooling, which no image feature passes, and layers from number `layers` on."""
    if name.startswith("vision_model.head.") or ((layer := re.match(LAYER, name)) and int(layer[1]) >= layers):
        return None
    return {f"model.vision_tower.{name.removeprefix('vision_model.')}": tensor}


def _factory_name(name: str, tensor, layers: int) -> dict | None:
    if name.startswith(FACTORY_TOWER):
        return _tower_name("vision_model." + name.removeprefix(FACTORY_TOWER), tensor, layers)
    if name.startswith("connector._connector."):
        return _projector(name.removeprefix("connector._connector."), tensor)
    if name.startswith("language_model.model."):
        return {f"model.language_model.{name.removeprefix('language_model.model.')}": tensor}
    return {name.removeprefix("language_model."): tensor}


def _projector(rest: str, tensor) -> dict:
    new = next((new + rest.removeprefix(old) for old, new in PROJECTOR.items() if rest.startswith(old)), rest)
    return {f"model.multi_modal_projector.{new}": tensor}


def _means(folder: Path, config: dict) -> tuple[list, list]:
    """Mean and standard deviation of the image processor: of the tower's files, else SigLIP's."""
    given = config
    if (folder / "preprocessor_config.json").is_file():
        given = config | read_config(folder, "preprocessor_config.json")
    return given.get("image_mean", [0.5] * 3), given.get("image_std", [0.5] * 3)


def _processor(vision: dict, strategy: str, aspect: str, means, tokenizer, template: str):
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = {"height": vision["image_size"], "width": vision["image_size"]}
    images = LlavaImageProcessorPil(
        do_pad=aspect == "pad",  # to a square, with the mean: 127 of 255
        size=size,
        do_center_crop=False,
        crop_size=size,
        image_mean=list(means[0]),
        image_std=list(means[1]),
        resample=3,
    )
    images.original_backend = "pil"
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        # The processor takes one off for "default"; the native model drops the first patch itself.
        num_additional_image_tokens=0,
        chat_template=template,
    )
