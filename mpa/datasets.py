"""The datasets: one row each of where its files lie, how a record reads, its task and its metrics.

Paths are relative to the data folder: `data/`, or $MPA_DATA. The flags --annotations and
--image-root name other places. data/README.md says where the files come from.
"""

import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from mpa.records import REPOSITORY, InputError, read_json

DATA = Path(os.environ.get("MPA_DATA", REPOSITORY / "data"))
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}


@dataclass(frozen=True)
class Sample:
    """One question about one image; without question and answers where images are unlabelled.

    `more` holds what a dataset knows beside: "type", which its scores are shown apart by, and
    "raw_answers", a second set of answers to score on.
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
    """Where a split lies, and `records(json) -> iterable`, `read(record) -> (id, image, question, answers[, more])`."""

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
    if isinstance(document, list) and document:  # the records alone, as JSON lines hold them
        return document
    if not isinstance(document, dict):
        raise TypeError('the file should be {"data": [records]}')
    return _list(document["data"])


def _textvqa(r):  # {"question_id": 0, "image_id": "0054c91397f2fe05", "question": …, "answers": [10]}
    if not isinstance(r["image_id"], str):
        raise TypeError("'image_id' should be text")
    return r["question_id"], f"{r['image_id']}.jpg", r["question"], r["answers"]


def _stvqa(r):  # {"question_id": 0, "file_path": "coco-text/COCO_….jpg", "question": …, "answers": […]}
    return r["question_id"], r["file_path"], r["question"], r["answers"]


def _chartqa(r):  # {"question_id": 0, "imgname": "10095.png", "query": …, "label": "6"}; ours have "type" too
    return r["question_id"], r["imgname"], r["query"], [r["label"]], {"type": r["type"]} if "type" in r else {}


def _chartqa_test(document):
    """The released file does not say who asked; it is the 1,250 augmented questions and then the 1,250 human ones."""
    records = _list(document)
    if len(records) != 2500 or "type" in records[0]:
        return records
    return [{**r, "type": "augmented" if i < 1250 else "human"} for i, r in enumerate(records)]


def _okvqa_records(document):  # train: {"image_id": 51606, "qas": [{…}]}; val: flat
    for record in _list(document):
        for qa in record.get("qas", [record]):
            yield {**qa, "image_id": record["image_id"]}


def _okvqa(prefix):
    def read(r):  # "answers" are stemmed ("race"); ours have "raw_answers" ("racing") too
        more = {"raw_answers": r["raw_answers"]} if "raw_answers" in r else {}
        return r["question_id"], f"{prefix}_{int(r['image_id']):012d}.jpg", r["question"], r["answers"], more

    return read


def _easyvqa_all(document):  # ["what is the blue shape?", "rectangle", 0]
    return [(index, *record) for index, record in enumerate(_list(document))]


def _easyvqa_one_per_image(document):
    return one_per_image(_easyvqa_all(document), lambda record: record[3])


def one_per_image(records: list, image_of: Callable) -> list:
    """One record an image, drawn with the image's name as seed; in the order in which images first occur."""
    by_image = {}
    for record in records:
        by_image.setdefault(image_of(record), []).append(record)
    return [random.Random(image).choice(of_it) for image, of_it in by_image.items()]


def _easyvqa(record):
    index, question, answer, image = record
    kind = "yes/no" if answer in ("yes", "no") else "color" if "color" in question else "shape"
    return index, f"{image}.png", question, [answer], {"type": kind}


def _held_out(r):  # written by PI for images without labels: the L-VLM's question and answer
    return r["question_id"], r["image_path"], r["question"], r["answers"]


def _package(name: str) -> str:
    """Folder of an installed package, without importing it."""
    spec = find_spec(name)
    return str(Path(spec.origin).parent) if spec else f"<pip install {name.replace('_', '-')}>"


EASY = _package("easy_vqa")

DATASETS = {
    "textVQA": Dataset(
        "text",
        ("textvqa", "vqa"),
        Split("TextVQA/TextVQA_0.5.1_unique_train.json", "TextVQA/train_images", _data, _textvqa),
        Split("TextVQA/TextVQA_0.5.1_val.json", "TextVQA/train_images", _data, _textvqa),
    ),
    "stVQA": Dataset(
        "text",
        ("anls", "accuracy"),
        Split("STVQA/train_task_1_onePerImage_train.json", "STVQA/train/data", _data, _stvqa),
        Split("STVQA/train_task_1_onePerImage_val.json", "STVQA/train/data", _data, _stvqa),
    ),
    "chartVQA": Dataset(
        "chart",
        ("relaxed", "tolerant"),
        Split("ChartVQA/train_onePerImage.json", "ChartVQA/ChartQA_Dataset/train/png", _list, _chartqa),
        Split("ChartVQA/test_combined.json", "ChartVQA/ChartQA_Dataset/test/png", _chartqa_test, _chartqa),
    ),
    "okVQA": Dataset(
        "knowledge",
        ("vqa", "textvqa"),
        Split("OKVQA/okvqa_train_unique_combine.json", "OKVQA/train2014", _okvqa_records, _okvqa("COCO_train2014")),
        Split("OKVQA/okvqa_val_combine.json", "OKVQA/val2014", _okvqa_records, _okvqa("COCO_val2014")),
    ),
    "easyVQA": Dataset(
        "general",
        ("exact",),
        Split(f"{EASY}/data/train/questions.json", f"{EASY}/data/train/images", _easyvqa_one_per_image, _easyvqa),
        Split(f"{EASY}/data/test/questions.json", f"{EASY}/data/test/images", _easyvqa_all, _easyvqa),
    ),
    # Any folder of images: no annotations to train on; the test file is PI's held-out part.
    "images": Dataset(
        "general",
        ("exact",),
        Split("", "images", _list, _held_out),
        Split("", "/", _list, _held_out),
    ),
}


