"""From train JSON to samples as a model takes them. Only the answers and their end tokens are labelled.

A record in the LLaVA form, as the Parity Identifier writes it (`record_formats.py` reads others); `image` may be a list, or missing:
    {"id": 4, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat airline is it?"},
                                                  {"from": "gpt", "value": "Virgin"}]}
"""

import math
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import process_group
import torch
import torch.distributed as dist
from cache import Cache
from image_files import ImageError, open_image
from PIL import Image
from record_formats import IMAGE, DataError, read_record, read_records
from tqdm import tqdm

IGNORE = -100
OF_TEXT = ("input_ids", "labels", "sample")  # of an encoded sample; the rest is images
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")  # a processor's output that is not about images


def read_samples(
    data_path: Sequence[str], image_folder: str = "", path_map: Sequence[str] = (), seed: int = 0
) -> list[dict]:
    """The records of all files (`record_formats`), checked, as {"id", "where", "images", "messages"} with chat-template messages.

    A file may have a share of the mixture ("a.json:0.9"): then as many of each file are drawn, by `seed`,
    as keep the shares and leave one file whole. `path_map` are "OLD=NEW" folders of images that have
    moved. Raises DataError for a file that is no list of such records. No image is opened: see `measure`.
    """
    moves = [tuple(folder.rstrip("/") + "/" for folder in move.partition("=")[::2]) for move in path_map]
    if not all("=" in move and all(map(len, move.split("="))) for move in path_map):
        raise DataError(f"--path_map {' '.join(path_map)}: expected OLD=NEW, as in /workspace/data=/mnt/data.")
    files = [split_share(path) for path in data_path]
    if any(share for _, share in files) and not all(share for _, share in files):
        raise DataError(f"--data_path {' '.join(data_path)}: give each file a share, as in a.json:0.9, or none.")
    parts, lines = [], []
    for path, _ in files:
        records = enumerate(read_records(path))
        parts.append(
            [
                _sample(read_record(r, f"{path}, record {i}", i), f"{path}, record {i}", image_folder, moves)
                for i, r in records
            ]
        )
    read = [len(part) for part in parts]
    if files[0][1]:
        size = min(len(part) / share for part, (_, share) in zip(parts, files, strict=True))
        for part, (path, share) in zip(parts, files, strict=True):
            chosen = random.Random(seed).sample(range(len(part)), round(share * size))
            if not chosen:
                raise DataError(
                    f"--data_path {path}:{share:g}: of its {len(part)} samples none would be drawn, since the mixture has only "
                    f"{size:.1f} samples to its whole. Raise its share, or leave the file out."
                )
            part[:] = [part[i] for i in sorted(chosen)]
    for (path, _), part, n in zip(files, parts, read, strict=True):
        with_images = sum(bool(sample["images"]) for sample in part)
        lines.append(f"PL: {path}: {n:,} samples read, {len(part):,} taken, {with_images:,} of them with images.")
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)
    return [sample for part in parts for sample in part]


def split_share(path: str) -> tuple[str, float | None]:
    """("a.json", 0.9) of "a.json:0.9"; the share is None where none is given. A file may have a colon in its name."""
    name, colon, share = path.rpartition(":")
    if not colon or Path(path).exists():
        return path, None
    try:
        value = float(share)
    except ValueError:
        return path, None
    if not 0 < value < math.inf:
        raise DataError(f"--data_path {path}: a share must be above 0.")
    return name, value


