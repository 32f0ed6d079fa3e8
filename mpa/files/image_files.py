"""Open image files as RGB. All images are opened here; every failure becomes an `ImageError`."""

import hashlib
import io
import os
import stat
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

# Tried regardless of the file's suffix. Formats that Pillow passes to other programs (PostScript) are excluded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX")
MAX_BYTES = 2**28  # no training image is larger
_ORIENTATION = 0x0112  # the EXIF tag; its values from 2 say how the image is turned to show it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG, _PNG_PIXELS = b"\x89PNG\r\n\x1a\n", {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


class ImageError(Exception):
    """An image cannot be used. The message is stored in the image's record."""


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file of at most MAX_BYTES. Raises ImageError, also for a FIFO or a device, without blocking."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise ImageError("no such file") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
        os.close(handle)
        why = f"{found.st_size / 1e6:,.0f} MB" if stat.S_ISREG(found.st_mode) else "not a regular file"
        raise ImageError(f"cannot be read ({why}; expected an image file of at most {MAX_BYTES / 1e6:.0f} MB)")
    return os.fdopen(handle, "rb")


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a file that `open_file` accepts. Raises ImageError."""
    with open_file(path) as file:
        try:
            return file.read(MAX_BYTES)
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})") from None


def open_image(path: str | os.PathLike | BinaryIO) -> Image.Image:
    """The image at `path` as RGB, 8 bits per channel: its first frame, rotated as EXIF says, with alpha over white.

    Malformed metadata does not cost an image: without a readable orientation it is not rotated. Raises ImageError if it
    is missing, empty, truncated, not an image, not a regular file, or a decompression bomb.
    """
    content = path.read() if hasattr(path, "read") else read_file(path)
    try:
        return _decoded(content)
    except ImageError as error:
        pixels = _without_metadata(content)
        if pixels == content:
            raise
        try:
            return _decoded(pixels)
        except ImageError:
            raise error from None


def _decoded(content: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a line for each odd tag of each image
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as file:
                file.load()
                return _as_rgb(_upright(file))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error
        reason = "not an image, or in an unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ImageError(f"cannot be read ({reason or type(error).__name__})") from None


def _upright(image: Image.Image) -> Image.Image:
    """The image as EXIF or XMP say it is to be shown; as it is where they cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # of the parser, on junk
        turn = None
    return image if turn is None else image.transpose(turn)


def _without_metadata(content: bytes) -> bytes:
    """A PNG or AVIF file without what its reader parses before the pixels: texts, profiles, EXIF. Others as they are."""
    if content[4:12] == b"ftypavif":
        return content.replace(b"Exif", b"none", 1)  # the type of its EXIF item
    if not content.startswith(_PNG):
        return content
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        chunk = content[at : at + 12 + length]
        sound = int.from_bytes(chunk[-4:]) == zlib.crc32(chunk[4:-4])
        if chunk[4:8] in _PNG_PIXELS or (chunk[4:8] == b"eXIf" and sound):
            kept.append(chunk)
        at += len(chunk)
    return b"".join(kept)


def content_hash(path: str | os.PathLike) -> str:
    """A hash of the file's content, 32 hexadecimal digits. Raises ImageError if the file cannot be read."""
    return hashlib.blake2b(read_file(path), digest_size=16).hexdigest()


def fingerprints(paths) -> dict[str, tuple[int, str] | None]:
    """{path: (size in bytes, content_hash), or None if the file cannot be read}. Each file is read once."""

    def fingerprint(path: str) -> tuple[int, str] | None:
        try:
            content = read_file(path)
        except ImageError:
            return None
        return len(content), hashlib.blake2b(content, digest_size=16).hexdigest()

    paths = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(4) as pool:
        found = tqdm(
            pool.map(fingerprint, paths), "reading images", len(paths), unit="image", disable=None, leave=False, delay=3
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
    """High-bit-depth greyscale to 8 bits. Pillow's own conversion would clip every value above 255 to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    highest = values.max()
    if image.mode.startswith("I;16") or 255 < highest <= 65535:
        white = 65535
    else:
        white = 1 if highest <= 1 else max(highest, 255)
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def image_size(path: str) -> tuple[int, int]:
    """(width, height) from the file's header; (0, 0) if it cannot be read."""
    try:
        with open_file(path) as content, Image.open(content, formats=FORMATS) as file:
            return file.size
    except Exception:  # `open_image` reports the reason later
        return 0, 0
