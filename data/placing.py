"""Place a download's images in the image roots: link a whole folder if possible, else place the images one by one.

Before anything is written, checks that no archive is a zip bomb, that the disk has space, and that no symbolic link
leads out of the data folder. An image that is placed one by one is opened first.
"""

import contextlib
import errno
import os
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from layouts import root_of
from sources import UNREADABLE, Member, Source, check_ratio
from tqdm import tqdm

from mpa.data import DATASETS
from mpa.data.protocol import Sample
from mpa.files import disk_errors
from mpa.files.image_files import ImageError, open_file, open_image
from mpa.files.records import InputError

PART = ".prepare.part"  # a fixed name: the next write replaces one left by a kill; prepare.py holds a lock


@dataclass
class Root:
    """An image root and its images: {path below the root: the source file, or the size in bytes}."""

    path: Path
    wanted: dict[str, Member | int | None] = field(default_factory=dict)

    def size(self, name: str) -> int | None:
        source = self.wanted[name]
        return source.size if isinstance(source, Member) else source

    def is_there(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            return os.stat(self.path / name).st_size == self.size(name)
        return False

    @property
    def complete(self) -> bool:
        return all(os.path.exists(self.path / name) for name in self.wanted)


def roots_of(dataset: str, parts: dict[str, list[Sample]], data: Path, origin: Callable) -> list[Root]:
    """The roots of all samples' images. `origin(part, sample index, path below the root)` is called once per image."""
    roots = {}
    for part, samples in parts.items():
        path = root_of(dataset, part, data)
        root = roots.setdefault(path, Root(path))
        for index, sample in enumerate(samples):
            name = os.path.relpath(sample.image_path, path)
            if name not in root.wanted:
                root.wanted[name] = origin(part, index, name)
    return list(roots.values())


def of_download(source: Source, dataset: str, parts: dict[str, list[Sample]], data: Path) -> list[Root]:
    """The roots of an official download. ChartQA's parts share image names, so the folder is part of the search."""

    def origin(part: str, index: int, name: str) -> Member | None:
        return source.find(DATASETS[dataset].preparation.image_in_download.format(part=part, name=name))

    return roots_of(dataset, parts, data, origin)


def of_copy(sizes: dict[str, list[int]], dataset: str, parts: dict[str, list[Sample]], data: Path) -> list[Root]:
    """The roots of a Hugging Face copy. `sizes` are the images' sizes, in the order of each part's samples."""
    return roots_of(dataset, parts, data, lambda part, index, name: sizes[part][index])


# --- checks before writing


def check_target(folder: Path, data: Path) -> None:
    """Raise InputError if a symbolic link below `data` leads `folder` elsewhere, e.g. into a download."""
    below = os.path.relpath(folder, data)
    if os.path.realpath(folder) != os.path.normpath(os.path.join(os.path.realpath(data), below)):
        raise InputError(
            f"{folder}: leads to {os.path.realpath(folder)} through a link, and nothing is written through links. "
            "Remove the link, or choose another --data folder."
        )


def check(roots: list[Root], data: Path) -> None:
    """Raise InputError if a file would be written through a link, an archive is a bomb, or disk space is short."""
    needed, by_archive = 0, Counter()
    for root in roots:
        to_write = [name for name in root.wanted if not root.is_there(name)]
        if to_write:  # links further down were refused when the records were read
            of_download = any(isinstance(source, Member) for source in root.wanted.values())
            check_target(root.path.parent if of_download else root.path, data)  # a link to a download is replaced
        for name in to_write:
            source = root.wanted[name]
            if isinstance(source, Member) and source.archive:
                by_archive[source.archive] += source.size
            elif isinstance(source, int):
                needed += source
    needed += by_archive.total()
    for archive, size in by_archive.items():
        check_ratio(archive, size, os.stat(archive).st_size)
    place = data
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{data}: the images take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free. Free some space, "
            "or choose another --data folder."
        )


# --- writing


