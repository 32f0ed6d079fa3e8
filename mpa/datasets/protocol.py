"""What a dataset is to this repository: where it lies, how a record reads, what it is asked and how it is scored.

Each dataset is one file beside this one, and all of it is in that file; docs/extending.md adds one, step by step.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

DocumentReader = Callable[[object], object]  # the JSON of an annotation file -> its records
RecordReader = Callable[[object], tuple]  # a record -> (id, image, question, answers[, more])


@dataclass(frozen=True)
class Sample:
    """One question about one image; without question and answers where images are unlabelled.

    `more` holds what a dataset has beside these: "type", by which scores are split, and "raw_answers", a second list
    of answers to score against.
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
    """Where a split lies, below the data folder, and how its records are read."""

    annotations: str
    images: str
    records: DocumentReader
    read: RecordReader


@dataclass(frozen=True)
class CopiedRow:
    """A row of a Hugging Face copy: what copies have in common is read, `columns` has all the rest."""

    index: int  # in the copy
    columns: dict
    question: str
    answers: list
    raw_answers: list | None
    image_name: str  # from the image's content, for copies that do not name their images


@dataclass(frozen=True)
class Preparation:
    """How `data/prepare.py` makes a dataset's files from its download.

    Parts are "train", "val", "test", or "all" where the official train part is split here. `official(source)` reads
    {part: records} from a `sources.Source`. `files(parts, seed)` gives {file name: content}; `from_copy(row)` gives the
    record of a Hugging Face copy's row.
    """

    folder: str  # below the data folder
    download: str  # what the official site has, for messages; "" where a Python package holds the data
    official: Callable
    files: Callable[[dict, int], dict]
    expected: dict[str, tuple[int, int | None]]  # {file: (questions, images)}, from the paper, its README, its files
    from_copy: Callable[[CopiedRow], dict] | None = None
    copy_parts: dict[str, str] = field(default_factory=dict)  # {split of the copy: part}, where they differ
    val_images: str = ""  # folder of the val part's images, where it is not that of the train part
    image_in_download: str = "{name}"  # how the path of an image ends in the download


@dataclass(frozen=True)
class Dataset:
    """All that is known of a dataset. `labelled` is false for a folder of images without questions and answers."""

    name: str
    task: str  # a key of prompts.TASK_PROMPTS
    metrics: tuple[str, ...]  # of metrics.METRICS, the headline first
    train: Split
    test: Split
    lmms_eval: tuple[str, str] | None = (
        None  # its task in lmms-eval, and the metric there; None: its name in lower case
    )
    preparation: Preparation | None = None
    labelled: bool = True


def list_of_records(document) -> list:
    if not isinstance(document, list):
        raise TypeError("the file should be a list of records")
    return document


def data_of(document) -> list:
    """The records of {"data": [records]}; a list alone is taken too, as JSON Lines hold it."""
    if isinstance(document, list) and document:
        return document
    if not isinstance(document, dict):
        raise TypeError('the file should be {"data": [records]}')
    return list_of_records(document["data"])


def one_per_image(records: list, image_of: Callable) -> list:
    """One record per image, drawn with the image's name as seed; in the order in which images first occur."""
    by_image = {}
    for record in records:
        by_image.setdefault(image_of(record), []).append(record)
    return [random.Random(image).choice(of_it) for image, of_it in by_image.items()]


def split_by_image(records: list, image_of: Callable, share: float, seed: int) -> tuple[list, list]:
    """(first, rest), each in the records' order: `share` of the images are in the first, with all their questions."""
    images = list(dict.fromkeys(map(image_of, records)))
    first = set(random.Random(seed).sample(images, int(share * len(images))))
    return [r for r in records if image_of(r) in first], [r for r in records if image_of(r) not in first]
