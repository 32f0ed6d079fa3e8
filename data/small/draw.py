"""Draw the small suite: four benchmarks in the official layouts of TextVQA, ST-VQA, ChartQA and OK-VQA.

    bash scripts/setup.sh reproduce
    python data/small/draw.py                    # some 30 s; experiments/small.yaml does it by itself

Writes data/small/.data/download/, which is laid out as the official downloads, and runs data/prepare.py on each, as for those.
MPA_DATA=data/small/.data then gives the stages the suite in place of the real datasets.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from scenes import SUITE, Question, Scene  # noqa: E402

DATA = HERE / ".data"
SEEDS = {"textVQA": 1_000_000, "stVQA": 2_000_000, "chartVQA": 3_000_000, "okVQA": 4_000_000}
TRAIN, TEST = 600, 500  # images
STVQA = 3300  # images in all; data/prepare.py splits 15 % off as test
AUGMENTED = ("value", "count")  # kinds of chart questions that a template could make; the others are "human"


def scenes(name: str, seed: int, n: int):
    """`n` scenes with their questions in random order."""
    for i in tqdm(range(n), desc=f"draw {name}", disable=None):
        rng = random.Random(seed + i)
        scene = SUITE[name](rng)
        rng.shuffle(scene.questions)
        yield i, scene


def write_json(path: Path, document) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def parts(dataset: str, name: str) -> dict[str, list[tuple[int, Scene]]]:
    train = list(scenes(name, SEEDS[dataset], TRAIN))
    test = [(TRAIN + i, scene) for i, scene in scenes(name, SEEDS[dataset] + TRAIN, TEST)]
    return {"train": train, "test": test}


def asked(part: str, scene: Scene) -> list[Question]:
    """All questions about a train image, and one about a test image."""
    return scene.questions if part == "train" else scene.questions[:1]


def text_vqa(folder: Path) -> None:
    for part, name in parts("textVQA", "signs").items():
        records = []
        for number, scene in name:
            image_id = f"{number:016x}"
            save(scene.image, folder / f"train_images/{image_id}.jpg")
            for i, q in enumerate(asked(part, scene)):
                record = {"question_id": 10 * number + i, "image_id": image_id, "question": q.text}
                records.append(record | {"answers": [q.answer] * 10})
        official = {"train": "train", "test": "val"}[part]
        write_json(folder / f"TextVQA_0.5.1_{official}.json", {"dataset_name": "textvqa", "data": records})


def st_vqa(folder: Path) -> None:
    records = []
    for number, scene in scenes("labels", SEEDS["stVQA"], STVQA):
        file_name = f"label_{number:06d}.jpg"
        save(scene.image, folder / "labels" / file_name)
        q = scene.questions[0]
        record = {"question_id": number, "question": q.text, "answers": [q.answer]}
        records.append(record | {"dataset": "labels", "file_name": file_name, "file_path": f"labels/{file_name}"})
    write_json(folder / "train_task_1.json", {"task_name": "task_1", "data": records})


def chart_qa(folder: Path) -> None:
    for part, found in parts("chartVQA", "chart").items():
        records = {"human": [], "augmented": []}
        for number, scene in found:
            save(scene.image, folder / f"{part}/png/{number}.png")
            for q in asked(part, scene):
                record = {"imgname": f"{number}.png", "query": q.text, "label": q.answer}
                records["augmented" if q.kind in AUGMENTED else "human"].append(record)
        for kind, of_kind in records.items():
            write_json(folder / f"{part}/{part}_{kind}.json", of_kind)


def ok_vqa(folder: Path) -> None:
    for part, found in parts("okVQA", "picture").items():
        official, questions, annotations = {"train": "train2014", "test": "val2014"}[part], [], []
        for number, scene in found:
            save(scene.image, folder / official / f"COCO_{official}_{number:012d}.jpg")
            q, key = scene.questions[0], {"image_id": number, "question_id": 10 * number}
            questions.append(key | {"question": q.text})
            answers = [{"answer_id": n, "answer": q.answer, "raw_answer": q.answer} for n in range(1, 11)]
            annotations.append(key | {"answers": answers})
        write_json(folder / f"OpenEnded_mscoco_{official}_questions.json", {"questions": questions})
        write_json(folder / f"mscoco_{official}_annotations.json", {"annotations": annotations})


BENCHMARKS: dict[str, Callable[[Path], None]] = {
    "textVQA": text_vqa,
    "stVQA": st_vqa,
    "chartVQA": chart_qa,
    "okVQA": ok_vqa,
}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder to write (default: data/small/.data)")
    args = parser.parse_args(argv)
    done = args.data / "finished"
    if done.exists():
        return
    for dataset, draw in BENCHMARKS.items():
        download = args.data / "download" / dataset
        draw(download)
        prepare = [sys.executable, HERE.parent / "prepare.py", dataset, "--source", download, "--data", args.data]
        subprocess.run(list(map(str, prepare)), check=True)
    done.touch()
    print(f"Wrote {args.data}.")


if __name__ == "__main__":
    main()
