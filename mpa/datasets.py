"""The data sets: one row each of where its files lie, how a record reads, its task and its metrics.

Paths are relative to the data folder: `data/`, or $MPA_DATA. The flags --annotations and
--image-root name other places. data/README.md says where the files come from.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from mpa.records import REPOSITORY, InputError, read_json

DATA = Path(os.environ.get("MPA_DATA", REPOSITORY / "data"))
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class Sample:
    """One question about one picture; without question and answers where pictures are unlabelled."""

    question_id: int | str
    image_path: str
    question: str | None = None
    answers: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return str(self.question_id)


@dataclass(frozen=True)
class Split:
    """Where a split lies, and `records(json) -> list`, `read(record) -> (id, image, question, answers)`."""

    annotations: str
    images: str
    records: Callable
    read: Callable


@dataclass(frozen=True)
class Dataset:
    task: str  # a key of prompts.TASK_PROMPTS
    metrics: tuple[str, ...]  # of metrics.METRICS, the field's headline first
    train: Split
    test: Split


def _list(document) -> list:
    if not isinstance(document, list):
        raise TypeError("the file should be a list of records")
    return document


def _data(document) -> list:
    if not isinstance(document, dict):
        raise TypeError('the file should be {"data": [records]}')
    return _list(document["data"])


def _textvqa(r):  # {"question_id": 0, "image_id": "0054c91397f2fe05", "question": …, "answers": [10]}
    return r["question_id"], f"{r['image_id']}.jpg", r["question"], r["answers"]


def _stvqa(r):  # {"question_id": 0, "file_path": "coco-text/COCO_….jpg", "question": …, "answers": […]}
    return r["question_id"], r["file_path"], r["question"], r["answers"]


def _chartqa(r):  # {"question_id": 0, "imgname": "10095.png", "query": …, "label": "6"}
    return r["question_id"], r["imgname"], r["query"], [r["label"]]


def _okvqa_records(document):  # train: {"image_id": 51606, "qas": [{…}]}; val: flat
    return [{**qa, "image_id": r["image_id"]} for r in _list(document) for qa in r.get("qas", [r])]


def _okvqa(prefix):
    return lambda r: (r["question_id"], f"{prefix}_{int(r['image_id']):012d}.jpg", r["question"], r["answers"])


def _easyvqa_all(document):  # ["what is the blue shape?", "rectangle", 0]
    return [(index, *record) for index, record in enumerate(_list(document))]


def _easyvqa_one_per_image(document):
    """One question an image, drawn with the image's id as seed."""
    by_image = {}
    for index, (_, _, image) in enumerate(_list(document)):
        by_image.setdefault(image, []).append(index)
    drawn = [random.Random(image).choice(indices) for image, indices in by_image.items()]
    return [(index, *document[index]) for index in drawn]


def _easyvqa(record):
    index, question, answer, image = record
    return index, f"{image}.png", question, [answer]


def _held_out(r):  # written by PI for pictures without labels: the L-VLM's question and answer
    return r["question_id"], r["image_path"], r["question"], r["answers"]


def _package(name: str) -> str:
    """Folder of an installed package, without importing it."""
    spec = find_spec(name)
    return str(Path(spec.origin).parent) if spec else f"<pip install {name.replace('_', '-')}>"


EASY = _package("easy_vqa")

DATASETS = {
    "textVQA": Dataset(
        "text",
        ("textvqa", "vqa", "contains", "exact"),
        Split("TextVQA/TextVQA_0.5.1_unique_train.json", "TextVQA/train_images", _data, _textvqa),
        Split("TextVQA/TextVQA_0.5.1_val.json", "TextVQA/train_images", _data, _textvqa),
    ),
    "stVQA": Dataset(
        "text",
        ("anls", "accuracy", "contains"),
        Split("STVQA/train_task_1_onePerImage_train.json", "STVQA/train/data", _data, _stvqa),
        Split("STVQA/train_task_1_onePerImage_val.json", "STVQA/train/data", _data, _stvqa),
    ),
    "chartVQA": Dataset(
        "chart",
        ("relaxed", "contains", "exact"),
        Split("ChartVQA/train_onePerImage.json", "ChartVQA/ChartQA_Dataset/train/png", _list, _chartqa),
        Split("ChartVQA/test_combined.json", "ChartVQA/ChartQA_Dataset/test/png", _list, _chartqa),
    ),
    "okVQA": Dataset(
        "knowledge",
        ("vqa", "contains", "exact"),
        Split("OKVQA/okvqa_train_unique_combine.json", "OKVQA/train2014", _okvqa_records, _okvqa("COCO_train2014")),
        Split("OKVQA/okvqa_val_combine.json", "OKVQA/val2014", _okvqa_records, _okvqa("COCO_val2014")),
    ),
    "easyVQA": Dataset(
        "general",
        ("exact", "contains"),
        Split(f"{EASY}/data/train/questions.json", f"{EASY}/data/train/images", _easyvqa_one_per_image, _easyvqa),
        Split(f"{EASY}/data/test/questions.json", f"{EASY}/data/test/images", _easyvqa_all, _easyvqa),
    ),
    # Any folder of pictures: no annotations to train on; the test file is PI's held-out part.
    "images": Dataset(
        "general",
        ("exact", "contains"),
        Split("", "images", _list, _held_out),
        Split("", "/", _list, _held_out),
    ),
}


