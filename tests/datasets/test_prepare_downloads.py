"""Downloads in several places, moved, incomplete, or with a bad file."""

import shutil

import pytest
from downloads import (
    NAMES,
    N,
    chartqa,
    listing,
    prepare,
    prepared_from,
    stvqa,
    textvqa,
    write,
    zipped,
)

from mpa.files.records import InputError, read_json


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_the_download_says_what_was_expected(tmp_path, name):
    with pytest.raises(InputError, match=f"no files of {name} found. Expected .*train"):
        prepare.main([name, "--source", str(tmp_path), "--data", str(tmp_path / "data")])
    with pytest.raises(InputError, match="no such folder"):
        prepare.main([name, "--source", str(tmp_path / "none")])
    (tmp_path / "x.zip").write_bytes(b"PK but cut off")
    with pytest.raises(InputError, match=r"Not opened: .*x\.zip"):
        prepare.main([name, "--source", str(tmp_path), "--data", str(tmp_path / "data")])


def test_images_in_several_places_come_together_and_the_download_stays_as_it_was(tmp_path):
    """One plain folder, one archive, and one folder elsewhere, behind a link."""
    source = tmp_path / "süß and odd"
    stvqa(source)
    zipped(source / "train/vizwiz", source / "vizwiz.ZIP")
    (source / "elsewhere").mkdir()
    shutil.move(source / "train/iiit_text", tmp_path / "disk")
    (source / "elsewhere/iiit_text").symlink_to(tmp_path / "disk")
    before = listing(source)
    for _ in range(2):
        folder = prepared_from(source, "stVQA", tmp_path)
        assert listing(source) == before
        assert len(listing(folder / "train/data")) == N + N // 3
    prepare.main(["check", "stVQA", "--data", str(tmp_path / "data")])


def test_a_download_that_has_moved_or_lies_in_the_data_folder_itself_is_taken(tmp_path):
    chartqa(tmp_path / "a")
    prepared_from(tmp_path / "a", "chartVQA", tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    prepared_from(tmp_path / "b", "chartVQA", tmp_path)
    prepare.main(["check", "chartVQA", "--data", str(tmp_path / "data")])

    place = tmp_path / "data/TextVQA"
    place.mkdir()
    textvqa(place)
    official = (place / "TextVQA_0.5.1_val.json").read_bytes()
    prepared_from(place, "textVQA", tmp_path)
    assert (place / "TextVQA_0.5.1_val.json").read_bytes() == official
    prepare.main(["check", "textVQA", "--data", str(tmp_path / "data")])


def test_per_image_that_was_cut_off_is_unpacked_again(tmp_path):
    textvqa(tmp_path / "a")
    folder = prepared_from(tmp_path / "a", "textVQA", tmp_path)
    cut = next((folder / "train_images").iterdir())
    cut.write_bytes(b"")
    prepared_from(tmp_path / "a", "textVQA", tmp_path)
    assert cut.stat().st_size > 100


@pytest.mark.parametrize("path", ["../../../secret.jpg", "/etc/secret.jpg", "a/../../../b.jpg"])
def test_per_image_outside_the_image_root_is_refused_before_anything_is_written(tmp_path, path):
    stvqa(tmp_path / "a")
    document = read_json(tmp_path / "a/train_task_1.json")
    document["data"][5]["file_path"] = path
    write(tmp_path / "a/train_task_1.json", document)
    with pytest.raises(InputError, match=r"record 5: image .* lies outside the image root"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
    assert not (tmp_path / "data").exists()


def edited(content: dict, change) -> dict:
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["data"][3].pop("answers"), "record 3: .*no field 'answers'"),
        (lambda d: d["data"][3].update(answers=[{"answer": "x"}]), "record 3: .*should be a list of text"),
        (lambda d: d["data"][3].update(question=None), "record 3: .*'question' should be text"),
        (lambda d: d["data"][3].update(question_id=2), "records 2 and 3 have the same id"),
        (lambda d: d.pop("data"), "has no field 'data'; is it the official file"),
        (lambda d: d.update(data=[1]), "expected a list of records"),
    ],
)
def test_a_bad_official_file_is_named_with_its_record(tmp_path, change, says):
    stvqa(tmp_path / "a")
    write(tmp_path / "a/train_task_1.json", edited(read_json(tmp_path / "a/train_task_1.json"), change))
    with pytest.raises(InputError, match=says):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)


def test_a_part_of_which_half_is_missing_is_named(tmp_path):
    chartqa(tmp_path / "a")
    (tmp_path / "a/ChartQA Dataset/train/train_human.json").unlink()
    with pytest.raises(InputError, match=r"has train/train_augmented.json, but not train/train_human.json"):
        prepared_from(tmp_path / "a", "chartVQA", tmp_path)


def test_missing_images_end_in_an_error_with_the_files_written_and_archives_named(tmp_path):
    stvqa(tmp_path / "a")
    shutil.rmtree(tmp_path / "a/train")
    (tmp_path / "a/images.tar.gz").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"32 images are missing below .* not opened: .*images.tar.gz"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
    assert len(list((tmp_path / "data/STVQA").glob("*.json"))) == 4
