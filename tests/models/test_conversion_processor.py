"""Converted tokenizers, prompts and image processors do what the original code did."""

import base64
import json
import re
from itertools import chain, pairwise

import numpy as np
import originals
import pytest
import torch
from originals import ORIGINALS
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer

from mpa.files.records import InputError
from mpa.models import conversion, loading
from mpa.models.conversion import tokenizer as tokenizers

PROMPTS = json.loads((ORIGINALS / "prompts.json").read_text())


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl")
    return conversion.convert(originals.internvl(folder / "original"), folder / "out")


@pytest.fixture(scope="module")
def tinyllava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tinyllava")
    return conversion.convert(originals.tinyllava(folder / "original"), folder / "out")


@pytest.mark.parametrize("name", ["tokenizer_internlm2", "tokenizer_internlm2_no_dummy_prefix"])
def test_ids_and_texts_are_those_of_the_slow_tokenizer(name, tmp_path):
    tokenizers.load(ORIGINALS / name).save_pretrained(tmp_path)
    words, reference = AutoTokenizer.from_pretrained(tmp_path), originals.reference(name)
    assert len(reference["texts"]) >= 30
    for case in reference["texts"]:
        assert words(case["text"])["input_ids"] == case["input_ids"], case["text"]
        assert words.decode(case["input_ids"], skip_special_tokens=True) == case["decoded_skip_special"]


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The textbook BPE: join the pair of lowest rank until none is left."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks.get(a + b, 10**9), i) for i, (a, b) in enumerate(pairwise(parts))]
        rank, i = min(pairs, default=(10**9, 0))
        if rank == 10**9:
            return [ranks[part] for part in parts]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_stablelms_tiktoken_file(tmp_path):
    """Words are cut as its code does, digits one by one; special tokens lie behind the ranks, one id apart."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"th", b"the", b" the", b" c", b"at", b" cat", b"12"):
        ranks[token] = len(ranks)
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in ranks.items()]
    (tmp_path / "arcade100k.tiktoken").write_bytes(b"\n".join(lines))
    words = tokenizers.load(tmp_path)
    cut = ["the", " cat", " at", " ", "1", "2", "3", " the", "'s", "\n\n", " é"]
    assert words("".join(cut))["input_ids"] == [n for word in cut for n in merged(word.encode(), ranks)]
    assert words("e\u0301")["input_ids"] == merged("é".encode(), ranks)  # NFC, as its code
    assert words("the<|endoftext|>")["input_ids"] == [ranks[b"the"], len(ranks) + 1]
    assert words.eos_token == "<|endoftext|>" and words.convert_tokens_to_ids("<|im_start|>") == len(ranks) + 21
    (tmp_path / "arcade100k.tiktoken").write_text("dGhl 5\nno\n")
    with pytest.raises(InputError, match="line 2 is no token"):
        tokenizers.load(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\xff" * 20)
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        tokenizers.load(tmp_path)


def message(role: str, text: str) -> dict:
    """A message with "<image>" as an image part, as the stages write it: the line break is the template's."""
    parts = []
    for piece in re.split(r"(<image>\n?)", text):
        if piece:
            parts.append({"type": "image"} if piece.startswith("<image>") else {"type": "text", "text": piece})
    return {"role": role, "content": parts}


@pytest.mark.parametrize("template", ["internlm2-chat", "phi3-chat"])
def test_internvls_prompts_are_the_originals(template):
    written = PROMPTS["internvl"][template]["cases"]
    system, before, behind, end = conversion.internvl.TEMPLATES[template]
    text = conversion.internvl.chat_template(system, before, behind, end, "<IMG_CONTEXT>")
    words = tokenizers.load(ORIGINALS / "tokenizer_internlm2")
    words.chat_template = text
    for name, case in written.items():
        if name == "batch_chat_1_and_2_tiles":
            continue
        turns = []
        for question, answer in case.get("history", []):
            turns += [message("user", question), message("assistant", answer)]
        question = case["question_given"]
        if case["tiles"] and "<image>" not in question and not turns:
            question = "<image>\n" + question
        turns.append(message("user", question))
        expected = re.sub(r"<img>(<IMG_CONTEXT>)+</img>", "<IMG_CONTEXT>", case["text_after_replacement"])
        got = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert got == expected, name


