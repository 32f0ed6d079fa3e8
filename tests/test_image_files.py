import os
import socket
import struct
import sys
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from mpa.datasets.loading import load_samples
from mpa.image_files import ImageError, content_hash, fingerprints, image_size, open_image

sys.path.insert(0, str(ROOT / "PL/Qwen2-VL-Finetune/src"))
import data


def bomb(path):
    """A small PNG whose header claims 30,000 x 30,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"x"))]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def broken(path, kind):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image")
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
        ("text", "not an image"),
        ("truncated", "cannot be read"),
        ("folder", "cannot be read"),
        ("bomb", "million pixels"),
    ],
)
def test_a_bad_image_says_what_is_wrong(tmp_path, kind, says):
    path = tmp_path / "a.png"
    broken(path, kind)
    with pytest.raises(ImageError, match=says):
        open_image(path)
    assert image_size(path) in ((0, 0), (200, 200), (30_000, 30_000))


def test_images_come_out_as_people_see_them(tmp_path):
    turned = Image.new("RGB", (20, 10), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)

    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)

    frames = [Image.new("P", (8, 8), color) for color in (0, 1)]
    frames[0].putpalette([10, 20, 30, 200, 200, 200])
    frames[1].putpalette([10, 20, 30, 200, 200, 200])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (10, 20, 30)

    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert open_image(tmp_path / "print.jpg").mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_grey_is_scaled_and_not_cut_to_white(tmp_path, mode):
    values = np.array([[0, 16384], [32768, 65535]])
    Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])).save(tmp_path / "a.tif")
    image = open_image(tmp_path / "a.tif")
    assert image.mode == "RGB"
    assert [image.getpixel((x, y))[0] for y in (0, 1) for x in (0, 1)] == [0, 64, 128, 255]


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".PNG", ".webp", ".bmp", ".tiff", ".gif"])
def test_the_trainer_sees_the_same_pixels_as_the_stages(tmp_path, suffix):
    """The trainer has its own copy of the code, so that it does not need mpa."""
    path = tmp_path / f"a{suffix}"
    noise = Image.effect_noise((40, 30), 80).convert("RGB")
    noise.save(path)
    (sample,) = load_samples("images", "train", image_root=tmp_path)
    assert sample.question_id == path.name
    assert data.open_image(path).tobytes() == open_image(path).tobytes()
    for mode in ("LA", "RGBA", "P", "I;16"):
        other = tmp_path / "b.png"
        Image.effect_noise((40, 30), 80).convert(mode if mode != "I;16" else "L").save(other)
        if mode == "I;16":
            Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(other)
        assert data.open_image(other).tobytes() == open_image(other).tobytes()


def special(folder, kind):
    path = folder / "a.jpg"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.truncate(2**32)
    elif kind == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    return path


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "sparse", "postscript"])
def test_what_is_no_image_file_is_refused_at_once(tmp_path, kind, monkeypatch):
    def started(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)  # Ghostscript
    path = special(tmp_path, kind)
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(path)
    assert image_size(path) == (0, 0)
    assert (fingerprints([path])[path] is None) == (kind != "postscript")
    with pytest.raises(data.DataError, match="cannot be read"):
        data._opened(str(path))


def test_a_fingerprint_tells_content_from_content(tmp_path):
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = fingerprints([tmp_path / name for name in "abc"]).values()
    assert a == b == (1, content_hash(tmp_path / "a")) and a != c
