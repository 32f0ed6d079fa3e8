"""The small suite's four models: Qwen2-VL and InternVL, each as a large and a small miniature with new weights.

All see an image of 96×96 pixels as 12×12 patches and 36 visual tokens. They share a byte-level BPE.
"""

import math
import random
from pathlib import Path

import transformers as t
from scenes import DRAW, SIZE
from torch import nn

from mpa.method.prompts import TASK_PROMPTS, answer_prompt

PATCH, PATCHES, VISUAL_TOKENS = 8, 144, 36
# Width and layers of the vision tower; width, layers and heads of the language model; width of its MLP; training steps.
LARGE = {"vision": (128, 4), "text": (192, 4, 6), "hidden": 512}
LARGE |= {
    "vision_steps": (2000, 2000),
    "language_steps": 3000,
    "joint_steps": 800,
    "annotating": 0.2,
}  # share of the images
SMALL = {"vision": (64, 3), "text": (96, 2, 3), "hidden": 256}
SMALL |= {"vision_steps": (2500,), "language_steps": 600, "joint_steps": 0, "annotating": 0.0}
MODELS = {
    "qwen-large": {**LARGE, "family": "qwen", "seed": 1},
    "internvl-large": {**LARGE, "family": "internvl", "seed": 2},
    "qwen-small": {**SMALL, "family": "qwen", "seed": 3},
    "internvl-small": {**SMALL, "family": "internvl", "seed": 4},
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL_TOKENS += ["<|image_pad|>", "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
# Render the same text as the chat templates of the Qwen2-VL and the InternVL checkpoints.
SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
)
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '@IMAGE@' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
QWEN_TEMPLATE = SYSTEM + TEMPLATE.replace("@IMAGE@", "<|vision_start|><|image_pad|><|vision_end|>")
INTERNVL_TEMPLATE = TEMPLATE.replace("@IMAGE@", "<IMG_CONTEXT>\\n")


def make_tokenizer(folder: Path) -> None:
    """Byte-level BPE learnt on our own questions and prompts, in Qwen2's tokenizer class."""
    rng = random.Random(0)
    corpus = [answer_prompt(q) for q in TASK_PROMPTS.values()] * 400
    for name in [name for name in DRAW for _ in range(1000)]:
        for question in DRAW[name](rng).questions:
            corpus += [answer_prompt(question.text), f"Question: {question.text}\nAnswer: {question.answer}"]
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 400
    tokenizer = t.Qwen2Tokenizer().train_new_from_iterator(corpus, vocab_size=1024, new_special_tokens=SPECIAL_TOKENS)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side = "<|im_end|>", "<|endoftext|>", "left"
    tokenizer.save_pretrained(folder)


def make_processor(family: str, tokenizer: Path):
    if family == "qwen":
        pixels = {"min_pixels": SIZE * SIZE, "max_pixels": SIZE * SIZE, "patch_size": PATCH}
        images, videos = t.Qwen2VLImageProcessor(**pixels), t.Qwen2VLVideoProcessor()
        tokenizer = t.AutoTokenizer.from_pretrained(tokenizer)
        return t.Qwen2VLProcessor(images, tokenizer, videos, chat_template=QWEN_TEMPLATE)
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = t.AutoTokenizer.from_pretrained(tokenizer, extra_special_tokens={**named, "video_token": "<video>"})
    images = t.GotOcr2ImageProcessor(size={"height": SIZE, "width": SIZE}, max_patches=1)
    shared = {"image_seq_length": VISUAL_TOKENS, "chat_template": INTERNVL_TEMPLATE}
    return t.InternVLProcessor(images, tokenizer, t.InternVLVideoProcessor(), **shared)


def make_model(name: str, tokenizer):
    """A model from a configuration, with an initialisation with which a narrow network learns.

    The default, N(0, 0.02), leaves these widths on a plateau for thousands of steps.
    """
    size, id_of = MODELS[name], tokenizer.convert_tokens_to_ids
    (seen, deep), (width, layers, heads) = size["vision"], size["text"]
    t.set_seed(size["seed"])
    ids = {"eos_token_id": id_of("<|im_end|>"), "pad_token_id": id_of("<|endoftext|>"), "bos_token_id": None}
    text = {"hidden_size": width, "intermediate_size": size["hidden"], "num_hidden_layers": layers, **ids}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads // 3, "max_position_embeddings": 2048}
    text |= {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "max_window_layers": layers}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if size["family"] == "qwen":
        config = t.Qwen2VLConfig(
            text_config={**text, "rope_parameters": {**rope, "mrope_section": [4, 6, 6]}},
            vision_config={"embed_dim": seen, "depth": deep, "num_heads": seen // 32, "hidden_size": width}
            | {"mlp_ratio": 2, "patch_size": PATCH},
            image_token_id=id_of("<|image_pad|>"),
            video_token_id=id_of("<|video_pad|>"),
            vision_start_token_id=id_of("<|vision_start|>"),
            vision_end_token_id=id_of("<|vision_end|>"),
            tie_word_embeddings=True,
        )
    else:
        config = t.InternVLConfig(
            text_config={**text, "model_type": "qwen2", "rope_parameters": rope},
            vision_config={"hidden_size": seen, "num_hidden_layers": deep, "num_attention_heads": seen // 32}
            | {"intermediate_size": 2 * seen, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]},
            image_token_id=id_of("<IMG_CONTEXT>"),
            image_seq_length=VISUAL_TOKENS,
            tie_word_embeddings=True,
        )
    model = t.AutoModelForImageTextToText.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if "embed_tokens" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
        elif "position_embedding" in parameter_name or "cls_token" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
        elif "lambda" in parameter_name:
            nn.init.ones_(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.8 / math.sqrt(parameter[0].numel()))
    model.generation_config = t.GenerationConfig(
        eos_token_id=[id_of("<|im_end|>"), id_of("<|endoftext|>")], pad_token_id=id_of("<|endoftext|>")
    )
    return model
