"""Open an image, whatever is wrong with it, as RGB: the one place that opens one.

`mpa/image_files.py` and `PL/Qwen2-VL-Finetune/src/image_files.py` are the same file, since neither imports the other.
"""

import hashlib
import io
import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# What is tried, whatever a file is called. Not among them: formats that Pillow hands to other programs (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX")
MOST_BYTES = 2**28  # a larger file is no image that anybody trains on


class ImageError(Exception):
    """Why an image cannot be used, in words for its record."""


def open_file(path: str | os.PathLike) -> BinaryIO:
    """A regular file of at most MOST_BYTES, to read. Raises ImageError; a FIFO or a device is refused, not waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
        os.close(handle)
        why = f"{found.st_size / 1e6:,.0f} MB" if stat.S_ISREG(found.st_mode) else "not a regular file"
        raise ImageError(f"cannot be read ({why}; expected an image file of at most {MOST_BYTES / 1e6:.0f} MB)")
    return os.fdopen(handle, "rb")


def read_file(path: str | os.PathLike) -> bytes:
    """What `open_file` opens. Raises ImageError."""
    with open_file(path) as file:
        try:
            return file.read(MOST_BYTES)
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})") from None


def open_image(path: str | os.PathLike | BinaryIO) -> Image.Image:
    """The image at `path`: first frame, turned as its EXIF says, 8 bits a channel, alpha over white, RGB.

    Raises ImageError when it is missing, empty, cut off, no image, no regular file, or a decompression bomb.
    """
    content = path if hasattr(path, "read") else io.BytesIO(read_file(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(content, formats=FORMATS) as file:
                file.load()
                ImageOps.exif_transpose(file, in_place=True)
                return _as_rgb(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error
        reason = "not an image, or in an unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ImageError(f"cannot be read ({reason or type(error).__name__})") from None


def content_hash(path: str | os.PathLike) -> str:
    """32 hexadecimal digits that tell a file's content. Raises ImageError where it cannot be read."""
    return hashlib.blake2b(read_file(path), digest_size=16).hexdigest()


def fingerprints(paths) -> dict[str, tuple[int, str] | None]:
    """{path: (size in bytes, content_hash)}, or None where a file cannot be read. Each is read once."""

    def of(path: str) -> tuple[int, str] | None:
        try:
            content = read_file(path)
        except ImageError:
            return None
        return len(content), hashlib.blake2b(content, digest_size=16).hexdigest()

    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(4) as pool:
        found = tqdm(
            pool.map(of, paths), "reading images", len(paths), unit="image", disable=None, leave=False, delay=3
        )
        return dict(zip(paths, found, strict=True))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey to 8 bits; Pillow's own conversion would cut all above 255 to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    most = values.max()
    white = 65535 if image.mode.startswith("I;16") or 255 < most <= 65535 else 1 if most <= 1 else max(most, 255)
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def image_size(path: str) -> tuple[int, int]:
    """(width, height) from the file's header; (0, 0) where it cannot be read."""
    try:
        with open_file(path) as content, Image.open(content, formats=FORMATS) as file:
            return file.size
    except Exception:  # opened for real later, with a reason
        return 0, 0
