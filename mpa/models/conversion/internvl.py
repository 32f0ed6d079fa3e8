"""InternVL2 and 2.5 as released (InternVLChatModel) → transformers' InternVLForConditionalGeneration.

The layout is that of OpenGVLab/InternVL, `internvl_chat`, at commit 2410d1d: InternViT-300M, a pixel shuffle, an MLP, and
InternLM2, Phi-3, Qwen2 or Llama. A field that config.json leaves out has the default of that commit's configuration classes.
"""

import re

from mpa.files.records import InputError
from mpa.models.conversion.checkpoint import Checkpoint
from mpa.models.conversion.layout import Layout, layers_as_stored, refuse, refuse_other_attention, rope, text_config
from mpa.models.conversion.prompts import chat_template

# System messages of the original prompt templates. The message is always there; users do not see it.
INTERNVL2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# By the field `template`: system message, what stands before and behind a role's name, and the end of a turn.
TEMPLATES = {
    "internlm2-chat": (INTERNVL2, "<|im_start|>", "\n", "<|im_end|>"),
    "Hermes-2": (INTERNVL2, "<|im_start|>", "\n", "<|im_end|>"),
    "phi3-chat": (INTERNVL2, "<|", "|>\n", "<|end|>"),
    "internvl2_5": (INTERNVL2_5, "<|im_start|>", "\n", "<|im_end|>\n"),
}
# Native text model by the original's. InternLM2 is Llama under other names, with queries, keys and values in one tensor.
TEXT_MODELS = {"internlm2": "llama", "phi3": "phi3", "qwen2": "qwen2", "llama": "llama"}
# The class that the original takes by the name in `architectures`, and the kinds of `rope_scaling` that this class knows.
CLASSES = {
    "internlm2": ("InternLM2ForCausalLM", ("linear", "dynamic")),
    "phi3": ("Phi3ForCausalLM", ("su", "longrope")),
    "qwen2": ("Qwen2ForCausalLM", ()),
    "llama": ("LlamaForCausalLM", ("linear", "dynamic")),
}
PATCHES = {"min": 1, "max": 6}  # tiles of an image, where config.json does not say
IMAGE_TOKEN, START, END = "<IMG_CONTEXT>", "<img>", "</img>"

PROJECTOR = {"mlp1.0.": "layer_norm.", "mlp1.1.": "linear_1.", "mlp1.3.": "linear_2."}
VISION = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".ls1": ".lambda_1",
    ".ls2": ".lambda_2",
    ".attn.proj.": ".attention.projection_layer.",
}
INTERNLM2 = {
    "model.tok_embeddings.": "model.embed_tokens.",
    ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.",
    ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
    "output.weight": "lm_head.weight",
}


def layout(checkpoint: Checkpoint, image_token_id: int | None, vision_tower: str | None) -> Layout:
    """How this checkpoint is written natively. Raises InputError for what the native class cannot represent."""
    if vision_tower:
        raise InputError("--vision-tower: InternVL's vision tower lies in its checkpoint. Leave the flag out.")
    config, llm = checkpoint.config, checkpoint.config["llm_config"]
    _refuse_what_has_no_place(checkpoint)
    kind = llm["model_type"]
    vision = _vision_config(checkpoint)
    ratio = config.get("downsample_ratio", 0.5)
    side = vision["image_size"] // vision["patch_size"]
    tokens = int(side**2 * ratio**2)
    names = r"language_model\.model\.layers\.(\d+)\."
    text = text_config(llm, TEXT_MODELS[kind], layers_as_stored(checkpoint, llm, names))
    text["rope_parameters"] = rope(llm)
    if kind == "internlm2":
        text["attention_bias"] = llm.get("bias", True)  # as the original class
    if kind == "phi3":  # it has no effect where it is as long as the text
        text["original_max_position_embeddings"] = llm.get("original_max_position_embeddings", 4096)
        window, longest = llm.get("sliding_window"), llm.get("max_position_embeddings", 4096)
        text["sliding_window"] = window if window and window < longest else None
    system, before, behind, end = TEMPLATES[config["template"]]
    tied = bool(llm.get("tie_word_embeddings", False))
    return Layout(
        config={
            "model_type": "internvl",
            "text_config": text,
            "vision_config": vision,
            "image_seq_length": tokens,
            "downsample_ratio": ratio,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            # transformers ties by default, which loses a head of its own without a word.
            "tie_word_embeddings": tied,
        },
        sources=[(checkpoint, lambda name, tensor: _renamed(name, tensor, llm))],
        image_token=IMAGE_TOKEN,
        image_token_id=image_token_id,
        end_of_turn=end.strip(),
        chat_template=lambda _: chat_template(system, before, behind, end, IMAGE_TOKEN),
        processor=lambda tokenizer, template: _processor(config, vision["image_size"], tokens, tokenizer, template),
        named_tokens={"start_image_token": START, "end_image_token": END, "context_image_token": IMAGE_TOKEN},
        video_token="<video>",
        end_token_id=llm.get("eos_token_id"),
    )


