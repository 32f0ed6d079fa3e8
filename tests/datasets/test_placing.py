"""Which images prepare takes: only images, only from below the source; and nothing written through a link."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from downloads import (
    N,
    listing,
    prepare,
    prepared_from,
    refused,
    stvqa,
    with_first_image,
    write,
    zipped,
    zipped_one,
)
from PIL import Image

from mpa.files.records import InputError


@pytest.mark.parametrize("place", ["STVQA", "STVQA/train", "STVQA/train/data/vizwiz"])
def test_nothing_is_written_through_a_link_in_the_data_folder(tmp_path, place):
    stvqa(tmp_path / "a")
    zipped(tmp_path / "a/train", tmp_path / "a/train.zip")
    (tmp_path / "precious").mkdir()
    (tmp_path / "data" / place).parent.mkdir(parents=True)
    (tmp_path / "data" / place).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"leads to .*precious through a link|lies outside the image root"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
    assert not listing(tmp_path / "precious")
    assert not list((tmp_path / "data").rglob("*.json"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk")  # a data folder that is a link itself is the user's choice
    prepare.main(["stVQA", "--source", str(tmp_path / "a"), "--data", str(tmp_path / "linked")])
    assert len(listing(tmp_path / "disk/STVQA/train/data")) == N + N // 3


@pytest.mark.parametrize("target", ["text", "image"])
def test_a_link_to_a_file_outside_the_download_is_not_followed(tmp_path, capsys, target):
    image = with_first_image(tmp_path)
    private = Path("/etc/passwd")
    if target == "image":
        private = tmp_path / "private.png"
        Image.new("RGB", (64, 64)).save(private)
    image.unlink()
    image.symlink_to(private)
    refused(tmp_path, capsys, f"1 not placed: a link that leads out of the download; the first is {image}")
    assert private.stat().st_nlink == 1


def test_a_file_that_is_no_image_is_not_placed(tmp_path, capsys):
    image = with_first_image(tmp_path)
    (tmp_path / "a/train/other").mkdir()
    image.write_text("root:x:0:0:root:/root:/bin/bash\n")
    os.link(image, tmp_path / "hard")
    moved = min((tmp_path / "a/train/iiit_text").iterdir())  # so that no folder holds all
    zipped_one(tmp_path / "a/one.zip", {f"iiit_text/{moved.name}": moved.read_bytes()})
    moved.unlink()
    refused(tmp_path, capsys, "1 not placed: cannot be read (not an image")
    assert not list((tmp_path / "data").rglob(".*"))


def test_a_link_inside_the_download_is_taken(tmp_path):
    image = with_first_image(tmp_path)
    (tmp_path / "a/store").mkdir()
    shutil.move(image, tmp_path / "a/store/1")
    image.symlink_to("../../store/1")
    prepared_from(tmp_path / "a", "stVQA", tmp_path)
    placed = tmp_path / "data/STVQA/train/data/coco-text" / image.name
    assert placed.samefile(tmp_path / "a/store/1")
    assert not placed.is_symlink()


def test_pipes_and_folders_that_cannot_be_looked_into_do_not_hold_it_up(tmp_path):
    image = with_first_image(tmp_path)
    image.unlink()
    os.mkfifo(image)
    deep = f"cd {tmp_path}/a && for i in $(seq 30); do mkdir {'d' * 200} && cd {'d' * 200} || exit; done"
    subprocess.run(["bash", "-c", deep], check=True)
    command = [
        sys.executable,
        ROOT / "data/prepare.py",
        "stVQA",
        "--source",
        tmp_path / "a",
        "--data",
        tmp_path / "data",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    subprocess.run(["bash", "-c", f"rm -rf {tmp_path}/a/d*"], check=True)
    assert done.returncode == 1
    assert "cannot be read (File name too long)" in done.stderr
    assert "1 images are missing below" in done.stderr
    assert str(image) in done.stderr.split("that were not opened: ")[1]
    os.mkfifo(tmp_path / "a/TextVQA_0.5.1_val.json")
    with pytest.raises(InputError, match="no files of textVQA found"):
        prepared_from(tmp_path / "a", "textVQA", tmp_path)


def test_two_different_files_of_one_name_are_refused(tmp_path):
    stvqa(tmp_path / "a/one")
    shutil.copytree(tmp_path / "a/one", tmp_path / "a/two")
    prepared_from(tmp_path / "a", "stVQA", tmp_path)
    write(tmp_path / "a/two/train_task_1.json", {"data": []})
    with pytest.raises(InputError, match="different files with the same name"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
