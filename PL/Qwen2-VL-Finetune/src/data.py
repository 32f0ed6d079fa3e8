"""From train JSON to encoded samples. Labels are the answers and their end tokens.

A record in the LLaVA format, as the Parity Identifier writes it (`record_formats` reads others); `image` may be a list,
or missing:
    {"id": 4, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat airline is it?"},
                                                  {"from": "gpt", "value": "Virgin"}]}
"""

import math
import os
import random
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import process_group
import torch
import torch.distributed as dist
from cache import SampleCache
from PIL import Image
from record_formats import IMAGE, DataError, read_record, read_records
from tqdm import tqdm
from turns import Turn, special_tokens, turns

from mpa.files.image_files import ImageError, open_image
from mpa.models.families import image_token_id, tokenizer_options

IGNORE = -100  # label of a token without loss
TEXT_FIELDS = ("input_ids", "labels", "sample", "weight", "anchor")  # of an encoded sample; the others hold the images
PROCESSOR_TEXT_FIELDS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "labels")


# --- records ------------------------------------------------------------------------------------------


def read_samples(
    data_path: Sequence[str], image_folder: str = "", path_map: Sequence[str] = (), seed: int = 0
) -> list[dict]:
    """The checked records of all files, as {"id", "where", "images", "messages", "kind", "weight"} with chat-template messages.

    If the files have shares ("a.json:0.9"), samples are drawn by `seed` so that the mixture has these shares and one
    file is used in full. `path_map` has "OLD=NEW" for folders of images that have moved. No image is opened.
    Raises DataError for wrong arguments, and for a file that is not a list of records.
    """
    moves = [tuple(folder.rstrip("/") + "/" for folder in move.partition("=")[::2]) for move in path_map]
    if not all("=" in move and all(map(len, move.split("="))) for move in path_map):
        raise DataError(f"--path_map {' '.join(path_map)}: expected OLD=NEW, as in /workspace/data=/mnt/data.")
    files = [split_share(path) for path in data_path]
    if any(share for _, share in files) and not all(share for _, share in files):
        raise DataError(f"--data_path {' '.join(data_path)}: give each file a share, as in a.json:0.9, or none.")
    by_file = []
    for path, _ in files:
        records = ((f"{path}, record {i}", i, record) for i, record in enumerate(read_records(path)))
        by_file.append([_sample(read_record(r, where, i), where, image_folder, moves) for where, i, r in records])
    read = [len(samples) for samples in by_file]
    if files[0][1]:
        by_file = _drawn(by_file, files, seed)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for (path, _), samples, n in zip(files, by_file, read, strict=True):
            with_images = sum(bool(sample["images"]) for sample in samples)
            line = f"PL: {path}: {n:,} samples read, {len(samples):,} used, {with_images:,} of them with images."
            print(line, flush=True)
    return [sample for samples in by_file for sample in samples]


def split_share(path: str) -> tuple[str, float | None]:
    """("a.json", 0.9) of "a.json:0.9"; the share is None if there is none. File names may contain colons."""
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


def _drawn(by_file: list[list[dict]], files: list[tuple[str, float]], seed: int) -> list[list[dict]]:
    """Samples of each file, drawn without replacement in the files' shares, in the order of the file."""
    total, drawn = min(len(samples) / share for samples, (_, share) in zip(by_file, files, strict=True)), []
    for samples, (path, share) in zip(by_file, files, strict=True):
        indices = random.Random(seed).sample(range(len(samples)), round(share * total))
        if not indices:
            raise DataError(
                f"--data_path {path}:{share:g}: of its {len(samples)} samples none would be drawn, since the mixture has "
                f"only {total:.1f} samples in all. Raise its share, or leave the file out."
            )
        drawn.append([samples[i] for i in sorted(indices)])
    return drawn


def _sample(record: dict, where: str, image_folder: str, moves: list[tuple[str, str]]) -> dict:
    images = record["images"]
    for old, new in moves:
        images = [new + image.removeprefix(old) if image.startswith(old) else image for image in images]
    messages = [{"role": role, "content": _content(text)} for role, text in record["turns"]]
    paths = [os.path.join(image_folder, image) for image in images]
    loss = {"kind": record["kind"], "weight": record["weight"]}
    return {"id": record["id"], "where": where, "images": paths, "messages": messages, **loss}