def refuse_special_tokens(samples: list[dict], tokenizer) -> None:
    """Raises DataError for text with a mark that the tokenizer keeps for itself, such as <|im_end|>.

    In an answer it would cut the label short; in a question it could stand for an image that is not there.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = re.compile("|".join(map(re.escape, sorted({*tokenizer.all_special_tokens, *added}))))
    for sample in samples:
        parts = [part for message in sample["messages"] for part in message["content"]]
        for found in filter(None, (special.search(part.get("text", "")) for part in parts)):
            raise DataError(f"{sample['where']}: {found[0]} is a special token of the model. Take it out.")


def measure(
    samples: list[dict],
    processor,
    most: int,
    on_too_long: str,
    memory: float = 0,
    cache: Cache | None = None,
    workers: int = 0,
) -> "Samples":
    """The samples that can be trained on, each made once: so all is known to fit before the first step.

    Left out, with a line each, are samples whose images cannot be used. One of more than `most` tokens is an
    error, or with `on_too_long` "drop" left out too. Kept are the first in memory, while so many bytes hold them, the
    next in the cache, while that has room. Several ranks share the work. Raises DataError when none is left.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ours = range(rank, len(samples), world)
    workers = workers if len(ours) > 64 else 0
    tried = _Tried(samples, processor, memory / max(1, workers), cache)
    made = torch.utils.data.DataLoader(tried, batch_size=None, sampler=ours, num_workers=workers, collate_fn=_same)
    looks = list(tqdm(made, "checking samples", len(ours), unit="sample", disable=None if rank == 0 else True))
    shared = process_group.all_gather(looks)
    looks = [shared[i % world][i // world] for i in range(len(samples))]

    result, left_out = Samples([], processor, cache), []
    for sample, look in zip(samples, looks, strict=True):
        if isinstance(look, str):
            left_out.append(f"id {sample['id']}: {look}")
            continue
        if look.length > most:
            says = f"{look.length} tokens, of which {look.visual} of its images, are more than --max_seq_length {most}"
            if on_too_long == "error":
                remedy = (
                    "Lower --image_max_pixels, raise --max_seq_length, or leave such samples out: --on_too_long drop"
                )
                raise DataError(f"{sample['where']}: {says}. {remedy}.")
            left_out.append(f"id {sample['id']}: {says}")
            continue
        result.add(sample, look)
    if left_out and rank == 0:
        print(f"{len(left_out)} of {len(samples)} samples left out:", *left_out[:10], sep="\n  ")
    if not len(result):
        raise DataError(
            f"{samples[0]['where']}, and all others: none can be used. Are the paths right? See --image_folder."
        )
    return result


class Look(NamedTuple):
    """What is known of a sample that was made once: its tokens, and its key in the cache or itself, if it is kept.

    As arrays: each tensor that another process sends holds a file open.
    """

    length: int
    visual: int
    key: str | None
    encoded: dict[str, np.ndarray] | None


def _same(look: Look | str) -> Look | str:
    """In place of torch's conversion of arrays to tensors."""
    return look


class _Tried(torch.utils.data.Dataset):
    """A Look at each sample, or why it cannot be used: an image that is none, or of a shape that the processor refuses."""

    def __init__(self, samples: list[dict], processor, memory: float, cache: Cache | None):
        self.samples, self.processor, self.memory, self.cache = samples, processor, memory, cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Look | str:
        sample, key, encoded = self.samples[index], None, None
        try:
            if self.cache:
                key = self.cache.key(sample)
                encoded = self.cache.get(key)
            found = encoded is not None
            encoded = encoded if found else encode(sample, self.processor)
        except (DataError, ImageError, ValueError, OSError) as error:
            return str(error)
        length, visual = len(encoded["input_ids"]), int((encoded["input_ids"] == self.processor.image_token_id).sum())
        self.memory -= sum(value.nbytes for value in encoded.values())
        if self.memory >= 0:
            return Look(length, visual, None, {name: value.numpy() for name, value in encoded.items()})
        if key and not found and not self.cache.put(key, encoded):
            key = None
        return Look(length, visual, key, None)


def _sample(record: dict, where: str, image_folder: str, moves: list[tuple[str, str]]) -> dict:
    images = record["images"]
    for old, new in moves:
        images = [new + image.removeprefix(old) if image.startswith(old) else image for image in images]
    messages = [{"role": role, "content": _content(text)} for role, text in record["turns"]]
    paths = [os.path.join(image_folder, image) for image in images]
    return {"id": record["id"], "where": where, "images": paths, "messages": messages}


def _content(text: str) -> list[dict]:
    """Chat-template parts. A line break beside <image> belongs to the mark, not to the prompt."""
    parts = []
    for i, piece in enumerate(re.split(f"(?:\r?\n)?{IMAGE}(?:\r?\n)?", text)):
        parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return parts


def encode(sample: dict, processor) -> dict:
    """One sample as the model takes it, with labels [T].

    Prompts and answers are tokenised apart, as they are when the model is asked: it is trained from
    exactly the token it will start from. AnswerLogits are each answer's tokens and its end token; not the
    line break that a template may put after it. Raises DataError, with the id, for an image that cannot be read.
    """
    end, messages = processor.tokenizer.eos_token, sample["messages"]
    opened = [_opened(path) for path in sample["images"]]
    ids, labels, rendered, used, made = [], [], "", 0, []
    for turn in (i for i, message in enumerate(messages) if message["role"] == "user"):
        prompt = processor.apply_chat_template(messages[: turn + 1], add_generation_prompt=True, tokenize=False)
        whole = processor.apply_chat_template(messages[: turn + 2], tokenize=False)
        answer, _, _ = whole[len(prompt) :].partition(end)
        if not (prompt.startswith(rendered) and whole.startswith(prompt) and answer):
            raise DataError(f"id {sample['id']}: the chat template does not keep the conversation in order.")
        new = {} if turn == 0 or messages[turn - 1]["role"] == "system" else {"add_special_tokens": False}
        here = sum(part["type"] == "image" for part in messages[turn]["content"])
        if here:
            images = [opened[used : used + here]]
            made.append(processor(text=[prompt[len(rendered) :]], images=images, return_tensors="pt", **new))
            asked = made[-1]["input_ids"][0].tolist()
        else:
            asked = processor.tokenizer(prompt[len(rendered) :], **new).input_ids
        used += here
        answered = processor.tokenizer(answer + end, add_special_tokens=False).input_ids
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
        rendered = prompt + answer + end
    if len(made) > 1:  # images in several turns: together, as the model takes a sample's
        made = [processor(text=[rendered], images=[opened], return_tensors="pt")]
    # What is left of the processor's output is the images.
    encoded = {name: value for inputs in made for name, value in inputs.items() if name not in TEXT}
    encoded |= {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    return encoded


def _opened(path: str | Image.Image) -> Image.Image:
    if isinstance(path, Image.Image):
        return path
    try:
        return open_image(path)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from None


class Samples(torch.utils.data.Dataset):
    """Encoded samples, with their `lengths` and `visual` tokens; those not kept are made when asked for."""

    def __init__(self, samples: list[dict], processor, cache: Cache | None = None):
        self.samples, self.processor, self.cache = samples, processor, cache
        self.looks, self.lengths, self.visual = [], [], []
        self.replaced = False  # what is kept has features for images, and cannot be made here

    def add(self, sample: dict, look: Look) -> None:
        self.samples.append(sample)
        self.looks.append(look)
        self.lengths.append(look.length)
        self.visual.append(look.visual)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        look, sample = self.looks[index], self.samples[index]
        if look.encoded:
            encoded = {name: torch.from_numpy(value) for name, value in look.encoded.items()}
        else:
            encoded = look.key and self.cache.get(look.key)
            if not encoded and look.key and self.replaced:
                raise DataError(f"{self.cache.folder}: features have gone from it. The same call makes them again.")
            encoded = encoded or encode(sample, self.processor)
        return {**encoded, "sample": sample["id"]}
