"""What prepare refuses or leaves out: broken, malicious or unlabelled downloads."""

import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from downloads import (
    N,
    chartqa,
    drawings,
    listing,
    okvqa,
    parquet,
    prepare,
    prepared_from,
    stvqa,
    textvqa,
    write,
    zipped,
)
from PIL import Image

from mpa.datasets.loading import load_samples
from mpa.records import InputError, read_json

# --- questions without answers


def copy_of_textvqa(
    root: Path, parts=("train", "validation", "test"), unlabelled=("",) * 10, first: bytes | None = None
) -> None:
    """As in facebook/textvqa: the test part has ten empty answers per question."""
    for number, name in enumerate(parts):
        rows = []
        for i, (image, asked) in zip(range(5), drawings("train"), strict=False):
            answers = list(unlabelled) if name == "test" else [asked[0][1]] * 10
            ids = {"question_id": 100 * number + i, "image_id": f"{name}{i}"}
            rows.append(ids | {"question": asked[0][0], "answers": answers, "image": (not i and first) or image})
        parquet(root / f"data/{name}-00000-of-00001.parquet", rows)


def from_copy(name: str, source: Path, data: Path, *flags) -> None:
    prepare.main([name, "--source", str(source), "--source-format", "hf", "--data", str(data), *flags])


@pytest.mark.parametrize("unlabelled", [("",) * 10, (), (" ", "\n"), (None,) * 10])
def test_a_copys_test_part_without_answers_is_left_out_of_ours_and_counted(tmp_path, capsys, unlabelled):
    copy_of_textvqa(tmp_path / "hf", unlabelled=unlabelled)
    from_copy("textVQA", tmp_path / "hf", tmp_path / "data")
    assert "5 questions of the test part have no answers and are skipped; 5 have" in capsys.readouterr().out
    written = read_json(tmp_path / "data/TextVQA/TextVQA_0.5.1_val.json")["data"]
    assert [r["image_id"] for r in written] == [f"validation{i}" for i in range(5)]
    assert sorted(p.stem for p in (tmp_path / "data/TextVQA/train_images").iterdir()) == sorted(
        f"{part}{i}" for part in ("train", "validation") for i in range(5)
    )


def test_a_copy_of_okvqa_with_empty_answers_in_its_annotations(tmp_path, capsys):
    image, asked = next(drawings("train"))
    row = {"question": asked[0][0], "image": image}
    answered, blank = ([{"answer": word, "raw_answer": word} for _ in range(10)] for word in ("race", ""))
    rows = [{**row, "question_id": 15, "answers": answered}, {**row, "question_id": 25, "answers": blank}]
    parquet(tmp_path / "hf/data/val2014-0.parquet", rows)
    from_copy("okVQA", tmp_path / "hf", tmp_path / "data")
    assert [r["question_id"] for r in read_json(tmp_path / "data/OKVQA/okvqa_val_combine.json")] == [15]
    assert "1 questions of the test part have no answers" in capsys.readouterr().out


def test_a_copy_of_chartqa_whose_first_answer_is_blank(tmp_path, capsys):
    rows = [
        {"query": asked[0][0], "label": ["" if i == 1 else "5", "6"], "image": image}
        for i, (image, asked) in zip(range(3), drawings("train"), strict=False)
    ]
    parquet(tmp_path / "hf/data/test-0.parquet", rows)
    from_copy("chartVQA", tmp_path / "hf", tmp_path / "data")
    written = read_json(tmp_path / "data/ChartVQA/test_combined.json")
    assert [r["label"] for r in written] == ["5", "5"]
    assert "1 questions of the test part have no answers" in capsys.readouterr().out
    for record, row in zip(written, rows[::2], strict=True):
        name = f"ChartQA_Dataset/test/png/{record['imgname']}"
        assert (tmp_path / "data/ChartVQA" / name).read_bytes() == row["image"]


