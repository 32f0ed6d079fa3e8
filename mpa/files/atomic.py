"""Files that are written whole or not at all, also by several writers at once, and after a kill or on a full disk."""

import contextlib
import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mpa.files import disk_errors


@contextlib.contextmanager
def temporary(path: Path, clean: bool = True) -> Iterator[BinaryIO]:
    """A new file beside `path`, of the writer alone, to write to and then to rename. It is removed where it was not renamed.

    It is locked while it is written. So what a killed writer of `path` has left is known, and removed here; in a folder of very
    many files leave that out (`clean`), and call `remove_left` once.
    """
    if clean:
        remove_left(path.parent, path.name)
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(4)}.part"), "x+b")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):
            break
        file.close()  # another writer took it for left over before it was locked
    try:
        with disk_errors.named(path), file:
            yield file
    finally:
        with contextlib.suppress(OSError):
            Path(file.name).unlink()


def remove_left(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that killed writers of `name` have left in a folder: those that nobody holds."""
    pattern = name if name == "*" else glob.escape(name)
    for left in folder.glob(f".{pattern}.*part"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, clean: bool = True) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path`, on the disk, when the block ends without an error. See `temporary`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path, clean) as file:
        yield file
        on_disk(file)
        os.replace(file.name, path)


def on_disk(file: BinaryIO) -> None:
    """What was written so far is on the disk: a full one is an error now, not later."""
    file.flush()
    os.fsync(file.fileno())
