"""Samples as a model takes them, on disk, so that each is made once: in a run, and by runs that share a folder."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import deque
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from pictures import read_file
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

LIBRARIES = ("transformers", "torch", "torchvision", "pillow")
DAY = 24 * 3600  # seconds
FORMAT = 1  # to be raised when `data.encode` makes something else of the same sample


class Cache:
    """`folder`/KEY.safetensors for each sample; the key says what it was made of, pictures by content.

    At most `most` bytes, and half of what is free on the disk, `shares` processes together. What nobody has used for
    a day makes room for new samples, the longest unused first; else those find none and are not kept.
    """

    def __init__(self, folder: Path, most: float, processor, shares: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.maker = folder, _fingerprint(processor)
        used, yesterday, old = 0, time.time() - DAY, []
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # another process was first
                found = entry.stat()
                used += found.st_size
                if found.st_mtime < yesterday:
                    old.append((found.st_mtime, Path(entry.path)))
        self.old = deque(sorted(old))
        self.left = min(most - used, shutil.disk_usage(folder).free / 2) / shares

    def key(self, sample: dict) -> str:
        """Raises PictureError where an image cannot be read."""
        digest = hashlib.sha256(self.maker)
        digest.update(json.dumps(sample["messages"]).encode())
        for path in sample["images"]:
            digest.update(hashlib.sha256(read_file(path)).digest())
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        path = self._path(key)
        try:
            encoded = load_file(path)
        except (OSError, SafetensorError):
            return None
        with suppress(OSError):  # somebody else's file may be read all the same
            os.utime(path)
        return encoded

    def put(self, key: str, encoded: dict[str, torch.Tensor]) -> bool:
        """Whether there was room for it."""
        size = sum(value.nbytes for value in encoded.values())
        while size > self.left and self.old:
            self._forget(*self.old.popleft())
        if size > self.left:
            return False
        aside = None
        try:
            handle, aside = tempfile.mkstemp(".part", dir=self.folder)
            os.close(handle)
            save_file({name: value.contiguous() for name, value in encoded.items()}, aside)
            os.replace(aside, self._path(key))
        except (OSError, SafetensorError):  # the disk is full, or not to be written to
            if aside:
                Path(aside).unlink(missing_ok=True)
            self.left = 0
            return False
        self.left -= size
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _forget(self, used: float, path: Path) -> None:
        with suppress(OSError):
            found = path.stat()
            if found.st_mtime == used:  # nor since
                path.unlink()
                self.left += found.st_size


def _fingerprint(processor) -> bytes:
    """Of all that turns a sample into tensors."""
    digest = hashlib.sha256(repr((FORMAT, *map(version, LIBRARIES))).encode())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
    return digest.digest()
