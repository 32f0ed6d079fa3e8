"""Original checkpoints in miniature (tests/data/originals), given the files that make them whole: tokenizer, tower."""

import json
import shutil
from pathlib import Path

from conftest import DATA

ORIGINALS = DATA / "originals"


def reference(name: str) -> dict:
    return json.loads((ORIGINALS / name / "reference.json").read_text())


def image_token_id(name: str) -> int:
    ids = reference(name)["special_token_ids"]
    return ids.get("img_context", ids.get("image_token_used_in_expanded_ids"))


def changed(folder: Path, **fields) -> Path:
    """`folder`, whose config.json has these fields; "llm_config__x" is a field within, ... removes it."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        *path, last = name.split("__")
        place = config
        for step in path:
            place = place[step]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def internvl(folder: Path, name: str = "internvl2_2b_like", tokenizer: str = "tokenizer_internlm2") -> Path:
    """InternVL with the small InternLM2 tokenizer, all of whose ids lie within the vocabulary."""
    shutil.copytree(ORIGINALS / name, folder, ignore=shutil.ignore_patterns("reference*"))
    with_tokenizer(folder, tokenizer)
    changed(folder, template="internlm2-chat")  # the tokenizer has no tokens of another template
    if "4b" in name:  # as released; the reference's is small, so that a long text passes it
        changed(folder, llm_config__original_max_position_embeddings=4096)
    return folder


def with_tokenizer(folder: Path, name: str = "tokenizer_internlm2") -> Path:
    for file in (ORIGINALS / name).iterdir():
        if file.name != "reference.json":
            shutil.copy(file, folder)
    return folder


def random_internvl(
    folder: Path, hidden: int, head: int, layers: int, vocabulary: int, shards: int = 1, dtype: str = "float32"
) -> Path:
    """An InternVL2-2B at random: the small vision tower, and an InternLM2 of this size, with two heads per key-value head."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((ORIGINALS / "internvl2_2b_like/config.json").read_text())
    config["template"], wide = "internlm2-chat", 4 * hidden
    config["llm_config"] |= {"hidden_size": hidden, "intermediate_size": wide, "vocab_size": vocabulary}
    config["llm_config"] |= {"num_hidden_layers": layers, "num_attention_heads": hidden // head}
    config["llm_config"] |= {"num_key_value_heads": hidden // head // 2}
    small = load_file(ORIGINALS / "internvl2_2b_like/model.safetensors")
    shapes = {name: tensor.shape for name, tensor in small.items() if not name.startswith("language_model.")}
    shapes |= {"mlp1.1.weight": (hidden, 256), "mlp1.1.bias": (hidden,)}
    shapes |= {"mlp1.3.weight": (hidden, hidden), "mlp1.3.bias": (hidden,)}
    shapes |= {"language_model.model.norm.weight": (hidden,), "language_model.output.weight": (vocabulary, hidden)}
    shapes |= {"language_model.model.tok_embeddings.weight": (vocabulary, hidden)}
    for layer in range(layers):
        name = f"language_model.model.layers.{layer}."
        shapes |= {f"{name}attention.wqkv.weight": (2 * hidden, hidden), f"{name}attention.wo.weight": (hidden, hidden)}
        shapes |= {f"{name}feed_forward.{w}.weight": (wide, hidden) for w in ("w1", "w3")}
        shapes |= {f"{name}feed_forward.w2.weight": (hidden, wide)}
        shapes |= {f"{name}{norm}.weight": (hidden,) for norm in ("attention_norm", "ffn_norm")}
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    table, names = {}, sorted(shapes)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        tensors = {name: _random(torch, name, shapes[name]).to(getattr(torch, dtype)) for name in names[number::shards]}
        save_file(tensors, folder / file)
        table |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _random(torch, name: str, shape):
    """Of a size at which a reply depends on the image: norms near 1, matrices that keep the variance."""
    if "norm" in name or name.startswith("mlp1.0") or len(shape) < 2:
        return torch.rand(shape) + 0.5
    return torch.randn(shape) * (1.5 / shape[-1] ** 0.5 if "embed" not in name else 1.0)


def tinyllava(folder: Path) -> Path:
    """TinyLLaVA with a byte-level tokenizer, and its vision tower inside."""
    shutil.copytree(ORIGINALS / "tinyllava_2_0b_like", folder, ignore=shutil.ignore_patterns("reference*"))
    words = byte_tokenizer()
    words.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_tokenizer():
    """256 bytes, 43 merges, and <|endoftext|> as id 299."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    text = ["What color is the shape? Is there a red circle in the image? Answer in one word. yes no blue green"] * 5
    trainer = trainers.BpeTrainer(
        vocab_size=299, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator(text, trainer)
    assert words.get_vocab_size() == 299
    words.add_special_tokens(["<|endoftext|>"])
    return words


def random_tinyllava(folder: Path) -> Path:
    """The same with a language model of twice the width, at random: heads of 32."""
    import torch
    from safetensors.torch import load_file, save_file

    tinyllava(folder)
    twice = {64: 128, 144: 288}
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "vision_tower" not in name:
            weights[name] = _random(torch, name, [twice.get(side, side) for side in tensor.shape])
    save_file(weights, folder / "model.safetensors")
    return changed(folder, hidden_size=128, intermediate_size=288)
