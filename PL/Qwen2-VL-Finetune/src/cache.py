"""An on-disk cache of encoded samples, shared by the epochs of a run and by runs with the same cache folder."""

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mpa.files.image_files import read_file

LIBRARIES = ("transformers", "torch", "torchvision", "pillow")
DAY = 24 * 3600  # seconds
FORMAT = 3  # increase it if `data.encode` encodes the same sample differently
PIXELS = "pixel_values"


class SampleCache:
    """One file `folder`/KEY.safetensors per sample. The key is a hash of all that determines the encoding.

    It holds at most `max_bytes`, and at most half of the disk's free space, divided among `writers` concurrent
    processes. If a new sample does not fit, files unused for a day are evicted, least recently used first; if that is
    not enough, the sample is not stored.
    """

    def __init__(self, folder: Path, max_bytes: float, processor, writers: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.processor_digest = folder, _processor_digest(processor)
        self.scaling = _pixel_scaling(processor)
        used, yesterday, unused = 0, time.time() - DAY, []
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):  # another process deleted it
                stat = entry.stat()
                used += stat.st_size
                if stat.st_mtime < yesterday:
                    unused.append((stat.st_mtime, Path(entry.path)))
        self.evictable = deque(sorted(unused))
        self.bytes_left = min(max_bytes - used, shutil.disk_usage(folder).free / 2) / writers

    def key(self, sample: dict) -> str:
        """Hash of processor, messages and image contents. Raises ImageError if an image cannot be read."""
        digest = hashlib.sha256(self.processor_digest)
        digest.update(json.dumps(sample["messages"]).encode())
        for path in sample["images"]:
            digest.update(hashlib.sha256(read_file(path)).digest())
        return digest.hexdigest()

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The encoded sample; None if it is not stored, or damaged."""
        path = self._path(key)
        try:
            encoded = _decompress(load_file(path))
        except (OSError, SafetensorError):
            return None
        with suppress(OSError):  # a file of another user: readable, but its time cannot be set
            os.utime(path)
        return encoded

    def put(self, key: str, encoded: dict[str, torch.Tensor]) -> bool:
        """Store an encoded sample; False if there is no room or the disk cannot be written."""
        encoded = _compress(encoded, self.scaling)
        size = sum(value.nbytes for value in encoded.values())
        while size > self.bytes_left and self.evictable:
            self._evict(*self.evictable.popleft())
        if size > self.bytes_left:
            return False
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(".part", dir=self.folder)
            os.close(handle)
            save_file({name: value.contiguous() for name, value in encoded.items()}, temporary)
            os.replace(temporary, self._path(key))
        except (OSError, SafetensorError):
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            self.bytes_left = 0
            return False
        self.bytes_left -= size
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _evict(self, last_use: float, path: Path) -> None:
        with suppress(OSError):
            stat = path.stat()
            if stat.st_mtime == last_use:  # otherwise it was used since
                path.unlink()
                self.bytes_left += stat.st_size


def _processor_digest(processor) -> bytes:
    """Hash of the processor's files, the library versions and FORMAT."""
    digest = hashlib.sha256(repr((FORMAT, *map(version, LIBRARIES))).encode())
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.read_bytes())
    return digest.digest()


def _pixel_scaling(processor) -> tuple[list[float], list[float], float] | None:
    """(mean, standard deviation, rescale factor) of the image processor, the first two per channel; None if unknown."""
    images = processor.image_processor
    mean, std, scale = (getattr(images, name, None) for name in ("image_mean", "image_std", "rescale_factor"))
    return (list(mean), list(std), scale) if mean and std and scale and len(mean) == len(std) == 3 else None


def _compress(encoded: dict[str, torch.Tensor], scaling) -> dict[str, torch.Tensor]:
    """Replace float32 pixels by their 8-bit codes [3, n] and a table of values [3, 256]: a quarter of the size.

    Only if this is lossless: pixels that were interpolated after scaling are not changed.
    """
    pixels = encoded.get(PIXELS)
    if scaling is None or pixels is None or pixels.dtype != torch.float32:
        return encoded
    channels = _by_channel(pixels)
    if channels is None:
        return encoded
    mean, std, scale = scaling
    mean, std = torch.tensor(mean)[:, None], torch.tensor(std)[:, None]
    codes = ((channels * std + mean) / scale).round().clamp(0, 255).to(torch.uint8)
    table = torch.zeros(3, 256).scatter_(1, codes.long(), channels)
    if not torch.equal(table.gather(1, codes.long()), channels):
        return encoded
    others = {name: value for name, value in encoded.items() if name != PIXELS}
    return others | {f"{PIXELS}.codes": codes, f"{PIXELS}.table": table, f"{PIXELS}.shape": torch.tensor(pixels.shape)}


def _decompress(encoded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if f"{PIXELS}.codes" not in encoded:
        return encoded
    codes, table, shape = (encoded.pop(f"{PIXELS}.{name}") for name in ("codes", "table", "shape"))
    return encoded | {PIXELS: _from_channels(table.gather(1, codes.long()), shape.tolist()).contiguous()}


def _by_channel(pixels: torch.Tensor) -> torch.Tensor | None:
    """Patches [N, 3 * ...], whose columns are ordered by channel, or images [..., 3, H, W] -> [3, n]; None for others."""
    if pixels.dim() == 2 and pixels.shape[1] % 3 == 0:
        return pixels.reshape(len(pixels), 3, -1).transpose(0, 1).reshape(3, -1)
    if pixels.dim() >= 4 and pixels.shape[-3] == 3:
        return pixels.movedim(-3, 0).reshape(3, -1)
    return None


def _from_channels(channels: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """The inverse of `_by_channel`."""
    if len(shape) == 2:
        return channels.reshape(3, shape[0], -1).transpose(0, 1).reshape(shape)
    return channels.reshape(3, *shape[:-3], *shape[-2:]).movedim(0, -3)