def test_two_parts_with_answers_are_not_merged_into_one_test_part(tmp_path):
    copy_of_textvqa(tmp_path / "hf", unlabelled=("a",) * 10)
    with pytest.raises(InputError, match="both a test and a validation split with answers"):
        from_copy("textVQA", tmp_path / "hf", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def blank(answers):
    return [{**a, "answer": "", "raw_answer": ""} if isinstance(a, dict) else "" for a in answers]


@pytest.mark.parametrize(
    ("name", "layout", "file", "field"),
    [
        ("textVQA", textvqa, "TextVQA_0.5.1_val.json", "data"),
        ("stVQA", stvqa, "train_task_1.json", "data"),
        ("chartVQA", chartqa, "ChartQA Dataset/test/test_human.json", None),
        ("okVQA", okvqa, "mscoco_val2014_annotations.json", "annotations"),
    ],
)
def test_questions_of_an_official_download_without_answers_are_left_out_and_counted(
    tmp_path, capsys, name, layout, file, field
):
    layout(tmp_path / "a")
    if name == "okVQA":
        with zipfile.ZipFile(tmp_path / f"a/{file}.zip") as archive:
            archive.extractall(tmp_path / "a")
        (tmp_path / f"a/{file}.zip").unlink()
    document = read_json(tmp_path / "a" / file)
    for record in (document[field] if field else document)[:2]:
        record |= {"label": " "} if name == "chartVQA" else {"answers": blank(record["answers"])}
    write(tmp_path / "a" / file, document)
    prepared_from(tmp_path / "a", name, tmp_path)
    assert "  2 questions of the " in (said := capsys.readouterr().out)
    assert "part have no answers and are skipped" in said
    for written in (tmp_path / "data").rglob("*.json"):
        assert '""' not in written.read_text()


def test_a_test_file_with_blank_answers_is_refused_with_their_count(tmp_path):
    data = [
        {"question_id": i, "image_id": "a", "question": "q", "answers": ["x" if i % 2 else " "] * 10} for i in range(6)
    ]
    write(tmp_path / "a.json", {"data": data})
    with pytest.raises(InputError, match="record 0: no answers to score against; 2 more of 6"):
        load_samples("textVQA", "test", tmp_path / "a.json", tmp_path, images=False)
    for odd in ([True], [float("nan")], [None]):
        write(tmp_path / "a.json", {"data": [{**data[0], "answers": odd}]})
        with pytest.raises(InputError, match="should be a list of text"):
            load_samples("textVQA", "train", tmp_path / "a.json", tmp_path, images=False)


# --- the user's download is never changed


def plain_textvqa(root: Path) -> None:
    textvqa(root)
    with zipfile.ZipFile(root / "train_val_images.zip") as archive:
        archive.extractall(root)
    (root / "train_val_images.zip").unlink()


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_copy_prepared_over_an_official_download_writes_nothing_into_it(tmp_path, flags):
    plain_textvqa(tmp_path / "official")
    folder = prepared_from(tmp_path / "official", "textVQA", tmp_path)
    assert (folder / "train_images").is_symlink()
    before = listing(tmp_path)
    copy_of_textvqa(tmp_path / "hf")
    for parts in (("train", "validation", "test"), ("train",)):
        shutil.rmtree(tmp_path / "hf")
        copy_of_textvqa(tmp_path / "hf", parts)
        with pytest.raises(InputError, match=r"already exists and differs|through a link"):
            from_copy("textVQA", tmp_path / "hf", tmp_path / "data", *flags)
        shutil.rmtree(tmp_path / "hf")
        assert listing(tmp_path) == before
        copy_of_textvqa(tmp_path / "hf", parts)


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


# --- only images, only from below the source


def with_first_image(tmp_path) -> Path:
    """The first image of a download, in a folder that cannot be linked as a whole."""
    stvqa(tmp_path / "a")
    return min((tmp_path / "a/train/coco-text").iterdir())


def refused(tmp_path, capsys, why: str, n: int = 1) -> None:
    """Prepare places all but `n` images and says why."""
    with pytest.raises(SystemExit, match=f"{n} images are missing below"):
        prepared_from(tmp_path / "a", "stVQA", tmp_path)
    assert why in capsys.readouterr().err
    assert len(listing(tmp_path / "data/STVQA/train/data")) == N + N // 3 - n


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
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
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


# --- archives


def zipped_one(path: Path, files: dict[str, bytes], **how) -> None:
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


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


def test_a_copys_rows_that_are_no_images_are_counted_and_a_broken_file_is_named(tmp_path, capsys):
    copy_of_textvqa(tmp_path / "hf", ("validation",), first=b"root:x:0:0:root:/root:/bin/bash")
    file = next((tmp_path / "hf").rglob("*.parquet"))
    whole = file.read_bytes()
    with pytest.raises(SystemExit, match="1 images are missing below"):
        from_copy("textVQA", tmp_path / "hf", tmp_path / "data")
    assert f"1 not placed: cannot be read (not an image, or in an unknown format); the first is {file}, row 0" in (
        capsys.readouterr().err
    )
    for broken in (whole[: len(whole) // 2], whole[:4] + bytes(4000) + whole[4004:]):
        file.write_bytes(broken)
        with pytest.raises(InputError, match="not a complete parquet file"):
            from_copy("textVQA", tmp_path / "hf", tmp_path / "other")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="has no parquet files"):
        from_copy("textVQA", tmp_path / "hf", tmp_path / "other")
    assert not (tmp_path / "other").exists()
