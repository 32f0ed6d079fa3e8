"""A miniature checkpoint with random weights for every tested model family: model, processor, chat template."""

from pathlib import Path

import chat_templates
import torch
import transformers as t
from conftest import TEACHER
from tokenizers.processors import TemplateProcessing

FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "idefics3", "smolvlm"),
    *("internvl", "llava", "llava_next", "llava_onevision", "granite_vision"),
    *("gemma3", "lfm2_vl", "paligemma"),
)
VARIANTS = {"granite_vision": "llava_next"}  # further checkpoints of a family: name -> model type


def model_type(family: str) -> str:
    return VARIANTS.get(family, family)


MODEL_TYPES = {model_type(family) for family in FAMILIES}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.15}
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 4096, **LAYERS}
HEAD = 16  # size of an attention head
LINE_BREAKS = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]  # of Gemma's tokenizer; vLLM looks for them
SQUARE = {"height": 56, "width": 56}  # an image, or a tile, in pixels
VISION = {"hidden_size": 32, "intermediate_size": 48, **LAYERS}


def make(family: str, folder: Path) -> str:
    """Write the checkpoint of `family` to a subfolder of `folder`. Returns its path."""
    return save(*globals()[f"_{family.removesuffix('_vl') if 'qwen' in family else family}"](family), folder)


