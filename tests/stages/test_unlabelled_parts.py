"""Copies and downloads with questions that have no answers, and a copy over a download."""

import os
import shutil
import zipfile
from pathlib import Path

import pytest
from downloads import (
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
)

from mpa.data.loading import load_samples
from mpa.files.records import InputError, read_json


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
    for odd, why in ((True, "should be a list of text"), (float("nan"), "is nan"), (None, "should be a list of text")):
        write(tmp_path / "a.json", {"data": [{**data[0], "answers": [odd]}]})
        with pytest.raises(InputError, match=why):
            load_samples("textVQA", "train", tmp_path / "a.json", tmp_path, images=False)


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
