"""A miniature checkpoint with random weights for every tested model family: model, processor, chat template."""

from pathlib import Path

import torch
import transformers as t
from conftest import TEACHER

FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm"),
    *("internvl", "llava", "llava_next", "llava_onevision"),
)
VARIANTS = {}  # further checkpoints of a family: name -> model type


def model_type(family: str) -> str:
    return VARIANTS.get(family, family)


MODEL_TYPES = {model_type(family) for family in FAMILIES}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 4096, **LAYERS}
VISION = {"hidden_size": 32, "intermediate_size": 48, **LAYERS}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ 'IMAGE' if part.type == 'image' else part.text }}{% endfor %}{% endif %}{{ 'END\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make(family: str, folder: Path) -> str:
    """Write the checkpoint of `family` to a subfolder of `folder`. Returns its path."""
    processor, config = globals()[f"_{family.split('_vl')[0]}"](family)
    tokenizer, texts = processor.tokenizer, (config.text_config, config)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        for part in texts:
            setattr(part, name, getattr(tokenizer, name))
    torch.manual_seed(3)
    model = t.AutoModelForImageTextToText.from_config(config).float().eval()
    model.generation_config = t.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _tokenizer(*special, **named):
    """The embedded tokenizer with added tokens. `named` are those that a processor accesses by name."""
    tokenizer = t.AutoTokenizer.from_pretrained(TEACHER, **({"extra_special_tokens": named} if named else {}))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    return tokenizer


def _template(image: str, end: str = "<|im_end|>") -> str:
    return CHATML.replace("IMAGE", image).replace("END", end)


def _qwen(family: str, vision: dict, patch: int, **text):
    tokenizer = _tokenizer()
    names = {"qwen2": "Qwen2VL", "qwen2_5": "Qwen2_5_VL", "qwen3": "Qwen3VL"}[family.removesuffix("_vl")]
    video = t.Qwen3VLVideoProcessor if names == "Qwen3VL" else t.Qwen2VLVideoProcessor
    images = t.Qwen2VLImageProcessor(patch_size=patch)
    template = _template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = getattr(t, f"{names}Processor")(images, tokenizer, video(), chat_template=template)
    ids = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    ids |= {"vision_end": "<|vision_end|>"}
    config = getattr(t, f"{names}Config")(
        text_config={**TEXT, "vocab_size": len(tokenizer), **text},
        vision_config=vision,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )
    return processor, config


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}


def _qwen2(family):
    vision = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64, "initializer_range": 0.15}
    return _qwen(family, vision, 14, **MROPE)


def _qwen2_5(family):
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    return _qwen(
        family, {**vision, "fullatt_block_indexes": [1], "window_size": 56, "initializer_range": 0.15}, 14, **MROPE
    )


def _qwen3(family):
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "initializer_range": 0.15}
    return _qwen(family, vision, 16, head_dim=16, **MROPE)


def _idefics3(family):
    smol = family == "smolvlm"
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    named = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
    named |= {"end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"}
    tokenizer = _tokenizer(*named.values(), *rows, **(named if smol else {}))
    size = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    images = (t.SmolVLMImageProcessor if smol else t.Idefics3ImageProcessor)(**size)
    video = (t.SmolVLMVideoProcessor(),) if smol else ()
    template = _template("<image>", "<end_of_utterance>")
    kind = t.SmolVLMProcessor if smol else t.Idefics3Processor
    processor = kind(images, tokenizer, *video, image_seq_len=4, chat_template=template)
    tokenizer.eos_token = "<end_of_utterance>"
    config = (t.SmolVLMConfig if smol else t.Idefics3Config)(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return processor, config


_smolvlm = _idefics3


def _internvl(_):
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(**named, video_token="<video>")
    images = t.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, max_patches=3)
    video = t.InternVLVideoProcessor()
    template = _template("<IMG_CONTEXT>")
    processor = t.InternVLProcessor(images, tokenizer, video, image_seq_length=4, chat_template=template)
    config = t.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return processor, config


def _llava(family):
    tokenizer = _tokenizer("<image>", "<video>")
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    clip = {**VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    index = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    shared = {"chat_template": _template("<image>"), "patch_size": 14, "vision_feature_select_strategy": "default"}
    grid = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]
    if family == "llava":
        images = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
        processor = t.LlavaProcessor(images, tokenizer, num_additional_image_tokens=1, **shared)
        return processor, t.LlavaConfig(text_config=text, vision_config=clip, **index)
    if family == "llava_next":
        size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
        images = t.LlavaNextImageProcessor(image_grid_pinpoints=grid, **size)
        processor = t.LlavaNextProcessor(images, tokenizer, num_additional_image_tokens=1, **shared)
        return processor, t.LlavaNextConfig(text_config=text, vision_config=clip, image_grid_pinpoints=grid, **index)
    images = t.LlavaOnevisionImageProcessor(image_grid_pinpoints=grid, size={"height": 56, "width": 56})
    shared = {"chat_template": _template("<image>"), "num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    processor = t.LlavaOnevisionProcessor(images, tokenizer, t.LlavaOnevisionVideoProcessor(), **shared)
    siglip = {
        **VISION,
        "model_type": "siglip_vision_model",
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    index["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    text["model_type"] = "qwen2"
    return processor, t.LlavaOnevisionConfig(text_config=text, vision_config=siglip, image_grid_pinpoints=grid, **index)


_llava_next = _llava_onevision = _llava