def put(path: Path, fill: Callable[[Path], None]) -> str | None:
    """Write `path` with `fill(temporary)`, if the result is an image. Returns None, or the reason why it failed."""
    temporary = path.with_name(PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        fill(temporary)
        open_image(str(temporary))
        os.replace(temporary, path)
    except ImageError as error:
        return str(error)
    except UNREADABLE as error:
        return f"cannot be unpacked ({error})"
    except OSError as error:
        if error.errno in (*disk_errors.FULL, errno.EROFS):
            raise
        return f"cannot be read or written ({error.strerror or error})"
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return None


def linked(source: str) -> Callable[[Path], None]:
    """A hard link to the file, or a copy if it is on another disk."""

    def fill(temporary: Path) -> None:
        try:
            os.link(os.path.realpath(source), temporary)
        except OSError:
            with open_file(source) as file, open(temporary, "xb") as out:
                shutil.copyfileobj(file, out)

    return fill


def unpacked(archive: zipfile.ZipFile, name: str) -> Callable[[Path], None]:
    def fill(temporary: Path) -> None:
        with archive.open(name) as file, open(temporary, "xb") as out:
            shutil.copyfileobj(file, out, 2**20)

    return fill


def one_folder(members: dict[str, Member | None]) -> Path | None:
    """The folder that contains all of these images, none of them through a link; None if there is none."""
    folders = {m and not m.archive and m.name.removesuffix(f"/{name}") for name, m in members.items()}
    folder = folders.pop() if len(folders) == 1 else None
    if not folder:
        return None
    real = os.path.realpath(folder)
    direct = all(os.path.realpath(m.name) == os.path.join(real, os.path.normpath(name)) for name, m in members.items())
    return Path(real) if direct else None


def place_download(roots: list[Root]) -> int:
    """Place the images in their roots. Returns how many are still missing."""
    lost = 0
    for root in roots:
        broken = {}
        if not (root.path.is_symlink() and root.complete):
            is_folder = root.path.is_dir() and not root.path.is_symlink()
            if not is_folder and (folder := one_folder(root.wanted)):
                root.path.parent.mkdir(parents=True, exist_ok=True)
                root.path.unlink(missing_ok=True)  # an outdated link
                root.path.symlink_to(folder)
            else:
                if root.path.is_symlink():
                    root.path.unlink()  # never write into the download
                broken = _place_one_by_one(root)
        lost += report(root, broken)
    return lost


def _place_one_by_one(root: Root) -> dict[str, str]:
    """{source: reason why it could not be placed}"""
    broken = {}
    with contextlib.ExitStack() as stack:
        archives = {m.archive for m in root.wanted.values() if m and m.archive}
        archives = {path: stack.enter_context(zipfile.ZipFile(path)) for path in archives}
        for name, member in tqdm(root.wanted.items(), desc=f"images of {root.path.name}", unit="image", disable=None):
            if member is None or root.is_there(name):
                continue
            if member.leads_out:
                broken[str(member)] = "a link that leads out of the download"
                continue
            fill = unpacked(archives[member.archive], member.name) if member.archive else linked(member.name)
            if why := put(root.path / name, fill):
                broken[str(member)] = why
    return broken


def place_copy(roots: list[Root], images: Iterator[tuple[str, str, bytes]]) -> int:
    """Write a copy's `images`, (where, path, content), to their roots. Returns how many are still missing."""
    broken, done = {root.path: {} for root in roots}, set()
    root_by_path = {str(root.path / name): root for root in roots for name in root.wanted}
    for where, path, content in tqdm(images, desc="images", unit="image", disable=None):
        root = root_by_path[path]
        if path in done or root.is_there(os.path.relpath(path, root.path)):
            continue
        done.add(path)
        if why := put(Path(path), lambda temporary, content=content: temporary.write_bytes(content)):
            broken[root.path][where] = why
    return sum(report(root, broken[root.path]) for root in roots)


def report(root: Root, broken: dict[str, str]) -> int:
    present = sum(os.path.exists(root.path / name) for name in root.wanted)
    print(f"  {root.path}: {present:,} of {len(root.wanted):,} images")
    for why, n in Counter(broken.values()).most_common(5):
        first = next(source for source, reason in broken.items() if reason == why)
        print(f"    {n:,} not placed: {why}; the first is {first}", file=sys.stderr)
    return len(root.wanted) - present