def _refuse_what_has_no_place(checkpoint: Checkpoint) -> None:
    config, llm = checkpoint.config, checkpoint.config["llm_config"]
    text = llm["model_type"]
    native = {
        "ps_version": ("v2", "v1", "the native class shuffles pixels as v2 does"),
        "select_layer": (-1, -1, "the native class takes the last vision layer"),
        "use_backbone_lora": (0, 0, "merge the adapter into the vision tower first"),
        "use_llm_lora": (0, 0, "merge the adapter into the language model first"),
        "pad2square": (False, False, "the native image processor does not pad"),
    }
    if config.get("dynamic_image_size", False):
        native["use_thumbnail"] = (True, False, "the native image processor always adds a thumbnail")
    for name, (expected, default, why) in native.items():
        if (value := config.get(name, default)) != expected:
            refuse(checkpoint, name, value, why)
    least, most = (config.get(f"{name}_dynamic_patch", default) for name, default in PATCHES.items())
    if not (isinstance(least, int) and isinstance(most, int) and 1 <= least <= most):
        refuse(checkpoint, "min_dynamic_patch, max_dynamic_patch", [least, most], "expected numbers of tiles")
    if text not in TEXT_MODELS:
        refuse(checkpoint, "llm_config.model_type", text, f"known are {', '.join(TEXT_MODELS)}")
    if config.get("template") not in TEMPLATES:
        refuse(checkpoint, "template", config.get("template"), f"known are {', '.join(TEMPLATES)}")
    named, scalings = CLASSES[text]
    if (given := llm.get("architectures", [None])) and given[0] != named:
        refuse(checkpoint, "llm_config.architectures", given, f"model_type {text} is {named}")
    if llm.get("rope_pos_id_version", "default") != "default":
        refuse(checkpoint, "llm_config.rope_pos_id_version", llm["rope_pos_id_version"], "only default is known")
    refuse_other_attention(checkpoint, "llm_config.", llm, scalings)
    vision = config["vision_config"]
    for name, expected, default in (("qk_normalization", False, True), ("norm_type", "layer_norm", "rms_norm")):
        if (value := vision.get(name, default)) != expected:
            refuse(checkpoint, f"vision_config.{name}", value, "only InternViT-300M's form is known")


def _vision_config(checkpoint: Checkpoint) -> dict:
    vision = checkpoint.config["vision_config"]
    return {
        "hidden_size": vision["hidden_size"],
        "intermediate_size": vision["intermediate_size"],
        "num_attention_heads": vision["num_attention_heads"],
        "num_hidden_layers": layers_as_stored(checkpoint, vision, r"vision_model\.encoder\.layers\.(\d+)\."),
        "image_size": checkpoint.config.get("force_image_size") or vision["image_size"],
        "patch_size": vision["patch_size"],
        "hidden_act": vision.get("hidden_act", "gelu"),
        "layer_norm_eps": vision.get("layer_norm_eps", 1e-6),
        "attention_bias": vision.get("qkv_bias", False),
        "use_qk_norm": False,
        "use_mean_pooling": True,  # otherwise a final LayerNorm that the original does not have
    }


def _renamed(name: str, tensor, llm: dict) -> dict:
    """The native tensors of a stored one; a name that is not of this layout stays, and is found to be unexpected."""
    for old, new in PROJECTOR.items():
        if name.startswith(old):
            return {f"model.multi_modal_projector.{new}{name.removeprefix(old)}": tensor}
    part, _, rest = name.partition(".")
    if part == "vision_model":
        rest = _replaced(rest, VISION)
        if qkv := re.match(r"(.*\.)attn\.qkv(\.weight|\.bias)$", rest):
            layer, kind = qkv.groups()
            return {
                f"model.vision_tower.{layer}attention.{which}_proj{kind}": third.contiguous()
                for which, third in zip("qkv", tensor.chunk(3), strict=True)
            }
        return {f"model.vision_tower.{rest}": tensor}
    if part != "language_model":
        return {name: tensor}
    rest = _replaced(rest, INTERNLM2) if llm["model_type"] == "internlm2" else rest
    if wqkv := re.match(r"(.*\.)attention\.wqkv(\.weight|\.bias)$", rest):
        layer, kind = wqkv.groups()
        split = {f"{layer}self_attn.{which}_proj{kind}": part for which, part in _split_wqkv(tensor, llm).items()}
        return {_placed(inner): part for inner, part in split.items()}
    return {_placed(rest): tensor}


def _placed(name: str) -> str:
    """A name within the language model, as a name of the whole native model."""
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def _split_wqkv(tensor, llm: dict) -> dict:
    """InternLM2's rows come in groups, one per key-value head: the group's queries, its key, its value."""
    heads = llm["num_attention_heads"]
    kv = llm.get("num_key_value_heads") or heads
    groups = tensor.unflatten(0, (kv, heads // kv + 2, -1))  # [kv, queries + 2, head size, …]
    return {
        "q": groups[:, :-2].flatten(0, 2).contiguous(),
        "k": groups[:, -2].flatten(0, 1).contiguous(),
        "v": groups[:, -1].flatten(0, 1).contiguous(),
    }


def _replaced(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def _processor(config: dict, size: int, tokens: int, tokenizer, template: str):
    from transformers import InternVLProcessor, InternVLVideoProcessor
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    shared = {
        "size": {"height": size, "width": size},
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
    }
    images = GotOcr2ImageProcessorPil(  # whose pixels are the original's; the one on tensors differs by 1 to 2 of 255
        **shared,
        crop_to_patches=bool(config.get("dynamic_image_size", False)),
        min_patches=config.get("min_dynamic_patch", PATCHES["min"]),
        max_patches=config.get("max_dynamic_patch", PATCHES["max"]),
    )
    images.original_backend = "pil"
    video = InternVLVideoProcessor(**shared)
    return InternVLProcessor(images, tokenizer, video, image_seq_length=tokens, chat_template=template)
