"""What prepare makes of each official download in miniature."""

import json
import lzma
from pathlib import Path

import pytest
from conftest import DATA
from downloads import (
    NAMES,
    N,
    prepare,
    samples_of,
    textvqa,
    write,
)
from PIL import Image

from mpa.data import DATASETS, okvqa
from mpa.data.loading import load_samples
from mpa.files.records import InputError, read_json, read_records

FILES = {
    "textVQA": [
        "TextVQA_0.5.1_unique_train.json",
        "TextVQA_0.5.1_val.json",
        "qwenTrainFormat_eval.json",
        "qwenTrainFormat_train.json",
    ],
    "stVQA": [
        *("QwenTrainFormat_train_task_1_onePerImage_eval.json", "QwenTrainFormat_train_task_1_onePerImage_train.json"),
        *("train_task_1_onePerImage_train.json", "train_task_1_onePerImage_val.json"),
    ],
    "chartVQA": [
        *("test_combined.json", "train_onePerImage.json"),
        *("train_onePerImage_QwenFormat_eval.json", "train_onePerImage_QwenFormat_train.json"),
    ],
    "okVQA": [
        "okvqa_QwenFormat_eval.json",
        "okvqa_QwenFormat_train.json",
        "okvqa_train_unique_combine.json",
        "okvqa_val_combine.json",
    ],
}


def folder_of(prepared, name) -> Path:
    return prepared[name] / DATASETS[name].preparation.folder


