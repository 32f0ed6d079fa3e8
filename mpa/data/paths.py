"""Resolve image paths: below the image root, moved, or missing."""

import os
import re
import sys
from itertools import accumulate
from pathlib import Path

from mpa.files.records import InputError


def inside(root: str, relative: str) -> str:
    """`root`/`relative` as a path. Raises InputError if the path, or a symbolic link in it, leads out of the root."""
    path = os.path.normpath(os.path.join(root, relative))
    if "\0" in relative:
        raise InputError(f"image {relative!r}: not a valid file name; fix the record.")
    below = os.path.relpath(path, root) if os.path.isabs(relative) or ".." in relative else os.path.normpath(relative)
    leads_out = below.startswith("..") or (os.path.isabs(relative) and root != "/")
    steps = accumulate(below.split(os.sep), os.path.join)
    if not leads_out and any(os.path.islink(os.path.join(root, step)) for step in steps):
        real_root = os.path.realpath(root)
        leads_out = os.path.commonpath([os.path.realpath(path), real_root]) != real_root
    if leads_out:
        raise InputError(f"image {relative!r} lies outside the image root {root}; fix the record or --image-root.")
    return path


def moved(path: str, path_map: dict[str, str]) -> str:
    """`path`, or its new location if it has moved. `path_map` is {old folder: new folder}; the longest match wins.

    >>> moved("/workspace/data/a/b.jpg", {"/workspace/data": "/mnt/data"})
    '/mnt/data/a/b.jpg'
    """
    for old in sorted(path_map, key=len, reverse=True):
        if path == old or path.startswith(old.rstrip("/") + "/"):
            return path_map[old].rstrip("/") + path[len(old.rstrip("/")) :]
    return path


_SPLIT_NAME = re.compile(r"(?:.*[_-])?(train|val|valid|validation|test|dev|eval)(?:[_-].*|\d{4})?", re.IGNORECASE)


def locate(paths: list[str], path_map: dict[str, str], image_root: str | None) -> list[str]:
    """The current paths of a result file's images: `moved`, and below `image_root` by the longest matching path suffix.

    All images must come from one original folder: otherwise images with the same name in different folders could be
    mixed up. Raises InputError if they do not, or if that folder belongs to another split than `image_root`.
    """
    paths = [moved(path, path_map) for path in paths]
    if not image_root:
        return paths
    root, found, prefixes = os.path.abspath(image_root), [], {}
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
            prefixes.setdefault(parts[:start], path)
    folders = {os.path.join(*prefix) if prefix else "": path for prefix, path in prefixes.items()}
    if len(folders) > 1:
        (one, first), (other, second), *_ = folders.items()
        raise InputError(
            f"--image-root {image_root}: {first} and {second} would both be searched there, but they come from "
            f"{one or '.'} and {other or '.'}. Give the new place of each with --path-map OLD=NEW."
        )
    for folder, path in folders.items():
        was, now = _split(folder), _split(root)
        if was and now and was != now:
            raise InputError(
                f"--image-root {image_root}: {path} is an image of {was}, but this is a folder of {now}. "
                "Name the right folder, or use --path-map OLD=NEW if it has moved there."
            )
    return found


def _split(folder: str) -> str | None:
    """The last split name in a folder's path: /data/ChartQA/train/png -> train."""
    names = (_SPLIT_NAME.fullmatch(part) for part in reversed(Path(folder).parts))
    name = next((match[1].lower() for match in names if match), None)
    return {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}.get(name, name)


def missing_images(paths: list[str]) -> list[str]:
    """The images that do not exist, with a warning on stderr. Raises InputError if none exists."""
    missing = [path for path in paths if not os.path.exists(path)]
    if len(missing) == len(paths):
        raise InputError(
            f"{missing[0]}: no such image, and none of the others exists. Name their folder with --image-root, "
            "or their new place with --path-map."
        )
    if missing:
        print(
            f"warning: {len(missing)} of {len(paths)} images do not exist, e.g. {missing[0]}; their samples "
            "will be left out. `python data/prepare.py check` checks all images.",
            file=sys.stderr,
        )
    return missing
