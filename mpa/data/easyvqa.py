"""easy-VQA (PyPI package easy-vqa), the demo's data: 64 x 64 images of coloured shapes, 4,000 train and 1,000 test.

    ["what is the blue shape?", "rectangle", 0]

A record has no id, so its position in the file is the id. One train question per image is kept.
"""

from importlib.util import find_spec
from pathlib import Path

from mpa.data.protocol import Dataset, Preparation, Split, list_of_records, one_per_image, split_by_image
from mpa.files.records import read_json


def package_folder() -> str:
    """The installed package's folder, without importing it."""
    spec = find_spec("easy_vqa")
    return str(Path(spec.origin).parent) if spec else "<pip install easy-vqa>"


EASY = package_folder()


def records(document) -> list:
    return [(index, *record) for index, record in enumerate(list_of_records(document))]


def unique_records(document) -> list:
    return one_per_image(records(document), lambda record: record[3])


def read(record) -> tuple:
    index, question, answer, image = record
    kind = "yes/no" if answer in ("yes", "no") else "color" if "color" in question else "shape"
    return index, f"{image}.png", question, [answer], {"type": kind}


def official(source) -> dict:
    return {"train": unique_records(read_json(DATASET.train.annotations))}


def files(parts: dict, seed: int) -> dict:
    train, val = split_by_image(parts["train"], lambda r: r[3], 0.85, seed)
    return {"easyvqa_QwenFormat_train.json": train, "easyvqa_QwenFormat_eval.json": val}


DATASET = Dataset(
    name="easyVQA",
    task="general",
    metrics=("exact",),
    train=Split(f"{EASY}/data/train/questions.json", f"{EASY}/data/train/images", unique_records, read),
    test=Split(f"{EASY}/data/test/questions.json", f"{EASY}/data/test/images", records, read),
    lmms_eval=("easyvqa", "exact_match"),
    preparation=Preparation(
        folder="EasyVQA",
        download="",
        official=official,
        files=files,
        expected={"easyvqa_QwenFormat_train.json": (3400, 3400), "easyvqa_QwenFormat_eval.json": (600, 600)},
    ),
)
