"""Miniatures, as in `miniatures`, of model types that are not in the table of families."""

from pathlib import Path

import chat_templates
import transformers as t
from miniatures import MROPE, SIGLIP, SQUARE, TEXT, VISION, _index, _text, _tokenizer, save

KINDS = ("aya_vision", "glm4v", "idefics2", "mistral3", "mllama", "vipllava")


def make(kind: str, folder: Path) -> str:
    return save(*globals()[f"_{kind}"](), folder)


def _aya_vision():
    names = "<image> <|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE TILE_GLOBAL".split()
    tokenizer = _tokenizer(*names)
    images = t.GotOcr2ImageProcessor(size=SQUARE, max_patches=3)
    shared = {"patch_size": 14, "img_size": 56, "downsample_factor": 2, "image_token": "<image>"}
    processor = t.AyaVisionProcessor(images, tokenizer, chat_template=chat_templates.chatml("<image>"), **shared)
    config = t.AyaVisionConfig(
        text_config=_text("cohere2", tokenizer) | {"sliding_window": 16, "logit_scale": 1.0},
        vision_config=SIGLIP,
        image_token_index=processor.image_token_id,
    )
    return processor, config


def _glm4v():
    names = "image video begin_of_image end_of_image begin_of_video end_of_video".split()
    tokenizer = _tokenizer(*(f"<|{name}|>" for name in names))
    images = t.Glm4vImageProcessor(patch_size=14, size={"shortest_edge": 3136, "longest_edge": 12544})
    template = chat_templates.chatml("<|begin_of_image|><|image|><|end_of_image|>")
    processor = t.Glm4vProcessor(images, tokenizer, t.Glm4vVideoProcessor(), chat_template=template)
    tokens = {"image": "image", "video": "video", "image_start": "begin_of_image", "image_end": "end_of_image"}
    tokens |= {"video_start": "begin_of_video", "video_end": "end_of_video"}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48}
    config = t.Glm4vConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), **MROPE},
        vision_config=vision | {"image_size": 56, "initializer_range": 0.15},
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()},
    )
    return processor, config


def _idefics2():
    tokenizer = _tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    images = t.Idefics2ImageProcessor(size={"shortest_edge": 40, "longest_edge": 56}, do_image_splitting=False)
    template = chat_templates.idefics("")
    processor = t.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    tokenizer.eos_token = "<end_of_utterance>"
    config = t.Idefics2Config(
        text_config=_text("mistral", tokenizer),
        vision_config={**VISION, "image_size": 56, "patch_size": 14},
        perceiver_config={"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
        | {"resampler_head_dim": 16, "num_key_value_heads": 2},
        image_token_id=processor.image_token_id,
    )
    return processor, config


def _mistral3():
    tokenizer = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size=14)
    shared = {"patch_size": 14, "spatial_merge_size": 2, "chat_template": chat_templates.chatml("[IMG]")}
    processor = t.PixtralProcessor(images, tokenizer, **shared)
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = t.Mistral3Config(
        text_config=_text("mistral", tokenizer),
        vision_config=vision | {"num_attention_heads": 2, "image_size": 112, "patch_size": 14, "head_dim": 16},
        image_token_index=processor.image_token_id,
    )
    return processor, config


def _mllama():
    tokenizer = _tokenizer("<|image|>", "<|begin_of_text|>", "<|python_tag|>")
    tokenizer.bos_token = "<|begin_of_text|>"
    images = t.MllamaImageProcessor(size=SQUARE, max_image_tiles=2)
    template = chat_templates.chatml("<|image|>", "<|begin_of_text|>")
    processor = t.MllamaProcessor(images, tokenizer, chat_template=template)
    text = {**TEXT, "vocab_size": len(tokenizer), "num_hidden_layers": 3, "cross_attention_layers": [1]}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 48, "vision_output_dim": 64, "image_size": 56, "patch_size": 14}
    vision |= {"max_num_tiles": 2, "intermediate_layers_indices": [0], "initializer_range": 0.15}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    config = t.MllamaConfig(text_config=text, vision_config=vision, image_token_index=processor.image_token_id)
    return processor, config


def _vipllava():
    tokenizer = _tokenizer("<image>", "</s>")
    tokenizer.eos_token = "</s>"
    images = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    shared = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = t.LlavaProcessor(images, tokenizer, chat_template=chat_templates.llava(), **shared)
    vision = {**VISION, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 14}
    layers = {"vision_feature_layers": [-2, -1]}
    return processor, t.VipLlavaConfig(
        text_config=_text("llama", tokenizer), vision_config=vision, **layers, **_index(tokenizer)
    )
