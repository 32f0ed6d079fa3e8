"""Archives in a download: broken, hostile, or larger than the disk."""

import shutil
import struct
import zipfile
from pathlib import Path

import pytest
from downloads import (
    listing,
    prepared_from,
    refused,
    stvqa,
    textvqa,
    with_first_image,
    write,
    zipped_one,
)

from mpa.files.records import InputError


def patched(archive: Path, flag: int = 0, method: int | None = None) -> None:
    """Set a flag and the packing method of the only member, in its header and in the directory."""
    content = bytearray(archive.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.index(mark) + at
        flags, was = struct.unpack_from("<HH", content, start)
        struct.pack_into("<HH", content, start, flags | flag, was if method is None else method)
    archive.write_bytes(content)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ("corrupt", "cannot be unpacked"),
        ("encrypted", "cannot be unpacked (File 'coco-text/img_000000.jpg' is encrypted"),
        ("deflate64", "cannot be unpacked (That compression method is not supported"),
        ("text", "cannot be read (not an image"),
        ("cut", "cannot be read"),
    ],
)
def test_a_member_that_cannot_be_unpacked_is_counted_and_the_others_are_placed(tmp_path, capsys, broken, why):
    image = with_first_image(tmp_path)
    content, archive = image.read_bytes(), tmp_path / "a/one.zip"
    content = {"text": b"root:x:0:0", "cut": content[:100]}.get(broken, content)
    zipped_one(archive, {f"coco-text/{image.name}": content}, compression=zipfile.ZIP_DEFLATED)
    image.unlink()
    if broken == "corrupt":
        packed = bytearray(archive.read_bytes())
        packed[60:90] = bytes(30)
        archive.write_bytes(packed)
    elif broken != "text":
        patched(archive, flag=int(broken == "encrypted"), method=9 if broken == "deflate64" else None)
    refused(tmp_path, capsys, why)
    assert not list((tmp_path / "data").rglob(".*"))


@pytest.mark.parametrize("broken", ["encrypted", "deflate64", "corrupt"])
def test_an_annotation_file_that_cannot_be_unpacked_is_named(tmp_path, broken):
    stvqa(tmp_path / "a")
    annotations, archive = tmp_path / "a/train_task_1.json", tmp_path / "a/task.zip"
    zipped_one(archive, {annotations.name: annotations.read_bytes()}, compression=zipfile.ZIP_DEFLATED)
    annotations.unlink()
    patched(archive, flag=int(broken == "encrypted"), method=9 if broken == "deflate64" else None)
    if broken == "corrupt":
        packed = bytearray(archive.read_bytes())
        packed[60:90] = bytes(30)
        archive.write_bytes(packed)
    with pytest.raises(InputError, match=r"task\.zip: train_task_1\.json: cannot be read as JSON"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"data": [{"question_id": ' + b"9" * 5000 + b"}]}"])
def test_an_annotation_file_that_no_parser_takes_is_named(tmp_path, content):
    write(tmp_path / "a/train_task_1.json", content)
    with pytest.raises(InputError, match=r"train_task_1\.json: cannot be read as JSON"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)


def test_members_with_paths_that_lead_out_stay_below_the_image_root(tmp_path):
    image = with_first_image(tmp_path)
    for name in (f"../../../coco-text/{image.name}", f"/coco-text/{image.name}", f"C:/x/coco-text/{image.name}"):
        before = listing(tmp_path).keys()
        zipped_one(tmp_path / "a/one.zip", {name: image.read_bytes()})
        image.rename(tmp_path / "kept")
        folder = prepared_from(tmp_path / "a", "stVQA", tmp_path)
        assert (folder / "train/data/coco-text" / image.name).exists()
        (tmp_path / "kept").rename(image)
        shutil.rmtree(tmp_path / "data")
        assert listing(tmp_path).keys() - before <= {"a/one.zip"}
        assert not list(tmp_path.parent.glob("*/coco-text"))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    image = with_first_image(tmp_path)
    zeros = image.read_bytes() + bytes(2**27)
    zipped_one(tmp_path / "a/one.zip", {f"coco-text/{image.name}": zeros}, compression=zipfile.ZIP_DEFLATED)
    image.unlink()
    with pytest.raises(InputError, match=r"one\.zip: 0\.1 MB would become 134 MB when unpacked"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
    assert not (tmp_path / "data").exists()
    (tmp_path / "a/one.zip").unlink()
    content = b'{"data": [' + bytes(2**27) + b"]}"
    (tmp_path / "a/train_task_1.json").unlink()
    zipped_one(tmp_path / "a/task.zip", {"train_task_1.json": content}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="would become 134 MB when unpacked"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    textvqa(tmp_path / "a")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(InputError, match=r"the images take 0\.0 GB, but only 0\.0 GB are free"):
        prepared_from(tmp_path / "a", "textVQA", tmp_path)
    assert not (tmp_path / "data").exists()