def _content(text: str) -> list[dict]:
    """Chat-template parts of a turn. A line break next to <image> belongs to the mark, not to the prompt."""
    parts = []
    for i, piece in enumerate(re.split(f"(?:\r?\n)?{IMAGE}(?:\r?\n)?", text)):
        parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return parts


def refuse_special_tokens(samples: list[dict], tokenizer) -> None:
    """Raises DataError for text that contains a special token of the tokenizer, such as <|im_end|>.

    In an answer it would end the label early; in a question it could stand for an image that does not exist.
    """
    special = special_tokens(tokenizer)
    for sample in samples:
        parts = [part for message in sample["messages"] for part in message["content"]]
        for found in filter(None, (special.search(part.get("text", "")) for part in parts)):
            raise DataError(f"{sample['where']}: {found[0]} is a special token of the model. Remove it.")


# --- encoding -----------------------------------------------------------------------------------------


def encode(sample: dict, processor) -> dict:
    """One sample as model input: `input_ids` [T], `labels` [T] and the processor's image tensors.

    Prompt and answer are tokenised separately, as in generation, so that training starts from exactly the tokens that
    generation starts from. Labels are each answer's tokens and its end token, not what the template adds after it.
    Raises DataError if an image cannot be read, if the template does not append to a conversation, and if images in several
    turns have other tokens together than each turn's alone (LLaVA-OneVision cuts only a single image into tiles).
    """
    images = [_opened(path) for path in sample["images"]]
    ids, labels, rendered, n_used, processed = [], [], "", 0, []
    for prompt, answer, n_images in _turns(sample, processor):
        is_first = not ids
        options = tokenizer_options(processor, prompt) if is_first else {"add_special_tokens": False}
        if n_images:
            turn_images = [images[n_used : n_used + n_images]]
            processed.append(processor(text=[prompt], images=turn_images, return_tensors="pt", **options))
            prompt_ids = processed[-1]["input_ids"][0].tolist()
        else:
            prompt_ids = processor.tokenizer(prompt, **options).input_ids
        n_used += n_images
        answer_ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
        ids += prompt_ids + answer_ids
        labels += [IGNORE] * len(prompt_ids) + answer_ids
        rendered += prompt + answer
    if len(processed) > 1:  # images in several turns: the model expects them processed together
        processed = [processor(text=[rendered], images=[images], return_tensors="pt")]
        token = image_token_id(processor)
        together, apart = (_runs(tokens, token) for tokens in (processed[0]["input_ids"][0].tolist(), ids))
        if together != apart:
            raise DataError(
                f"id {sample['id']}: its images, in several turns, have {sum(together)} tokens together and {sum(apart)} one by "
                "one. Put all images into the first question, or make a record of each turn."
            )
    encoded = {
        name: value for inputs in processed for name, value in inputs.items() if name not in PROCESSOR_TEXT_FIELDS
    }
    return encoded | {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def _runs(ids: list[int], token: int) -> list[int]:
    """The lengths of the unbroken runs of a token."""
    return [len(list(run)) for is_token, run in groupby(ids, token.__eq__) if is_token]


def whole(sample: dict, processor) -> dict:
    """The model's inputs as its processor makes them of the whole conversation at once."""
    text = "".join(turn.prompt + turn.answer for turn in _turns(sample, processor))
    images = {"images": [[_opened(path) for path in sample["images"]]]} if sample["images"] else {}
    inputs = processor(text=[text], **images, return_tensors="pt", **tokenizer_options(processor, text))
    return {name: value for name, value in inputs.items() if name != "labels"}


def _turns(sample: dict, processor) -> list[Turn]:
    try:
        return [*turns(sample["messages"], processor)]
    except ValueError as error:
        raise DataError(f"id {sample['id']}: {error}") from None


def _opened(path: str | Image.Image) -> Image.Image:
    if isinstance(path, Image.Image):
        return path
    try:
        return open_image(path)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from None


class SampleInfo(NamedTuple):
    """An encoded sample's lengths in tokens, and where its encoding is stored, if anywhere.

    `encoded` has arrays, not tensors: each tensor that a worker process sends holds a file open.
    """

    length: int
    visual_length: int
    cache_key: str | None
    encoded: dict[str, np.ndarray] | None


class Samples(torch.utils.data.Dataset):
    """Encoded samples with their `lengths` and `visual_lengths` in tokens. Samples not stored are encoded on access.

    `losses` has what `objective.sample_losses` says of each sample, which is added to its encoding; none by default.
    """

    def __init__(self, samples: list[dict], infos: list[SampleInfo], processor, cache: SampleCache | None = None):
        self.samples, self.infos, self.processor, self.cache = samples, infos, processor, cache
        self.lengths = [info.length for info in infos]
        self.visual_lengths = [info.visual_length for info in infos]
        self.has_features = False  # the cache holds features instead of images: they cannot be made on access
        self.losses: list[dict] = [{} for _ in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        info, sample = self.infos[index], self.samples[index]
        if info.encoded:
            encoded = {name: torch.from_numpy(value) for name, value in info.encoded.items()}
        else:
            encoded = info.cache_key and self.cache.get(info.cache_key)
            if not encoded and info.cache_key and self.has_features:
                raise DataError(f"{self.cache.folder}: features are missing. The same command computes them again.")
            encoded = encoded or encode(sample, self.processor)
        return {**encoded, "sample": sample["id"], **self.losses[index]}


def encode_all(
    samples: list[dict],
    processor,
    max_length: int,
    on_too_long: str,
    memory: float = 0,
    cache: SampleCache | None = None,
    workers: int = 0,
) -> Samples:
    """Encode every sample once, so that errors appear before the first step. Collective: the ranks share the work.

    Samples with unusable images are left out and reported. A sample of more than `max_length` tokens is left out too if
    `on_too_long` is "drop". The first `memory` bytes of encodings stay in memory; the cache takes what fits of the rest.
    Raises DataError for a sample that is too long if `on_too_long` is "error", and if no sample is left.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, len(samples), world)
    workers = workers if len(own) > 64 else 0
    encoder = _Encoder(samples, processor, memory / max(1, workers), cache)
    loader = torch.utils.data.DataLoader(encoder, batch_size=None, sampler=own, num_workers=workers, collate_fn=_same)
    with process_group.signals_held():  # the workers start here
        encoded = iter(loader)
    results = []
    for result in tqdm(encoded, "checking samples", len(own), unit="sample", disable=None if rank == 0 else True):
        results.append(result)
        process_group.stop_if_asked()
    by_rank = process_group.all_gather(results)
    results = [by_rank[i % world][i // world] for i in range(len(samples))]

    kept, infos, left_out = [], [], []
    for sample, result in zip(samples, results, strict=True):
        if isinstance(result, str):
            left_out.append(f"id {sample['id']}: {result}")
        elif result.length > max_length:
            reason = f"{result.length} tokens, of which {result.visual_length} are visual, exceed --max_seq_length {max_length}"
            if on_too_long == "error":
                remedy = "Lower --image_max_pixels or --max_tiles, raise --max_seq_length, or leave such samples out: --on_too_long drop"
                raise DataError(f"{sample['where']}: {reason}. {remedy}.")
            left_out.append(f"id {sample['id']}: {reason}")
        else:
            kept.append(sample)
            infos.append(result)
    if left_out and rank == 0:
        print(f"{len(left_out)} of {len(samples)} samples left out:", *left_out[:10], sep="\n  ")
    if not kept:
        raise DataError(
            f"{samples[0]['where']}, and all others: none can be used. The first: {left_out[0].rstrip('.')}. Are the paths "
            "correct? See --image_folder."
        )
    return Samples(kept, infos, processor, cache)


class _Encoder(torch.utils.data.Dataset):
    """Encodes samples: a SampleInfo of each, or a sentence that says why its images cannot be used."""

    def __init__(self, samples: list[dict], processor, memory: float, cache: SampleCache | None):
        self.samples, self.processor, self.memory_left, self.cache = samples, processor, memory, cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> SampleInfo | str:
        sample, key, encoded = self.samples[index], None, None
        try:
            if self.cache:
                key = self.cache.key(sample)
                encoded = self.cache.get(key)
            is_cached = encoded is not None
            encoded = encoded if is_cached else encode(sample, self.processor)
        except (DataError, ImageError, ValueError, OSError) as error:
            return str(error)
        length, visual = len(encoded["input_ids"]), int((encoded["input_ids"] == image_token_id(self.processor)).sum())
        self.memory_left -= sum(value.nbytes for value in encoded.values())
        if self.memory_left >= 0:
            return SampleInfo(length, visual, None, {name: value.numpy() for name, value in encoded.items()})
        if key and not is_cached and not self.cache.put(key, encoded):
            key = None
        return SampleInfo(length, visual, key, None)


def _same(result: SampleInfo | str) -> SampleInfo | str:
    """Replaces the loader's default collation, which would convert arrays to tensors."""
    return result
