"""Open a picture, whatever is wrong with it, as RGB."""

import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


class PictureError(Exception):
    """Why a picture cannot be used, in words for its record."""


def open_picture(path: str | BinaryIO) -> Image.Image:
    """The picture at `path`: first frame, turned as its EXIF says, 8 bits a channel, alpha over white, RGB.

    Raises PictureError when it is missing, empty, cut off, no picture, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                ImageOps.exif_transpose(file, in_place=True)
                return _as_rgb(file)
    except FileNotFoundError:
        raise PictureError("no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(f"more than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; make it smaller") from None
    except Exception as error:  # Pillow's plugins raise anything from SyntaxError to struct.error
        reason = "not a picture, or in an unknown format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise PictureError(f"cannot be read ({reason})") from None


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Deep grey to 8 bits; Pillow's own conversion would cut all above 255 to white."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
    most = values.max()
    white = 65535 if picture.mode.startswith("I;16") or 255 < most <= 65535 else 1 if most <= 1 else max(most, 255)
    return Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) from the file's header; (0, 0) where it cannot be read."""
    try:
        with Image.open(path) as file:
            return file.size
    except Exception:  # opened for real later, with a reason
        return 0, 0
