"""The definition of a dataset: its files, how to read a record, its task prompt and its metrics.

Each dataset is one file in this folder. docs/extending.md shows how to add one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

DocumentReader = Callable[[object], object]  # the JSON of an annotation file -> its records
RecordReader = Callable[[object], tuple]  # a record -> (id, image, question, answers[, more])


@dataclass(frozen=True)
class Sample:
    """One question about one image. Unlabelled images have no question and no answers.

    `more` has optional fields: "type" (scores are also reported per type) and "raw_answers", a second list of answers
    to score against.
    """

    question_id: int | str
    image_path: str
    question: str | None = None
    answers: list[str] = field(default_factory=list)
    more: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        return str(self.question_id)


@dataclass(frozen=True)
class Split:
    """A split: its paths below the data folder, and how to read its records."""

    annotations: str
    images: str
    records: DocumentReader
    read: RecordReader


@dataclass(frozen=True)
class CopiedRow:
    """A row of a Hugging Face copy. The common columns are parsed; `columns` has all of them."""

    index: int  # in the copy
    columns: dict
    question: str
    answers: list
    raw_answers: list | None
    image_name: str  # a hash of the image, for copies without image names


@dataclass(frozen=True)
class Preparation:
    """How `data/prepare.py` makes a dataset's files from its download.

    Parts are "train", "val" and "test", or "all" if the official train part is split here. `official(source)` returns
    {part: records} of a `sources.Source`. `files(parts, seed)` returns {file name: content}. `from_copy(row)` returns
    the record of a Hugging Face copy's row.
    """

    folder: str  # below the data folder
    download: str  # the files to download, for messages; "" if a Python package contains the data
    official: Callable
    files: Callable[[dict, int], dict]
    expected: dict[str, tuple[int, int | None]]  # {file: (questions, images)}, from the paper, its README, its files
    from_copy: Callable[[CopiedRow], dict] | None = None
    copy_parts: dict[str, str] = field(default_factory=dict)  # {split of the copy: part}, if they differ
    val_images: str = ""  # the val part's image folder, if it is not the train part's
    image_in_download: str = "{name}"  # the end of an image's path in the download


@dataclass(frozen=True)
class Dataset:
    """A dataset. `labelled` is False for a folder of images without questions and answers."""

    name: str
    task: str  # a key of prompts.TASK_PROMPTS
    metrics: tuple[str, ...]  # keys of metrics.METRICS, the main metric first
    train: Split
    test: Split
    lmms_eval: tuple[str, str] | None = None  # task and metric in lmms-eval; None: the name in lower case
    preparation: Preparation | None = None
    labelled: bool = True


def list_of_records(document) -> list:
    if not isinstance(document, list):
        raise TypeError("the file should be a list of records")
    return document


def data_of(document) -> list:
    """The records of {"data": [records]}. A plain list is accepted too, since JSON Lines files yield one."""
    if isinstance(document, list) and document:
        return document
    if not isinstance(document, dict):
        raise TypeError('the file should be {"data": [records]}')
    return list_of_records(document["data"])


def one_per_image(records: list, image_of: Callable) -> list:
    """One random record per image, with the image's name as seed. Images keep the order of their first occurrence."""
    by_image = {}
    for record in records:
        by_image.setdefault(image_of(record), []).append(record)
    return [random.Random(image).choice(candidates) for image, candidates in by_image.items()]


def split_by_image(records: list, image_of: Callable, share: float, seed: int) -> tuple[list, list]:
    """(first, rest), each in the order of `records`. `first` has all questions about `share` of the images."""
    images = list(dict.fromkeys(map(image_of, records)))
    first = set(random.Random(seed).sample(images, int(share * len(images))))
    return [r for r in records if image_of(r) in first], [r for r in records if image_of(r) not in first]