def save(processor, config, folder: Path) -> str:
    """Write processor, and a model of this configuration with random weights, to `folder`. Returns its path."""
    tokenizer, texts = processor.tokenizer, (config.text_config, config)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        for part in texts:
            setattr(part, name, getattr(tokenizer, name))
    torch.manual_seed(3)
    model = t.AutoModelForImageTextToText.from_config(config).float().eval()
    _awaken(model)
    ends = {tokenizer.eos_token, "<end_of_turn>"} & set(tokenizer.get_vocab())
    model.generation_config = t.GenerationConfig(
        eos_token_id=sorted(map(tokenizer.convert_tokens_to_ids, ends)), pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def _awaken(model) -> None:
    """Give weight to what is zero at the start, and to Gemma's layers, which its embeddings outweigh by far."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.15)
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            parameter.data += 4.0 * ("Gemma" in type(model).__name__)
        if name.endswith(("attn_gate", "mlp_gate")):  # Mllama's
            parameter.data += 1.0


def _tokenizer(*special, **named):
    """The embedded tokenizer with added tokens. `named` are those that a processor accesses by name."""
    tokenizer = t.AutoTokenizer.from_pretrained(TEACHER, **({"extra_special_tokens": named} if named else {}))
    tokenizer.chat_template = None  # the teacher's
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    return tokenizer


def _qwen(family: str, vision: dict, patch: int, **text):
    tokenizer = _tokenizer()
    names = {"qwen2": "Qwen2VL", "qwen2_5": "Qwen2_5_VL", "qwen3": "Qwen3VL"}[family.removesuffix("_vl")]
    video = t.Qwen3VLVideoProcessor if names == "Qwen3VL" else t.Qwen2VLVideoProcessor
    images = t.Qwen2VLImageProcessor(patch_size=patch)
    form = chat_templates.chatml if family == "qwen3_vl" else chat_templates.qwen2
    template = form("<|vision_start|><|image_pad|><|vision_end|>")
    processor = getattr(t, f"{names}Processor")(images, tokenizer, video(), chat_template=template)
    config = getattr(t, f"{names}Config")(
        text_config={**TEXT, "vocab_size": len(tokenizer), **text},
        vision_config=vision,
        **_qwen_ids(tokenizer),
    )
    return processor, config


def _qwen_ids(tokenizer) -> dict:
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}


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
    return _qwen(family, vision, 16, head_dim=HEAD, **MROPE)


def _qwen3_5(_):
    """With linear attention in every other layer."""
    tokenizer = _tokenizer()
    template = chat_templates.qwen3_reasoning("<|vision_start|><|image_pad|><|vision_end|>")
    images = t.Qwen2VLImageProcessor(patch_size=16)
    processor = t.Qwen3VLProcessor(images, tokenizer, t.Qwen3VLVideoProcessor(), chat_template=template)
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
    linear = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2}
    text = TEXT | linear | {"linear_num_value_heads": 4, "head_dim": 32, "vocab_size": len(tokenizer)}
    text |= {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
    }
    config = t.Qwen3_5Config(
        text_config=text,
        vision_config=vision | {"num_position_embeddings": 64, "initializer_range": 0.15},
        **_qwen_ids(tokenizer),
    )
    return processor, config


def _idefics3(family):
    smol = family == "smolvlm"
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    named = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
    named |= {"end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"}
    tokenizer = _tokenizer(*named.values(), *rows, "<|begin_of_text|>", **(named if smol else {}))
    size = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    images = (t.SmolVLMImageProcessor if smol else t.Idefics3ImageProcessor)(**size)
    video = (t.SmolVLMVideoProcessor(),) if smol else ()
    template = chat_templates.idefics("<|im_start|>" if smol else "<|begin_of_text|>")
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
    images = t.GotOcr2ImageProcessor(size=SQUARE, max_patches=3)
    shared = {"image_seq_length": 4, "chat_template": chat_templates.chatml("<IMG_CONTEXT>\\n")}
    processor = t.InternVLProcessor(images, tokenizer, t.InternVLVideoProcessor(), **shared)
    config = t.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={**VISION, "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return processor, config


GRID = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]
CLIP = {**VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}


def _llava(_):
    tokenizer = _tokenizer("<image>", "</s>")
    tokenizer.eos_token = "</s>"
    images = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    shared = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = t.LlavaProcessor(images, tokenizer, chat_template=chat_templates.llava(), **shared)
    return processor, t.LlavaConfig(text_config=_text("llama", tokenizer), vision_config=CLIP, **_index(tokenizer))


def _llava_next(_):
    tokenizer = _tokenizer("<image>", "</s>")
    tokenizer.eos_token = "</s>"
    images = t.LlavaNextImageProcessor(image_grid_pinpoints=GRID, size={"shortest_edge": 56}, crop_size=SQUARE)
    shared = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = t.LlavaNextProcessor(images, tokenizer, chat_template=chat_templates.llava_next(), **shared)
    config = {"text_config": _text("mistral", tokenizer), "vision_config": CLIP, "image_grid_pinpoints": GRID}
    return processor, t.LlavaNextConfig(**config, **_index(tokenizer))


def _llava_onevision(_):
    tokenizer = _tokenizer("<image>", "<video>")
    images = t.LlavaOnevisionImageProcessor(image_grid_pinpoints=GRID, size=SQUARE)
    shared = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    shared["chat_template"] = chat_templates.llava_onevision()
    processor = t.LlavaOnevisionProcessor(images, tokenizer, t.LlavaOnevisionVideoProcessor(), **shared)
    config = {"text_config": _text("qwen2", tokenizer), "vision_config": SIGLIP, "image_grid_pinpoints": GRID}
    config["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    return processor, t.LlavaOnevisionConfig(**config, **_index(tokenizer))


def _granite_vision(_):
    """LLaVA-NeXT with SigLIP, whose features of several layers are joined, and Granite."""
    tokenizer = _tokenizer("<image>", "<|end_of_text|>", "<|system|>", "<|user|>", "<|assistant|>")
    tokenizer.eos_token = "<|end_of_text|>"
    images = t.LlavaNextImageProcessor(image_grid_pinpoints=GRID, size=SQUARE, crop_size=SQUARE)
    shared = {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    processor = t.LlavaNextProcessor(images, tokenizer, chat_template=chat_templates.granite(), **shared)
    scales = {"embedding_multiplier": 2.0, "attention_multiplier": 0.25, "residual_multiplier": 0.9}
    config = t.LlavaNextConfig(
        text_config=_text("granite", tokenizer) | scales | {"logits_scaling": 8.0},
        vision_config=SIGLIP,
        image_grid_pinpoints=GRID,
        vision_feature_layer=[-2, -1],
        vision_feature_select_strategy="full",
        **_index(tokenizer),
    )
    return processor, config


def _lfm2_vl(_):
    """With the convolution layers of LFM2, the last one among them, as in its published sizes."""
    names = ("<image>", "<|startoftext|>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
    tokenizer = _tokenizer(*names, *(f"<|img_row_{i}_col_{j}|>" for i in range(1, 5) for j in range(1, 5)))
    images = t.Lfm2VlImageProcessor(
        encoder_patch_size=14,
        tile_size=56,
        min_image_tokens=4,
        max_image_tokens=16,
        max_tiles=3,
        max_pixels_tolerance=1.5,
    )
    template = chat_templates.chatml("<image>", "<|startoftext|>")
    processor = t.Lfm2VlProcessor(images, tokenizer, chat_template=template)
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    config = t.Lfm2VlConfig(
        text_config=_text("lfm2", tokenizer) | layers | {"block_auto_adjust_ff_dim": False},
        vision_config={**VISION, "model_type": "siglip2_vision_model", "patch_size": 14, "num_patches": 16},
        image_token_id=processor.image_token_id,
        projector_hidden_size=48,
    )
    return processor, config


def _gemma3(_):
    """With a window that is shorter than a prompt in every other layer, and a tokenizer that writes <bos> by itself."""
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", **named)
    tokenizer.add_tokens(LINE_BREAKS)
    _begin_with_bos(tokenizer)
    images = t.Gemma3ImageProcessor(size=SQUARE)
    processor = t.Gemma3Processor(images, tokenizer, chat_template=chat_templates.gemma(), image_seq_length=16)
    more = {"head_dim": HEAD, "query_pre_attn_scalar": HEAD, "sliding_window": 12}
    more |= {"vocab_size": len(tokenizer), "layer_types": ["sliding_attention", "full_attention"]}
    config = t.Gemma3Config(
        text_config=TEXT | more,
        vision_config=SIGLIP,
        mm_tokens_per_image=16,
        **{f"{name}_index": tokenizer.convert_tokens_to_ids(token) for name, token in named.items()},
    )
    return processor, config


def _paligemma(_):
    """PaliGemma 2: no chat template; Gemma 2 with a window that is longer than the prompts, as in the published sizes."""
    tokenizer = _tokenizer("<bos>", "<eos>")
    tokenizer.add_tokens(LINE_BREAKS)
    tokenizer.bos_token, tokenizer.eos_token = "<bos>", "<eos>"
    images = t.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    processor = t.PaliGemmaProcessor(images, tokenizer)
    text = _text("gemma2", tokenizer) | {"head_dim": HEAD, "query_pre_attn_scalar": HEAD}
    config = t.PaliGemmaConfig(
        text_config=text,
        vision_config={**SIGLIP, "projection_dim": TEXT["hidden_size"]},
        image_token_index=processor.image_token_id,
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
    )
    return processor, config


def _text(model_type: str, tokenizer) -> dict:
    return {**TEXT, "model_type": model_type, "vocab_size": len(tokenizer)}


def _index(tokenizer) -> dict:
    return {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}


def _begin_with_bos(tokenizer) -> None:
    """Gemma's tokenizer: <bos> before every text, and <eos>, while a turn ends with <end_of_turn>."""
    tokenizer.bos_token, tokenizer.eos_token = "<bos>", "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