def inside(root: str, relative: str) -> str:
    """`root`/`relative` as a path, or InputError when it, or a link in it, leads out of the root."""
    path = os.path.normpath(os.path.join(root, relative))
    below = os.path.relpath(path, root) if os.path.isabs(relative) or ".." in relative else os.path.normpath(relative)
    leads_out = below.startswith("..") or (os.path.isabs(relative) and root != "/")
    steps = accumulate(below.split(os.sep), os.path.join)
    if not leads_out and any(os.path.islink(os.path.join(root, step)) for step in steps):
        real_root = os.path.realpath(root)
        leads_out = os.path.commonpath([os.path.realpath(path), real_root]) != real_root
    if leads_out:
        raise InputError(f"picture {relative!r} lies outside the image root {root}; mend the record or --image-root.")
    return path


def _folder_samples(root: Path) -> Iterator[Sample]:
    """All pictures below `root`, in the order of their paths; the relative path is the id."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder. Name your folder of pictures with --image-root.")
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES:
                path = os.path.join(folder, name)
                yield Sample(os.path.relpath(path, root), path)


def _annotated_samples(name: str, split: Split, annotations: Path, root: Path) -> Iterator[Sample]:
    document = read_json(annotations)
    index = 0
    try:
        for record in split.records(document):
            question_id, image, question, answers = split.read(record)
            if not isinstance(question, str) or not isinstance(answers, list):
                raise TypeError("'question' should be text and 'answers' a list")
            yield Sample(question_id, inside(str(root), image), question, [str(answer) for answer in answers])
            index += 1
    except InputError as error:
        raise InputError(f"{annotations}, record {index}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        other = [o for o in DATASETS if o not in (name, "images") and _reads(o, document)]
        hint = f" It reads as {other[0]}: did you mean --dataset {other[0]}?" if other else ""
        raise InputError(
            f"{annotations}, record {index}: not in the format of {name}: {what}.{hint} data/README.md shows a record."
        ) from None


def _reads(name: str, document) -> bool:
    """Would the document's first record read as data set `name`?"""
    try:
        DATASETS[name].train.read(DATASETS[name].train.records(document)[0])
        return True
    except Exception:  # any failure at all means no
        return False


def load_samples(name: str, split: str, annotations=None, image_root=None) -> list[Sample]:
    """The samples of a data set's "train" or "test" split.

    Raises InputError for a file that is missing, empty, not JSON, of another data set, has a missing
    field, an id twice or a picture outside the image root; for a split with no samples; and where
    none of the pictures exists.
    """
    where: Split = getattr(DATASETS[name], split)
    root = Path(image_root or DATA / where.images)
    if name == "images" and split == "train":
        samples, source = list(_folder_samples(root)), root
        if not samples:
            raise InputError(f"{root}: no pictures in it ({', '.join(sorted(PICTURE_SUFFIXES))}).")
    else:
        source = Path(annotations or DATA / where.annotations)
        samples = list(_annotated_samples(name, where, source, root))
        if not samples:
            raise InputError(f"{source}: no records in it.")
    first_with = {}
    for index, sample in enumerate(samples):
        if first_with.setdefault(sample.key, index) != index:
            raise InputError(
                f"{source}: records {first_with[sample.key]} and {index} have the same id {sample.key!r}. "
                "Ids must differ: results are kept by id."
            )
    if not any(os.path.exists(sample.image_path) for sample in samples):
        raise InputError(
            f"{samples[0].image_path}: no such picture, and none of the others. Name their folder with --image-root."
        )
    return samples
