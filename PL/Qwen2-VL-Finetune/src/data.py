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

import process_group
import torch
import torch.distributed as dist
from PIL import Image
from record_formats import IMAGE, read_record, read_records
from tqdm import tqdm
from turns import Turn, special_tokens, turns

from mpa.files import signals
from mpa.files.image_files import ImageError, open_image
from mpa.files.records import InputError
from mpa.models.families import image_token_id, tokenizer_options

IGNORE = -100  # label of a token without loss
TEXT_FIELDS = ("input_ids", "labels", "sample")  # of an encoded sample; the others hold the images
PROCESSOR_TEXT_FIELDS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "labels")


# --- records ------------------------------------------------------------------------------------------


def read_samples(
    data_path: Sequence[str], image_folder: str = "", path_map: Sequence[str] = (), seed: int = 0
) -> list[dict]:
    """The checked records of all files, as {"id", "where", "images", "messages"} with chat-template messages.

    If the files have shares ("a.json:0.9"), samples are drawn by `seed` so that the mixture has these shares and one
    file is used in full. `path_map` has "OLD=NEW" for folders of images that have moved. No image is opened.
    Raises InputError for wrong arguments, and for a file that is not a list of records.
    """
    moves = [tuple(folder.rstrip("/") + "/" for folder in move.partition("=")[::2]) for move in path_map]
    if not all("=" in move and all(map(len, move.split("="))) for move in path_map):
        raise InputError(f"--path_map {' '.join(path_map)}: expected OLD=NEW, as in /workspace/data=/mnt/data.")
    files = [split_share(path) for path in data_path]
    if any(share for _, share in files) and not all(share for _, share in files):
        raise InputError(f"--data_path {' '.join(data_path)}: give each file a share, as in a.json:0.9, or none.")
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
        raise InputError(f"--data_path {path}: a share must be above 0.")
    return name, value


def _drawn(by_file: list[list[dict]], files: list[tuple[str, float]], seed: int) -> list[list[dict]]:
    """Samples of each file, drawn without replacement in the files' shares, in the order of the file."""
    total, drawn = min(len(samples) / share for samples, (_, share) in zip(by_file, files, strict=True)), []
    for samples, (path, share) in zip(by_file, files, strict=True):
        indices = random.Random(seed).sample(range(len(samples)), round(share * total))
        if not indices:
            raise InputError(
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
    return {"id": record["id"], "where": where, "images": paths, "messages": messages}


def _content(text: str) -> list[dict]:
    """Chat-template parts of a turn. A line break next to <image> belongs to the mark, not to the prompt."""
    parts = []
    for i, piece in enumerate(re.split(f"(?:\r?\n)?{IMAGE}(?:\r?\n)?", text)):
        parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": piece}] * bool(piece)
    return parts


def refuse_special_tokens(samples: list[dict], tokenizer) -> None:
    """Raises InputError for text that contains a special token of the tokenizer, such as <|im_end|>.

    In an answer it would end the label early; in a question it could stand for an image that does not exist.
    """
    special = special_tokens(tokenizer)
    for sample in samples:
        parts = [part for message in sample["messages"] for part in message["content"]]
        for found in filter(None, (special.search(part.get("text", "")) for part in parts)):
            raise InputError(f"{sample['where']}: {found[0]} is a special token of the model. Remove it.")


# --- encoding -----------------------------------------------------------------------------------------


def encode(sample: dict, processor) -> dict:
    """One sample as model input: `input_ids` [T], `labels` [T] and the processor's image tensors.

    Prompt and answer are tokenised separately, as in generation, so that training starts from exactly the tokens that
    generation starts from. Labels are each answer's tokens and its end token, not what the template adds after it.
    Raises InputError if an image cannot be read, if the template does not append to a conversation, and if images in several
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
            raise InputError(
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
        raise InputError(f"id {sample['id']}: {error}") from None


def _opened(path: str | Image.Image) -> Image.Image:
    if isinstance(path, Image.Image):
        return path
    try:
        return open_image(path)
    except ImageError as error:
        raise InputError(f"{path}: {error}") from None


class Samples(torch.utils.data.Dataset):
    """Checked samples with their `lengths` and `visual_lengths` in tokens. A sample is encoded on access."""

    def __init__(self, samples: list[dict], lengths: list[tuple[int, int]], processor):
        """`lengths` are each sample's tokens: (all, visual)."""
        self.samples, self.processor = samples, processor
        self.lengths, self.visual_lengths = map(list, zip(*lengths, strict=True))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        return encode(sample, self.processor) | {"sample": sample["id"]}


def check_all(samples: list[dict], processor, max_length: int, on_too_long: str, workers: int = 0) -> Samples:
    """Encode every sample once, so that errors appear before the first step. Collective: the ranks share the work.

    Samples with unusable images are left out and reported. A sample of more than `max_length` tokens is left out too if
    `on_too_long` is "drop". Raises InputError for a sample that is too long if `on_too_long` is "error", and if no sample
    is left.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = range(rank, len(samples), world)
    workers = workers if len(own) > 64 else 0
    check = _Check(samples, processor)
    loader = torch.utils.data.DataLoader(
        check,
        batch_size=None,
        sampler=own,
        num_workers=workers,
        collate_fn=_same,
        worker_init_fn=signals.follow_parent,
    )
    with signals.signals_held():  # the workers start here
        checked = iter(loader)
    results = []
    for result in tqdm(checked, "checking samples", len(own), unit="sample", disable=None if rank == 0 else True):
        results.append(result)
        signals.stop_if_asked()
    by_rank = process_group.all_gather(results)
    results = [by_rank[i % world][i // world] for i in range(len(samples))]

    kept, lengths, left_out = [], [], []
    for sample, result in zip(samples, results, strict=True):
        if isinstance(result, str):
            left_out.append(f"id {sample['id']}: {result}")
        elif result[0] > max_length:
            reason = f"{result[0]} tokens, of which {result[1]} are visual, exceed --max_seq_length {max_length}"
            if on_too_long == "error":
                remedy = "Lower --image_max_pixels or --max_tiles, raise --max_seq_length, or leave such samples out: --on_too_long drop"
                raise InputError(f"{sample['where']}: {reason}. {remedy}.")
            left_out.append(f"id {sample['id']}: {reason}")
        else:
            kept.append(sample)
            lengths.append(result)
    if left_out and rank == 0:
        print(f"{len(left_out)} of {len(samples)} samples left out:", *left_out[:10], sep="\n  ")
    if not kept:
        raise InputError(
            f"{samples[0]['where']}, and all others: none can be used. The first: {left_out[0].rstrip('.')}. Are the paths "
            "correct? See --image_folder."
        )
    return Samples(kept, lengths, processor)


class _Check(torch.utils.data.Dataset):
    """Encodes samples: the (tokens, visual tokens) of each, or a sentence that says why its images cannot be used."""

    def __init__(self, samples: list[dict], processor):
        self.samples, self.processor, self.image_token = samples, processor, image_token_id(processor)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, int] | str:
        try:
            ids = encode(self.samples[index], self.processor)["input_ids"]
        except (InputError, ValueError, OSError) as error:
            return str(error)
        return len(ids), int((ids == self.image_token).sum())


def _same(result: tuple[int, int] | str) -> tuple[int, int] | str:
    """Replaces the loader's default collation, which would convert numbers to tensors."""
    return result
