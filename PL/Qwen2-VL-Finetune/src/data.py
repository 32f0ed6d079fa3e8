"""From the train JSON to batches. Only the answers and their end tokens are labelled.

A record (LLaVA form, as the Parity Identifier writes it):
    {"id": 4, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat airline is it?"},
                                                  {"from": "gpt", "value": "Virgin"}]}
"""

import json
import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

IGNORE = -100
IMAGE = "<image>"


class DataError(Exception):
    """Something in the train JSON that the user can mend: names file, record and remedy."""


def open_picture(path: str) -> Image.Image:
    """The picture as the stages see it: first frame, turned as its EXIF says, 8 bits, alpha over white, RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = Image.open(path)
    with picture:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I") or picture.mode == "F":  # deep grey, which Pillow's conversion would cut to white
        values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
        most = values.max()
        white = 65535 if picture.mode.startswith("I;16") or 255 < most <= 65535 else 1 if most <= 1 else max(most, 255)
        picture = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def read_samples(data_path: str, image_folder: str = "", path_map: Sequence[str] = ()) -> list[dict]:
    """The records, checked, as {"id", "image", "messages"} with chat-template messages.

    `path_map` are "OLD=NEW" folders of pictures that have moved. Raises DataError for a file that is no
    list of such records. No picture is opened: see `readable`.
    """
    moves = [tuple(folder.rstrip("/") + "/" for folder in move.partition("=")[::2]) for move in path_map]
    if not all("=" in move and all(map(len, move.split("="))) for move in path_map):
        raise DataError(f"--path_map {' '.join(path_map)}: expected OLD=NEW, as in /workspace/data=/mnt/data.")
    try:
        records = json.loads(Path(data_path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"{data_path}: no such file. Run PI.sh first, or name the file with --data_path.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{data_path}: not JSON ({error}). Write it again.") from None
    if not isinstance(records, list) or not records:
        raise DataError(f"{data_path}: no samples in it; there is nothing to train on.")
    return [_read(record, f"{data_path}, record {i}", image_folder, moves) for i, record in enumerate(records)]


def refuse_special_tokens(samples: list[dict], tokenizer, data_path: str) -> None:
    """Raises DataError for text with a mark that the tokenizer keeps for itself, such as <|im_end|>.

    In an answer it would cut the label short; in a question it could stand for a picture that is not there.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = re.compile("|".join(map(re.escape, sorted({*tokenizer.all_special_tokens, *added}))))
    for i, sample in enumerate(samples):
        parts = [part for message in sample["messages"] for part in message["content"]]
        for found in filter(None, (special.search(part.get("text", "")) for part in parts)):
            raise DataError(f"{data_path}, record {i}: {found[0]} is a special token of the model. Take it out.")


def readable(samples: list[dict], data_path: str) -> list[dict]:
    """The samples whose picture can be read. Opens all; says how many are left out and why.

    Raises DataError when none is left.
    """
    with ThreadPoolExecutor() as pool:
        checks = pool.map(_why_unreadable, (sample["image"] for sample in samples))
        reasons = list(tqdm(checks, total=len(samples), desc="checking pictures", unit="picture", disable=None))
    bad = [(sample, reason) for sample, reason in zip(samples, reasons, strict=True) if reason]
    if bad:
        print(f"{len(bad)} of {len(samples)} samples left out, their pictures cannot be read:")
        for sample, reason in bad[:10]:
            print(f"  id {sample['id']}: {sample['image']}: {reason}")
    good = [sample for sample, reason in zip(samples, reasons, strict=True) if not reason]
    if not good:
        raise DataError(
            f"{data_path}: none of its {len(samples)} pictures can be read. Are the paths right? See --image_folder."
        )
    return good