def test_tinyllavas_prompts_are_the_originals(tinyllava):
    processor = AutoProcessor.from_pretrained(tinyllava)
    for name, case in PROMPTS["tinyllava_legacy"]["phi"]["cases"].items():
        question = case.get("question_given", "<image>\nWhat is shown in the picture?\nAnswer in one word.")
        turns = [message("user", question)]
        if name == "second_turn":
            turns += [message("assistant", "A cat."), message("user", "And now?")]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        assert text == case["text"], name
        pieces = case.get("pieces_tokenized_separately_without_bos_tokenizer")
        if pieces:  # text is split at the image and tokenised apart
            image, words = processor.tokenizer.convert_tokens_to_ids("<image>"), originals.byte_tokenizer()
            apart = [[image] if piece == "<IMAGE -200>" else words.encode(piece).ids for piece in pieces]
            assert processor.tokenizer(text)["input_ids"] == list(chain(*apart))


def test_internvls_token_ids_and_image_tokens(internvl):
    """The original tokenises the text with the tiles' tokens in it: 4 a tile here, 3 tiles for 2:1 and one for 1:1."""
    processor = AutoProcessor.from_pretrained(internvl)
    words = tokenizers.load(ORIGINALS / "tokenizer_internlm2")
    for size, tiles in (((56, 56), 1), ((112, 56), 3)):
        case = PROMPTS["internvl"]["internlm2-chat"]["cases"][f"one_picture_{tiles}_tile{'s' * (tiles > 1)}"]
        turn = message("user", "<image>\n" + case["question_given"])
        text = processor.apply_chat_template([turn], add_generation_prompt=True)
        inputs = processor(text=[text], images=[[Image.new("RGB", size, "red")]], return_tensors="pt")
        original = case["text_after_replacement"].replace("<IMG_CONTEXT>" * 256 * tiles, "<IMG_CONTEXT>" * 4 * tiles)
        assert inputs["input_ids"][0].tolist() == words(original)["input_ids"]
        assert inputs["pixel_values"].shape == (tiles, 3, 56, 56)


def test_internvls_tokens_lie_within_the_embedding_and_stop(internvl):
    processor = AutoProcessor.from_pretrained(internvl)
    config = json.loads((internvl / "config.json").read_text())
    generation = json.loads((internvl / "generation_config.json").read_text())
    assert max(processor.tokenizer.get_vocab().values()) < config["text_config"]["vocab_size"]
    assert processor.video_token == "<video>"
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")  # whatever config.json says: </s>
    assert (
        generation["eos_token_id"] == end == processor.tokenizer.eos_token_id == config["text_config"]["eos_token_id"]
    )
    assert config["image_token_id"] == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")


def test_a_full_vocabulary_lends_an_unused_token_to_the_video(tmp_path):
    """The released InternLM2 vocabulary has no free id: a token added for videos would lie outside the embedding."""
    source = originals.changed(originals.internvl(tmp_path / "original"), llm_config__vocab_size=435)
    weights = load_file(source / "model.safetensors")
    for name in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
        weights[name] = weights[name][:435].clone()
    save_file(weights, source / "model.safetensors")
    processor = AutoProcessor.from_pretrained(conversion.convert(source, tmp_path / "out"))
    assert processor.video_token == "</box>" and len(processor.tokenizer) == 435
    text = processor.apply_chat_template([message("user", "<image>\nWhat?")], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[Image.new("RGB", (112, 56))]], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 12 and inputs["input_ids"].max() < 435


@pytest.mark.parametrize("most", [6, 12])
def test_tilings_are_the_originals(internvl, most):
    images = AutoProcessor.from_pretrained(internvl).image_processor
    listed = json.loads((ORIGINALS / "tiling.json").read_text())
    settings = {"max_patches": most, "min_patches": 1, "patch_size": {"height": 448, "width": 448}}
    wrong = [
        size
        for size in listed["sizes"]
        if images.get_number_of_image_patches(size["height"], size["width"], settings)
        != size[f"max{most}"]["tiles_with_thumbnail"]
    ]
    assert len(listed["sizes"]) == 60 and wrong == []


def test_pixels_are_the_originals_to_the_bit(internvl, tinyllava):
    example = load_file(ORIGINALS / "preprocess_example.safetensors")
    image = Image.fromarray(example["picture_uint8_hwc"].numpy())
    images = loading.load_processor(str(internvl), 1, 10**9).image_processor
    got = images(image, max_patches=6, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    tiles = ((got * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(tiles, example["tiles_uint8_max6"])
    images = loading.load_processor(str(tinyllava), 1, 10**9).image_processor
    for pad in (True, False):
        got = images(image, do_pad=pad, return_tensors="pt")["pixel_values"]
        bytes_ = ((got * 0.5 + 0.5) * 255).round().to(torch.uint8)
        assert torch.equal(bytes_, example[f"siglip_75px_uint8_chw_{'pad' if pad else 'square'}"])
    assert images.do_pad and np.allclose(images.image_mean, 0.5)
