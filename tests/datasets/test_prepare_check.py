"""`prepare check`: what it names, and when it fails."""

import shutil

import pytest
from downloads import (
    N,
    chartqa,
    prepare,
    prepared_from,
)
from PIL import Image

from mpa.files.records import InputError


def test_check_names_what_is_broken_and_fails_when_samples_would_be_lost(tmp_path, capsys):
    chartqa(tmp_path)
    arguments = ["--data", str(tmp_path / "data")]
    prepare.main(["chartVQA", "--source", str(tmp_path), *arguments])
    prepare.main(["check", "chartVQA", *arguments])
    said = capsys.readouterr().out
    assert f"{N} questions about {N} images" in said
    assert "visual tokens of Qwen2-VL 144 to 144 per image" in said
    assert "All images are usable." in said
    images = tmp_path / "ChartQA Dataset/test/png"
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    Image.new("RGB", (2, 900)).save(images / "3.png")
    shutil.copy(images / "4.png", images / "5.png")
    with pytest.raises(SystemExit) as ended:
        prepare.main(["check", "chartVQA", *arguments])
    said = capsys.readouterr().out
    assert "6 samples would be lost and 0 files are missing" in str(ended.value)
    for words in (
        "1.png: no such file",
        "2.png: cannot be read (not an image",
        "3.png: the processor refuses it",
        "byte-identical copies",
    ):
        assert words in said


def test_a_folder_of_ones_own_images_is_checked(images, capsys):
    prepare.main(["check", "images", "--image-root", str(images)])
    assert "12 questions about 12 images" in capsys.readouterr().out


def test_check_looks_at_every_file_that_was_written(tmp_path, capsys):
    chartqa(tmp_path / "a")
    folder = prepared_from(tmp_path / "a", "chartVQA", tmp_path)
    next((tmp_path / "a/ChartQA Dataset/val/png").iterdir()).write_bytes(b"x")
    with pytest.raises(SystemExit, match="1 samples would be lost"):
        prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])
    (folder / "train_onePerImage_QwenFormat_eval.json").write_text("{broken")
    with pytest.raises(InputError, match="not JSON"):
        prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])
    (folder / "test_combined.json").unlink()
    (folder / "train_onePerImage_QwenFormat_eval.json").unlink()
    with pytest.raises(SystemExit, match="0 samples would be lost and 1 files are missing"):
        prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])
    root = tmp_path / "a/ChartQA Dataset/train/png"
    prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data"), "--split", "train", "--image-root", str(root)])
