"""Samples as a model takes them, on disk, so that a picture is processed once: in a run, and by runs that share a folder."""

import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from pathlib import Path

import PIL
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT = 1  # to be raised when `data.encode` makes something else of the same sample


class Cache:
    """`folder`/KEY.safetensors for each sample; the key says what it was made of, pictures by content.

    At most `most` bytes, and half of what is free on the disk, `shares` processes together. What runs before
    this one left there goes first, the longest unused before others; when all is of this run, no more is taken.
    """

    def __init__(self, folder: Path, most: float, processor, shares: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.maker = folder, _fingerprint(processor)
        found = sorted((path.stat().st_mtime_ns, path) for path in folder.glob("*.safetensors"))
        self.old = deque(found)
        used = sum(path.stat().st_size for _, path in found)
        self.left = min(most - used, shutil.disk_usage(folder).free / 2) / shares

    def key(self, sample: dict) -> str:
        """Raises OSError where a picture cannot be read."""
        digest = hashlib.sha256(self.maker)
        digest.update(json.dumps(sample["messages"]).encode())
        for path in sample["images"]:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        path = self._path(key)
        try:
            encoded = load_file(path)
            os.utime(path)
        except (OSError, SafetensorError):
            return None
        return encoded

    def put(self, key: str, encoded: dict[str, torch.Tensor]) -> bool:
        """Whether there was room for it."""
        size = sum(value.nbytes for value in encoded.values())
        while size > self.left and self.old:
            self._forget(*self.old.popleft())
        if size > self.left:
            return False
        aside = self.folder / f"{key}.{os.getpid()}"
        try:
            save_file({name: value.contiguous() for name, value in encoded.items()}, aside)
            aside.rename(self._path(key))
        except (OSError, SafetensorError):  # the disk is full
            aside.unlink(missing_ok=True)
            self.left = 0
            return False
        self.left -= size
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _forget(self, used: int, path: Path) -> None:
        try:
            found = path.stat()
            if found.st_mtime_ns == used:  # not used in this run
                path.unlink()
                self.left += found.st_size
        except FileNotFoundError:
            pass  # another process was first


def _fingerprint(processor) -> bytes:
    """Of all that turns a sample into tensors."""
    digest = hashlib.sha256(f"{FORMAT} {transformers.__version__} {PIL.__version__}".encode())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
    return digest.digest()
