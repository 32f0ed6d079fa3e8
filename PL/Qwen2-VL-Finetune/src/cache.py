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
from image_files import read_file
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

LIBRARIES = ("transformers", "torch", "torchvision", "pillow")
DAY = 24 * 3600  # seconds
FORMAT = 2  # to be raised when `data.encode` makes something else of the same sample


class Cache:
    """`folder`/KEY.safetensors for each sample; the key says what it was made of, images by content.

    At most `most` bytes, and half of what is free on the disk, `shares` processes together. What nobody has used for
    a day makes room for new samples, the longest unused first; else those find none and are not kept.
    """

    def __init__(self, folder: Path, most: float, processor, shares: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.maker, self.steps = folder, _fingerprint(processor), _steps(processor)
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
        """Raises ImageError where an image cannot be read."""
        digest = hashlib.sha256(self.maker)
        digest.update(json.dumps(sample["messages"]).encode())
        for path in sample["images"]:
            digest.update(hashlib.sha256(read_file(path)).digest())
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        path = self._path(key)
        try:
            encoded = _expanded(load_file(path))
        except (OSError, SafetensorError):
            return None
        with suppress(OSError):  # somebody else's file may be read all the same
            os.utime(path)
        return encoded

    def put(self, key: str, encoded: dict[str, torch.Tensor]) -> bool:
        """Whether there was room for it."""
        encoded = _compact(encoded, self.steps)
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


PIXELS = "pixel_values"


def _steps(processor) -> tuple[list[float], list[float], float] | None:
    """(mean, standard deviation, scale) with which the processor makes numbers of bytes, a channel each; None where it does not say."""
    images = processor.image_processor
    mean, std, scale = (getattr(images, name, None) for name in ("image_mean", "image_std", "rescale_factor"))
    return (list(mean), list(std), scale) if mean and std and scale and len(mean) == len(std) == 3 else None


def _compact(encoded: dict[str, torch.Tensor], steps) -> dict[str, torch.Tensor]:
    """Pixels as the bytes that they were made of, with a table of 256 values a channel; where that gives the same to the bit.

    A quarter of float32. Other tensors, and pixels that were mixed after scaling, stay as they are.
    """
    pixels = encoded.get(PIXELS)
    if steps is None or pixels is None or pixels.dtype != torch.float32:
        return encoded
    view = _by_channel(pixels)
    if view is None:
        return encoded
    mean, std, scale = steps
    at = torch.tensor(mean)[:, None], torch.tensor(std)[:, None]
    codes = ((view * at[1] + at[0]) / scale).round().clamp(0, 255).to(torch.uint8)  # [3, n]
    table = torch.zeros(3, 256).scatter_(1, codes.long(), view)
    if not torch.equal(table.gather(1, codes.long()), view):
        return encoded
    others = {name: value for name, value in encoded.items() if name != PIXELS}
    return others | {f"{PIXELS}.codes": codes, f"{PIXELS}.table": table, f"{PIXELS}.shape": torch.tensor(pixels.shape)}


def _expanded(encoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if f"{PIXELS}.codes" not in encoded:
        return encoded
    codes, table, shape = (encoded.pop(f"{PIXELS}.{name}") for name in ("codes", "table", "shape"))
    return encoded | {PIXELS: _unview(table.gather(1, codes.long()), shape.tolist()).contiguous()}


def _by_channel(pixels: torch.Tensor) -> torch.Tensor | None:
    """[3, n]: of patches [N, 3 x ...], whose columns are channel by channel, or of images [..., 3, H, W]."""
    if pixels.dim() == 2 and pixels.shape[1] % 3 == 0:
        return pixels.reshape(len(pixels), 3, -1).transpose(0, 1).reshape(3, -1)
    if pixels.dim() >= 4 and pixels.shape[-3] == 3:
        return pixels.movedim(-3, 0).reshape(3, -1)
    return None


def _unview(view: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """What `_by_channel` was given."""
    if len(shape) == 2:
        return view.reshape(3, shape[0], -1).transpose(0, 1).reshape(shape)
    return view.reshape(3, *shape[:-3], *shape[-2:]).movedim(0, -3)


def _fingerprint(processor) -> bytes:
    """Of all that turns a sample into tensors."""
    digest = hashlib.sha256(repr((FORMAT, *map(version, LIBRARIES))).encode())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
    return digest.digest()
