"""For each part of a dataset: its split, its image root, and the trainer's files."""

import os
from dataclasses import replace
from pathlib import Path

from mpa.answers.metrics import most_common
from mpa.data import DATASETS
from mpa.data.loading import samples_from
from mpa.data.protocol import Sample
from mpa.files import records
from mpa.method.prompts import train_prompt


def split_of(dataset: str, part: str):
    return getattr(DATASETS[dataset], "test" if part == "test" else "train")


def root_of(dataset: str, part: str, data: Path) -> Path:
    """The image root of a part. The val part may have its own."""
    root = split_of(dataset, part).images
    if part == "val":
        root = DATASETS[dataset].preparation.val_images or root
    return Path(os.path.abspath(data / root))


def samples_of(dataset: str, part: str, items: list, data: Path, where: str) -> list[Sample]:
    """Samples of single records in the released format, validated as the stages do."""
    split = replace(split_of(dataset, part), records=iter)
    return list(samples_from(dataset, split, items, root_of(dataset, part, data), where))


def as_train_json(samples: list[Sample], preset: str) -> list[dict]:
    return [
        records.train_record(s.question_id, s.image_path, train_prompt(s.question, preset), most_common(s.answers))
        for s in samples
    ]


def part_of(dataset: str, file: str) -> str:
    if file == Path(DATASETS[dataset].test.annotations).name:
        return "test"
    return "val" if DATASETS[dataset].preparation.val_images and file.endswith("_eval.json") else "train"


def is_train_json(file: str) -> bool:
    return "format" in file.lower()
