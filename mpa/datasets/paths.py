"""Where images lie: below their root, moved since, or missing."""

import os
import re
import sys
from itertools import accumulate
from pathlib import Path

from mpa.records import InputError


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


def missing_images(paths: list[str]) -> list[str]:
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
