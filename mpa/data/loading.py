"""Load validated samples from an annotation file or a folder of images.

Paths are relative to the data folder, `data/` or $MPA_DATA. The flags --annotations and --image-root override them.
data/README.md says where the files come from.
"""

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mpa.answers.metrics import few_answers
from mpa.data import DATASETS
from mpa.data.paths import inside, locate, missing_images, moved
from mpa.data.protocol import Sample, Split
from mpa.files.records import REPOSITORY, InputError, read_json

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}


def data_folder() -> Path:
    return Path(os.environ.get("MPA_DATA") or REPOSITORY / "data")


def _folder_samples(root: Path) -> Iterator[Sample]:
    """All images below `root`, sorted by path. The id is the relative path."""
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
        print(f"note: {root}: skipped {others.total()} other files ({what}).", file=sys.stderr)
    if links:
        print(
            f"note: {root}: {len(links)} links to folders are not followed, the first is {links[0]}.", file=sys.stderr
        )
    if closed:
        raise InputError(
            f"{closed[0].filename[:200]}: this folder cannot be read ({closed[0].strerror}), nor can {len(closed) - 1} "
            "others; their images would be missing. Fix their permissions, shorten their paths, or move them out."
        )


def _all_images(root: Path) -> list[Sample]:
    try:
        samples = list(_folder_samples(root))
    except RecursionError:
        raise InputError(f"{root}: its folders are nested too deeply. Move the images to a flatter folder.") from None
    if not samples:
        raise InputError(f"{root}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return samples


def samples_from(
    name: str, split: Split, document, root: Path, where, path_map: dict[str, str] | None = None
) -> Iterator[Sample]:
    """The samples of an annotation file's `document`. `where` is the file's name for messages.

    Raises InputError for an invalid record, or an image outside the root.
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
        other = [o for o, dataset in DATASETS.items() if o != name and dataset.labelled and _reads(o, document)]
        hint = f" It reads as {other[0]}: did you mean --dataset {other[0]}?" if other else ""
        raise InputError(
            f"{where}, record {index}: not in the format of {name}: {what}.{hint} data/README.md shows a record."
        ) from None


def is_texts(answers) -> bool:
    return isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)


def labelled(answers: list[str]) -> bool:
    """Is there an answer to score against? Unlabelled test splits have an empty list, or ten empty strings."""
    return any(answer.strip() for answer in answers)


def _texts(answers) -> list[str]:
    """Answers as text. Finite numbers are converted; other types raise TypeError."""

    def is_answer(a) -> bool:
        return isinstance(a, str) or (isinstance(a, int | float) and not isinstance(a, bool) and math.isfinite(a))

    if not isinstance(answers, list) or not all(map(is_answer, answers)):
        raise TypeError(f"the answers should be a list of text: {str(answers)[:80]}")
    return [str(answer) for answer in answers]


def _reads(name: str, document) -> bool:
    """Can the document's first record be read as dataset `name`?"""
    try:
        _, _, question, answers, *_ = DATASETS[name].train.read(next(iter(DATASETS[name].train.records(document))))
        return isinstance(question, str) and isinstance(answers, list)
    except Exception:  # any failure at all means no
        return False


def load_samples(
    name: str, split: str, annotations=None, image_root=None, path_map=None, images: bool = True
) -> list[Sample]:
    """The samples of a dataset's "train" or "test" split. Missing images are counted, unless `images` is False.

    Raises InputError if the file is missing, empty, not JSON, of another dataset, or has a missing field, a duplicate
    id or an image outside the image root; if the split has no samples; and if no image exists.
    """
    where: Split = getattr(DATASETS[name], split)
    root = Path(os.path.abspath(image_root or data_folder() / where.images))
    if DATASETS[name].labelled:
        source = Path(annotations or data_folder() / where.annotations)
        samples = list(samples_from(name, where, read_json(source), root, source, path_map))
    elif split == "test":  # PI's held-out file, which has absolute paths
        source = Path(annotations or data_folder() / where.annotations)
        samples = list(samples_from(name, where, read_json(source), Path("/"), source, path_map))
        paths = locate([s.image_path for s in samples], {}, image_root)
        samples = [replace(s, image_path=path) for s, path in zip(samples, paths, strict=True)]
    else:
        source, samples = root, _all_images(root)
    if not samples:
        raise InputError(f"{source}: contains no records.")
    if split == "test":
        without = [index for index, sample in enumerate(samples) if not labelled(sample.answers)]
        if without:
            raise InputError(
                f"{source}, record {without[0]}: no answers to score against; {len(without) - 1} more of "
                f"{len(samples)} have none. Is this a test split without labels? Name the labelled file with --annotations."
            )
        if "vqa" in DATASETS[name].metrics and (few := few_answers([s.answers for s in samples])):
            print(f"note: {source}: {few}.", file=sys.stderr)
    check_unique_ids(samples, source)
    if images:
        missing_images([s.image_path for s in samples])
    return samples


def train_labels(name: str) -> list[Sample]:
    """All labelled train questions of a dataset, also where training takes one per image; [] if its file is missing."""
    train = replace(DATASETS[name].train, records=DATASETS[name].test.records)
    source = data_folder() / train.annotations
    if not (DATASETS[name].labelled and source.is_file()):
        return []
    return list(samples_from(name, train, read_json(source), data_folder() / train.images, source, None))


def check_unique_ids(samples: list[Sample], source) -> None:
    """Raises InputError if two samples have the same id, compared as text."""
    first_with = {}
    for index, sample in enumerate(samples):
        if first_with.setdefault(sample.key, index) != index:
            raise InputError(
                f"{source}: records {first_with[sample.key]} and {index} have the same id {sample.key!r}. "
                "Ids must be unique, since results are stored by id."
            )
