import io
import os
import socket
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageOps

from mpa.data.loading import load_samples
from mpa.files.image_files import ImageError, content_hash, fingerprints, image_size, open_image

sys.path.insert(0, str(ROOT / "PL/Qwen2-VL-Finetune/src"))
import data
from mpa.files.records import InputError


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
    with pytest.raises(InputError, match="cannot be read"):
        data._opened(str(path))


def test_a_fingerprint_tells_content_from_content(tmp_path):
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = fingerprints([tmp_path / name for name in "abc"]).values()
    assert a == b == (1, content_hash(tmp_path / "a")) and a != c


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """The picture as PNG, with further chunks after its header."""
    added = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return (whole := written("PNG"))[:33] + added + whole[33:]


def jpeg(marker: int, segment: bytes) -> bytes:
    whole = written("JPEG")
    return whole[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(segment) + 2) + segment + whole[2:]


def written(kind: str, **options) -> bytes:
    content = io.BytesIO()
    np.random.seed(0)
    picture = Image.fromarray(np.random.randint(0, 255, (30, 40, 3), dtype=np.uint8))
    picture.save(content, kind, **options)
    return content.getvalue()


def exif(orientation: int | None = None) -> bytes:
    found = Image.Exif()
    found[0x010F] = "a camera's maker"
    if orientation:
        found[0x0112] = orientation
    return found.tobytes()


JUNK = exif().replace(b"MM\0*", b"MM#*").replace(b"II*\0", b"II#\0")
MANY_MB = zlib.compress(b"x" * 3_000_000)
MALFORMED = {
    "png, profile of no digits": png((b"tEXt", b"Raw profile type exif\0\nexif\n   8\nzz")),
    "png, profile cut off": png((b"tEXt", b"Raw profile type exif\0\nexif\n  12\n45786966000049492a00")),
    "png, compressed profile": png((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\n\n\nnone"))),
    "png, profile of megabytes": png((b"zTXt", b"Raw profile type exif\0\0" + MANY_MB)),
    "png, eXIf": png((b"eXIf", JUNK[6:])),
    "png, empty eXIf": png((b"eXIf", b"")),
    "png, XMP of megabytes": png((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + MANY_MB)),
    "png, XMP": png((b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0\xff\xfe tiff:Orientation="0"')),
    "png, colour profile": png((b"iCCP", b"")),
    "png, torn eXIf": png((b"eXIf", exif(6)[6:])).replace(b"a camera's maker", b"x" * 16),
    "webp": written("WEBP", lossless=True, exif=JUNK),
    "webp, XMP": written("WEBP", lossless=True, xmp=b'\xff tiff:Orientation="9"'),
    "avif": written("AVIF", exif=exif()).replace(b"MM\0*", b"MM#*").replace(b"II*\0", b"II#\0"),
    "jpeg": jpeg(0xE1, JUNK),
    "jpeg, cut off": jpeg(0xE1, exif()[:14]),
    "jpeg, nothing": jpeg(0xE1, b"Exif\0\0"),
    "jpeg, XMP": jpeg(0xE1, b'http://ns.adobe.com/xap/1.0/\0tiff:Orientation="9" \xff'),
    "mpo": jpeg(0xE2, b"MPF\0II*\0\x08\0\0\0\x03\0" + b"\xff" * 40),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_metadata_costs_no_image_and_turns_none(content, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(io.BytesIO(content))
    kind = "JPEG" if content.startswith(b"\xff\xd8") else "AVIF" if b"ftypavif" in content[:12] else "PNG"
    assert (image.mode, image.tobytes()) == ("RGB", open_image(io.BytesIO(written(kind))).tobytes())
    (tmp_path / "a").write_bytes(content)
    assert data.open_image(tmp_path / "a").tobytes() == image.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF", "AVIF", "MPO"])
def test_a_readable_orientation_is_obeyed_also_beside_an_odd_tag(kind, orientation):
    content = written(kind, exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    odd = exif(orientation).replace(b"a camera's maker", b"\xff" * 16)  # no text
    odd = png((b"iCCP", b""), (b"eXIf", odd[6:])) if kind == "PNG" else content.replace(exif(orientation)[6:], odd[6:])
    for one in (content, odd):
        assert open_image(io.BytesIO(one)).tobytes() == expected.tobytes()
        assert open_image(io.BytesIO(one)).size == ((30, 40) if orientation >= 5 else (40, 30))
