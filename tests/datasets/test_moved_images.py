"""Images that lie elsewhere than the records say, and folders that cannot be read."""

import os
import shutil
from pathlib import Path

import pytest

from mpa.data.loading import load_samples
from mpa.data.paths import locate
from mpa.files.records import InputError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def test_images_are_found_by_the_longest_end_of_their_path(tmp_path):
    root = make(tmp_path / "new", "a/1.png", "1.png", "b/2.png")
    assert locate(["/old/x/a/1.png", "/old/x/b/2.png"], {}, str(root)) == [f"{root}/a/1.png", f"{root}/b/2.png"]
    assert locate(["/old/none.png"], {}, str(root)) == ["/old/none.png"]


@pytest.mark.parametrize(
    ("recorded", "files", "root", "says"),
    [
        (["/d/train/png/1.png"], ["test/png/1.png"], "test", "an image of train, but this is a folder of test"),
        (
            ["/d/val2014/1.png"],
            ["train2014/1.png"],
            "train2014",
            "an image of validation, but this is a folder of train",
        ),
        (["/d/human/1.png", "/d/augmented/1.png"], ["all/1.png"], "all", "would both be searched there"),
    ],
)
def test_images_of_one_name_are_not_taken_for_each_other(tmp_path, recorded, files, root, says):
    make(tmp_path, *files)
    with pytest.raises(InputError) as error:
        locate(recorded, {}, str(tmp_path / root))
    assert says in str(error.value)


def test_folders_that_cannot_be_entered_are_named(tmp_path):
    make(tmp_path, "a.png")
    at = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(500):  # 5,500 characters: no path leads there
            os.mkdir("a" * 10)
            os.chdir("a" * 10)
        Path("deep.png").write_bytes(b"x")
    finally:
        os.chdir(at)
    with pytest.raises(InputError, match=r"cannot be read|nested too deeply"):
        load_samples("images", "train", None, str(tmp_path))
    shutil.rmtree(tmp_path / ("a" * 10), ignore_errors=True)