def _read(record, where: str, image_folder: str, moves: list[tuple[str, str]]) -> dict:
    try:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        sample_id, image = record["id"], record["image"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: missing {error}; expected id, image and conversations of from and value.") from None
    if [who for who, _ in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
        raise DataError(f"{where}: conversations must alternate human and gpt, starting with human.")
    if not all(isinstance(text, str) for _, text in turns):
        raise DataError(f"{where}: a turn's value is not text; write it as a string.")
    if not isinstance(image, str) or [text.count(IMAGE) for _, text in turns] != [1] + [0] * (len(turns) - 1):
        raise DataError(f"{where}: expected one image and one {IMAGE}, in the first human turn.")
    if not all(text.strip() for who, text in turns if who == "gpt"):
        raise DataError(f"{where}: an answer is empty; there is nothing to learn from it.")
    image = next((new + image.removeprefix(old) for old, new in moves if image.startswith(old)), image)
    messages = [{"role": "user" if who == "human" else "assistant", "content": _content(text)} for who, text in turns]
    return {"id": sample_id, "image": os.path.join(image_folder, image), "messages": messages}


def _content(text: str) -> list[dict]:
    """Chat-template parts. The line break beside <image> belongs to the mark, not to the prompt."""
    if IMAGE not in text:
        return [{"type": "text", "text": text}]
    before, after = text.split(IMAGE)
    parts = [{"type": "text", "text": before.removesuffix("\n")}, {"type": "image"}]
    parts += [{"type": "text", "text": after.removeprefix("\n")}]
    return [part for part in parts if part.get("text") != ""]


def _why_unreadable(path: str) -> str | None:
    try:
        open_picture(path)
    except Exception as error:  # Pillow's plugins raise anything
        return str(error) or type(error).__name__
    return None


def encode(sample: dict, processor) -> dict:
    """One sample as the model takes it, with labels [T].

    Prompt and answers are tokenised apart, as they are when the model is asked: it is trained from
    exactly the token it will start from. Labelled are each answer's tokens and its end token; not the
    line break that a template may put after it.
    """
    end = processor.tokenizer.eos_token
    inputs, ids, labels, rendered = None, [], [], ""
    for turn in range(0, len(sample["messages"]), 2):
        prompt = processor.apply_chat_template(
            sample["messages"][: turn + 1], add_generation_prompt=True, tokenize=False
        )
        whole = processor.apply_chat_template(sample["messages"][: turn + 2], tokenize=False)
        answer, _, _ = whole[len(prompt) :].partition(end)
        if not (prompt.startswith(rendered) and whole.startswith(prompt) and answer):
            raise DataError(f"id {sample['id']}: the chat template does not keep the conversation in order.")
        if inputs is None:
            inputs = processor(text=[prompt], images=[open_picture(sample["image"])], return_tensors="pt")
            asked = inputs.pop("input_ids")[0].tolist()
        else:
            asked = processor.tokenizer(prompt[len(rendered) :], add_special_tokens=False).input_ids
        answered = processor.tokenizer(answer + end, add_special_tokens=False).input_ids
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
        rendered = prompt + answer + end
    # What is left of the processor's output is the picture, and marks of the prompt's tokens by kind.
    encoded = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if "mm_token_type_ids" in encoded:
        types = encoded["mm_token_type_ids"][0]
        encoded["mm_token_type_ids"] = torch.cat([types, types.new_zeros(len(ids) - len(types))])
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), **encoded}


class Samples(torch.utils.data.Dataset):
    """Encoded samples, read when they are asked for."""

    def __init__(self, samples: list[dict], processor):
        self.samples, self.processor = samples, processor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict:
        return encode(self.samples[index], self.processor)


class Collator:
    """Encoded samples -> a batch: token rows padded on the right [B, T], pictures one after the other."""

    def __init__(self, pad_token_id: int):
        self.padding = {"input_ids": pad_token_id, "labels": IGNORE, "mm_token_type_ids": 0}

    def __call__(self, samples: list[dict]) -> dict:
        batch = {}
        for name in samples[0]:
            values = [sample[name] for sample in samples]
            if name in self.padding:
                batch[name] = torch.nn.utils.rnn.pad_sequence(
                    values, batch_first=True, padding_value=self.padding[name]
                )
            else:
                batch[name] = torch.cat(values)
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        return batch
