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
    """`folder`, whose config.json has these fields; "llm_config.x" is a field within."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        *path, last = name.split("__")
        place = config
        for step in path:
            place = place[step]
        place[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def internvl(folder: Path, name: str = "internvl2_2b_like", tokenizer: str = "tokenizer_internlm2") -> Path:
    """InternVL with the small InternLM2 tokenizer, all of whose ids lie within the vocabulary."""
    shutil.copytree(ORIGINALS / name, folder, ignore=shutil.ignore_patterns("reference*"))
    for file in (ORIGINALS / tokenizer).iterdir():
        if file.name != "reference.json":
            shutil.copy(file, folder)
    changed(folder, template="internlm2-chat")  # the tokenizer has no tokens of another template
    if "4b" in name:  # as released; the reference's is small, so that a long text passes it
        changed(folder, llm_config__original_max_position_embeddings=4096)
    return folder


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
