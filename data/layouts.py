"""What `prepare.py` writes for each dataset: the released files' names and content, from the records of its parts."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import sources
from sources import Source

from mpa import records
from mpa.datasets import DATASETS, Sample, one_per_image, samples_from
from mpa.metrics import most_common
from mpa.prompts import train_prompt

# --- what is written: {file: content} from {part: records}


def split_by_image(items: list, image_of: Callable, share: float, seed: int) -> tuple[list, list]:
    """(first, rest): all questions of an image on one side, `share` of the images on the first; in their order."""
    images = list(dict.fromkeys(map(image_of, items)))
    first = set(random.Random(seed).sample(images, int(share * len(images))))
    return [i for i in items if image_of(i) in first], [i for i in items if image_of(i) not in first]


def files_textvqa(parts: dict, seed: int) -> dict:
    files = {}
    if "train" in parts:
        unique = one_per_image(parts["train"], lambda r: r["image_id"])
        files["TextVQA_0.5.1_unique_train.json"] = {"data": unique}
        train, val = split_by_image(unique, lambda r: r["image_id"], 0.85, seed)
        files |= {"qwenTrainFormat_train.json": train, "qwenTrainFormat_eval.json": val}
    if "test" in parts:
        files["TextVQA_0.5.1_val.json"] = {"data": parts["test"]}
    return files


def files_stvqa(parts: dict, seed: int) -> dict:
    unique = one_per_image(parts["all"], lambda r: r["file_path"])
    rest, test = split_by_image(unique, lambda r: r["file_path"], 0.85, seed)
    train, val = split_by_image(rest, lambda r: r["file_path"], 0.85, seed)
    name = "train_task_1_onePerImage"
    return {
        f"{name}_train.json": {"data": rest},
        f"{name}_val.json": {"data": test},
        f"QwenTrainFormat_{name}_train.json": train,
        f"QwenTrainFormat_{name}_eval.json": val,
    }


def files_chartqa(parts: dict, seed: int) -> dict:
    files = {}
    for part, released in (("train", "train_onePerImage.json"), ("val", None), ("test", "test_combined.json")):
        if part not in parts:
            continue
        chosen = parts[part] if part == "test" else one_per_image(parts[part], lambda r: r["imgname"])
        numbered = [{**r, "question_id": i} for i, r in enumerate(chosen)]
        if released:
            files[released] = numbered
        if part != "test":  # the official val split serves as eval, as in the released files
            files[f"train_onePerImage_QwenFormat_{'eval' if part == 'val' else part}.json"] = numbered
    return files


def files_okvqa(parts: dict, seed: int) -> dict:
    files = {}
    if "train" in parts:
        by_image = {}
        for r in parts["train"]:
            by_image.setdefault(r["image_id"], []).append({k: v for k, v in r.items() if k != "image_id"})
        files["okvqa_train_unique_combine.json"] = [{"image_id": i, "qas": qas} for i, qas in by_image.items()]
        train, val = split_by_image(parts["train"], lambda r: r["image_id"], 0.85, seed)
        files |= {"okvqa_QwenFormat_train.json": train, "okvqa_QwenFormat_eval.json": val}
    if "test" in parts:
        files["okvqa_val_combine.json"] = parts["test"]
    return files


def files_easyvqa(parts: dict, seed: int) -> dict:
    train, val = split_by_image(parts["train"], lambda r: r[3], 0.85, seed)
    return {"easyvqa_QwenFormat_train.json": train, "easyvqa_QwenFormat_eval.json": val}


def of_package(source: Source | None) -> dict[str, list]:
    return {"train": DATASETS["easyVQA"].train.records(records.read_json(DATASETS["easyVQA"].train.annotations))}


@dataclass(frozen=True)
class Preparation:
    folder: str
    official: Callable
    files: Callable
    download: str  # what the official site has, for the message when nothing is found
    expected: dict[
        str, tuple[int, int | None]
    ]  # {file: (questions, images)} as paper, README or released files have it


PREPARATIONS = {
    "textVQA": Preparation(
        "TextVQA",
        sources.textvqa,
        files_textvqa,
        "TextVQA_0.5.1_train.json, TextVQA_0.5.1_val.json and train_val_images.zip",
        {
            "official train": (34602, 21953),
            "TextVQA_0.5.1_unique_train.json": (21953, 21953),
            "qwenTrainFormat_train.json": (18660, 18660),
            "qwenTrainFormat_eval.json": (3293, 3293),
            "TextVQA_0.5.1_val.json": (5000, 3166),
        },
    ),
    "stVQA": Preparation(
        "STVQA",
        sources.stvqa,
        files_stvqa,
        "train_task_1.json and the folders of images (coco-text/ …)",
        {"official train": (26074, None), "QwenTrainFormat_train_task_1_onePerImage_eval.json": (2413, 2413)},
    ),
    "chartVQA": Preparation(
        "ChartVQA",
        sources.chartqa,
        files_chartqa,
        "train/, val/ and test/, each with *_human.json, *_augmented.json and png/",
        {
            "official train": (28299, 18317),
            "train_onePerImage.json": (18317, 18317),
            "train_onePerImage_QwenFormat_train.json": (18317, 18317),
            "train_onePerImage_QwenFormat_eval.json": (1056, 1056),
            "test_combined.json": (2500, 1509),
        },
    ),
    "okVQA": Preparation(
        "OKVQA",
        sources.okvqa,
        files_okvqa,
        "OpenEnded_mscoco_{train,val}2014_questions.json, mscoco_{train,val}2014_annotations.json and COCO's images",
        {
            "official train": (9009, 8998),
            "okvqa_train_unique_combine.json": (9009, 8998),
            "okvqa_QwenFormat_train.json": (7659, 7648),
            "okvqa_QwenFormat_eval.json": (1350, 1350),
            "okvqa_val_combine.json": (5046, 5033),
        },
    ),
    "easyVQA": Preparation(
        "EasyVQA",
        of_package,
        files_easyvqa,
        "",
        {"easyvqa_QwenFormat_train.json": (3400, 3400), "easyvqa_QwenFormat_eval.json": (600, 600)},
    ),
}


def split_of(dataset: str, part: str):
    return getattr(DATASETS[dataset], "test" if part == "test" else "train")


def root_of(dataset: str, part: str, data: Path) -> Path:
    """The image root of a part. ChartQA's val part is no split of ours."""
    root = split_of(dataset, part).images
    root = root.replace("/train/", "/val/") if (dataset, part) == ("chartVQA", "val") else root
    return Path(os.path.abspath(data / root))


def samples_of(dataset: str, part: str, items: list, data: Path, where: str) -> list[Sample]:
    """Single records in the released shape, checked as the stages check them."""
    split = replace(split_of(dataset, part), records=iter)
    return list(samples_from(dataset, split, items, root_of(dataset, part, data), where))


def as_train_json(samples: list[Sample], preset: str) -> list[dict]:
    return [
        records.train_record(s.question_id, s.image_path, train_prompt(s.question, preset), most_common(s.answers))
        for s in samples
    ]


def part_of(dataset: str, file: str) -> str:
    if file == Path(DATASETS[dataset].test.annotations).name:
        return "test"
    return "val" if dataset == "chartVQA" and file.endswith("_eval.json") else "train"


def is_train_json(file: str) -> bool:
    return "format" in file.lower()