@pytest.mark.parametrize("name", NAMES)
def test_the_released_file_names_come_out_and_read_back_with_their_images(prepared, name):
    assert sorted(p.name for p in folder_of(prepared, name).glob("*.json")) == FILES[name]
    train, test = samples_of(prepared, name, "train"), samples_of(prepared, name, "test")
    assert len({s.image_path for s in train}) in (N, int(0.85 * (N + N // 3)))
    assert all(Image.open(s.image_path).size == (64, 64) for s in [*train, *test])
    assert not {s.image_path for s in train} & {s.image_path for s in test}
    if name != "okVQA":
        assert len({s.image_path for s in train}) == len(train)
    for file in (f for f in FILES[name] if "ormat" in f):
        records = read_records(folder_of(prepared, name) / file, "train")
        assert all(Path(r["image"]).exists() for r in records)
        assert all(r["conversations"][0]["value"].endswith("single word or phrase.") for r in records)


@pytest.mark.parametrize("name", ["textVQA", "stVQA", "okVQA"])
def test_the_split_is_by_image_and_85_to_15(prepared, name):
    train, val = (
        read_json(folder_of(prepared, name) / file)
        for part in ("train", "eval")
        for file in FILES[name]
        if "ormat" in file and file.endswith(f"{part}.json")
    )
    images = [{r["image"] for r in part} for part in (train, val)]
    assert not images[0] & images[1]
    assert len(images[0]) == int(0.85 * len(images[0] | images[1]))


def test_okvqa_keeps_the_stemmed_answers_and_the_raw_ones_beside(prepared):
    (sample, *_) = samples_of(prepared, "okVQA", "test")
    assert sample.answers == [a[:5] for a in sample.more["raw_answers"]]
    train = read_json(folder_of(prepared, "okVQA") / "okvqa_train_unique_combine.json")
    assert [len(r["qas"]) for r in train] == [2] + [1] * (N - 1)


def test_chartqa_says_who_asked_and_keeps_the_parts_images_apart(prepared):
    test = samples_of(prepared, "chartVQA", "test")
    assert {s.more["type"] for s in test} == {"human", "augmented"}
    train = samples_of(prepared, "chartVQA", "train")
    assert Path(train[0].image_path).name == Path(test[0].image_path).name
    assert Path(train[0].image_path).read_bytes() != Path(test[0].image_path).read_bytes()


def test_a_second_call_changes_nothing_and_a_file_that_differs_is_not_overwritten(tmp_path, capsys):
    textvqa(tmp_path)
    arguments = ["textVQA", "--source", str(tmp_path), "--data", str(tmp_path / "data")]
    prepare.main(arguments)
    (tmp_path / "data/TextVQA/qwenTrainFormat_eval.json").unlink()  # as if it had been killed
    next((tmp_path / "data/TextVQA/train_images").iterdir()).unlink()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").rglob("*") if p.is_file()}
    prepare.main(arguments)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert len(list((tmp_path / "data/TextVQA").glob("*.json"))) == 4
    assert len(list((tmp_path / "data/TextVQA/train_images").iterdir())) == N + N // 3
    with pytest.raises(InputError, match="already exists and differs"):
        prepare.main([*arguments, "--seed", "1"])
    assert {p: p.stat().st_mtime_ns for p in times} == times


def released_records() -> dict[str, list]:
    """The released annotation files by name, with their ids, and texts that stand for their questions and answers."""
    ids = json.loads(lzma.decompress((DATA / "annotations/released_ids.json.xz").read_bytes()))

    def question(question_id: int) -> dict:
        return {"question_id": question_id, "question": "what?", "answers": ["x"] * 10}

    def chart(i: int, name: str) -> dict:
        return {"imgname": name, "query": "what?", "label": "x", "question_id": i}

    train, val = "okvqa_train_unique_combine", "okvqa_val_combine"  # a question's id is its image's and a digit
    return {
        train: [{"image_id": of_image[0] // 10, "qas": [*map(question, of_image)]} for of_image in ids[train]],
        val: [{"image_id": i // 10, **question(i)} for i in ids[val]],
        **{name: [{"id": i} for i in ids[name]] for name in ("okvqa_QwenFormat_train", "okvqa_QwenFormat_eval")},
        **{
            name: [chart(*r) for r in enumerate(ids[f"chartqa_{name}"])]
            for name in ("train_onePerImage", "test_combined")
        },
    }


def test_one_question_per_image_and_splits_by_image_have_the_released_counts(tmp_path):
    """Of the released annotation files. Which images fall on which side is theirs alone: no seed is published."""
    released = released_records()
    unique = released["okvqa_train_unique_combine"]
    records = [{"image_id": r["image_id"], **qa} for r in unique for qa in r["qas"]]
    files = okvqa.files({"train": records, "test": released["okvqa_val_combine"]}, 0)
    train, val = (files[f"okvqa_QwenFormat_{part}.json"] for part in ("train", "eval"))
    assert {len({r["image_id"] for r in part}) for part in (train, val)} == {7648, 1350}
    assert files["okvqa_train_unique_combine.json"] == unique
    theirs = [released[f"okvqa_QwenFormat_{part}"] for part in ("train", "eval")]
    assert [len(part) for part in theirs] == [7659, 1350]
    assert {r["id"] for part in theirs for r in part} == {r["question_id"] for r in records}
    for name, split in (("okVQA", "train"), ("okVQA", "test"), ("chartVQA", "train"), ("chartVQA", "test")):
        file = Path(getattr(DATASETS[name], split).annotations).name
        write(tmp_path / file, released[file.removesuffix(".json")])
        samples = load_samples(name, split, tmp_path / file, "/", images=False)
        assert prepare.count(samples) == DATASETS[name].preparation.expected[file]
        if file == "test_combined.json":  # which does not say who asked
            assert [s.more["type"] for s in samples] == ["augmented"] * 1250 + ["human"] * 1250


def test_easy_vqa_needs_no_download_and_keeps_the_ids_that_pa_has(tmp_path, capsys):
    prepare.main(["easyVQA", "--data", str(tmp_path)])
    assert "differs" not in capsys.readouterr().out
    ids = {s.question_id: s.image_path for s in load_samples("easyVQA", "train")}
    files = [read_json(tmp_path / f"EasyVQA/easyvqa_QwenFormat_{part}.json") for part in ("train", "eval")]
    assert {r["id"]: r["image"] for part in files for r in part} == ids
