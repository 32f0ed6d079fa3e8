import struct
import zlib

import pytest
from PIL import Image

from mpa.pictures import PictureError, open_picture, picture_size


def bomb(path):
    """A small PNG that says it is 30,000 x 30,000."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"x"))]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def broken(path, kind):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "truncated":
        Image.effect_noise((200, 200), 50).save(path, "PNG")
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        bomb(path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such file"),
        ("empty", "cannot be read"),
        ("text", "not a picture"),
        ("truncated", "cannot be read"),
        ("folder", "cannot be read"),
        ("bomb", "million pixels"),
    ],
)
def test_a_bad_picture_says_what_is_wrong(tmp_path, kind, says):
    path = tmp_path / "a.png"
    broken(path, kind)
    with pytest.raises(PictureError, match=says):
        open_picture(path)
    assert picture_size(path) in ((0, 0), (200, 200), (30_000, 30_000))


def test_pictures_come_out_as_people_see_them(tmp_path):
    turned = Image.new("RGB", (20, 10), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (10, 20)

    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)

    frames = [Image.new("P", (8, 8), color) for color in (0, 1)]
    frames[0].putpalette([10, 20, 30, 200, 200, 200])
    frames[1].putpalette([10, 20, 30, 200, 200, 200])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "moving.gif").getpixel((0, 0)) == (10, 20, 30)

    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert open_picture(tmp_path / "print.jpg").mode == "RGB"