def inside(root: str, relative: str) -> str:
    """`root`/`relative` as a path, or InputError when it, or a link in it, leads out of the root."""
    path = os.path.normpath(os.path.join(root, relative))
    if "\0" in relative:
        raise InputError(f"image {relative!r}: no file can be called so; mend the record.")
    below = os.path.relpath(path, root) if os.path.isabs(relative) or ".." in relative else os.path.normpath(relative)
    leads_out = below.startswith("..") or (os.path.isabs(relative) and root != "/")
    steps = accumulate(below.split(os.sep), os.path.join)
    if not leads_out and any(os.path.islink(os.path.join(root, step)) for step in steps):
        real_root = os.path.realpath(root)
        leads_out = os.path.commonpath([os.path.realpath(path), real_root]) != real_root
    if leads_out:
        raise InputError(f"image {relative!r} lies outside the image root {root}; mend the record or --image-root.")
    return path


def _folder_samples(root: Path) -> Iterator[Sample]:
    """All images below `root`, in the order of their paths; the relative path is the id."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder. Name your folder of images with --image-root.")
    others, closed, links = Counter(), [], []
    for folder, folders, files in os.walk(root, onerror=closed.append):
        folders.sort()
        links += [os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                path = os.path.join(folder, name)
                yield Sample(os.path.relpath(path, root), path)
            else:
                others[suffix or "no suffix"] += 1
    if others:
        what = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5))
        print(f"note: {root}: {others.total()} other files passed over ({what}).", file=sys.stderr)
    if links:
        print(
            f"note: {root}: {len(links)} links to folders are not followed, the first is {links[0]}.", file=sys.stderr
        )
    if closed:
        raise InputError(
            f"{closed[0].filename[:200]}: this folder cannot be entered ({closed[0].strerror}), nor {len(closed) - 1} others. "
            "Their images would be missing in silence: mend their permissions, shorten their paths, or move them out."
        )


def moved(path: str, path_map: dict[str, str]) -> str:
    """`path`, or where it lies now: `path_map` is {folder as it was: folder as it is}, the longest that fits counts.

    >>> moved("/workspace/data/a/b.jpg", {"/workspace/data": "/mnt/data"})
    '/mnt/data/a/b.jpg'
    """
    for old in sorted(path_map, key=len, reverse=True):
        if path == old or path.startswith(old.rstrip("/") + "/"):
            return path_map[old].rstrip("/") + path[len(old.rstrip("/")) :]
    return path


_SPLIT_NAME = re.compile(r"(?:.*[_-])?(train|val|valid|validation|test|dev|eval)(?:[_-].*|\d{4})?", re.IGNORECASE)


def locate(paths: list[str], path_map: dict[str, str], image_root: str | None) -> list[str]:
    """Where the images lie that a result file names: `moved`, or below `image_root` by as much of each path as fits.

    Below the root stand the ends of the paths; what is before these must be one folder, or images of the same name in
    different folders would be taken for each other. Raises InputError where it is not, or is that of another split.
    """
    paths = [moved(path, path_map) for path in paths]
    if not image_root:
        return paths
    root, found, before = os.path.abspath(image_root), [], {}
    for path in paths:
        parts = Path(path).parts
        start = next(
            (i for i in range(path.startswith("/"), len(parts)) if os.path.exists(os.path.join(root, *parts[i:]))), None
        )
        if start is None:
            found.append(path)
            continue
        found.append(os.path.join(root, *parts[start:]))
        if os.path.normpath(path) != found[-1]:
            before.setdefault(parts[:start], path)
    folders = {os.path.join(*of) if of else "": path for of, path in before.items()}
    if len(folders) > 1:
        (one, first), (other, second), *_ = folders.items()
        raise InputError(
            f"--image-root {image_root}: {first} and {second} would both be looked for in it, though they come from {one or '.'} "
            f"and {other or '.'}. Say where each has moved with --path-map OLD=NEW."
        )
    for folder, path in folders.items():
        was, now = _split(folder), _split(root)
        if was and now and was != now:
            raise InputError(
                f"--image-root {image_root}: {path} is an image of {was}, and this is a folder of {now}. Name the right "
                "folder, or say with --path-map OLD=NEW that it has moved there."
            )
    return found


def _split(folder: str) -> str | None:
    """The split that a folder's path names last: /data/ChartQA/train/png -> train."""
    names = (_SPLIT_NAME.fullmatch(part) for part in reversed(Path(folder).parts))
    name = next((match[1].lower() for match in names if match), None)
    return {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}.get(name, name)


def samples_from(
    name: str, split: Split, document, root: Path, where, path_map: dict[str, str] | None = None
) -> Iterator[Sample]:
    """The samples of an annotation file's `document`; `where` names it.

    Raises InputError for a record that is not as it should be, or whose image lies outside the root.
    """
    index = 0
    try:
        for record in split.records(document):
            question_id, image, question, answers, *more = split.read(record)
            if not isinstance(question, str):
                raise TypeError(f"'question' should be text: {question!r}")
            answers = _texts(answers)
            more = {
                field: _texts(value) if field == "raw_answers" else value for field, value in (more or [{}])[0].items()
            }
            path = inside(str(root), moved(image, path_map or {}))
            yield Sample(question_id, path, question, answers, more)
            index += 1
    except InputError as error:
        raise InputError(f"{where}, record {index}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        other = [o for o in DATASETS if o not in (name, "images") and _reads(o, document)]
        hint = f" It reads as {other[0]}: did you mean --dataset {other[0]}?" if other else ""
        raise InputError(
            f"{where}, record {index}: not in the format of {name}: {what}.{hint} data/README.md shows a record."
        ) from None


def is_texts(answers) -> bool:
    return isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)


def labelled(answers: list[str]) -> bool:
    """Is there an answer to score against? Test parts without labels hold an empty list, or empty text ten times over."""
    return any(answer.strip() for answer in answers)


def _texts(answers) -> list[str]:
    """Answers as text; finite numbers are taken, other things are no answers."""

    def is_answer(a) -> bool:
        return isinstance(a, str) or (isinstance(a, int | float) and not isinstance(a, bool) and math.isfinite(a))

    if not isinstance(answers, list) or not all(map(is_answer, answers)):
        raise TypeError(f"the answers should be a list of text: {str(answers)[:80]}")
    return [str(answer) for answer in answers]


def _reads(name: str, document) -> bool:
    """Would the document's first record read as dataset `name`?"""
    try:
        _, _, question, answers, *_ = DATASETS[name].train.read(next(iter(DATASETS[name].train.records(document))))
        return isinstance(question, str) and isinstance(answers, list)
    except Exception:  # any failure at all means no
        return False


def load_samples(
    name: str, split: str, annotations=None, image_root=None, path_map=None, images: bool = True
) -> list[Sample]:
    """The samples of a dataset's "train" or "test" split; those whose image is missing are counted on stderr.

    With `images` False nobody looks whether there are any.

    Raises InputError for a file that is missing, empty, not JSON, of another dataset, has a missing
    field, an id twice or an image outside the image root; for a split with no samples; and where
    none of the images exists.
    """
    where: Split = getattr(DATASETS[name], split)
    root = Path(os.path.abspath(image_root or DATA / where.images))
    if name == "images" and split == "train":
        try:
            samples, source = list(_folder_samples(root)), root
        except RecursionError:
            raise InputError(
                f"{root}: its folders are nested too deeply. Move the images to a flatter folder."
            ) from None
        if not samples:
            raise InputError(f"{root}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    else:
        source = Path(annotations or DATA / where.annotations)
        below = Path("/") if name == "images" else root  # PI's held-out file has whole paths
        samples = list(samples_from(name, where, read_json(source), below, source, path_map))
        if not samples:
            raise InputError(f"{source}: no records in it.")
    if name == "images" and split == "test":
        paths = locate([s.image_path for s in samples], {}, image_root)
        samples = [replace(s, image_path=path) for s, path in zip(samples, paths, strict=True)]
    if split == "test":
        without = [index for index, sample in enumerate(samples) if not labelled(sample.answers)]
        if without:
            raise InputError(
                f"{source}, record {without[0]}: no answers to score against, nor have {len(without) - 1} others of "
                f"{len(samples)}; is it a test part without labels? Name the labelled one with --annotations."
            )
    no_twice(samples, source)
    if images:
        look_for_images([s.image_path for s in samples])
    return samples


def no_twice(samples: list[Sample], source) -> None:
    """Raises InputError where two samples have the same id, as text."""
    first_with = {}
    for index, sample in enumerate(samples):
        if first_with.setdefault(sample.key, index) != index:
            raise InputError(
                f"{source}: records {first_with[sample.key]} and {index} have the same id {sample.key!r}. "
                "Ids must differ: results are kept by id."
            )


def look_for_images(paths: list[str]) -> list[str]:
    """The images that are not there; said on stderr. Raises InputError where none is."""
    missing = [path for path in paths if not os.path.exists(path)]
    if len(missing) == len(paths):
        raise InputError(
            f"{missing[0]}: no such image, and none of the others. Name their folder with --image-root, "
            "or say where they have moved with --path-map."
        )
    if missing:
        print(
            f"warning: {len(missing)} of {len(paths)} images are not there, the first is {missing[0]}; their samples "
            "will be left out. `python data/prepare.py check` looks at all.",
            file=sys.stderr,
        )
    return missing
