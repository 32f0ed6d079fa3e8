"""A miniature of each official download, and of a Hugging Face copy."""

import hashlib
import json
import shutil
import sys
import zipfile
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import ROOT

from mpa.data import DATASETS
from mpa.data.easyvqa import EASY
from mpa.data.loading import load_samples
from mpa.files.records import read_json

sys.path.insert(0, str(ROOT / "data"))
import prepare

NAMES = ["textVQA", "stVQA", "chartVQA", "okVQA"]
N = 24  # images in a train part; a third as many in a test part


def drawings(part: str):
    """Infinitely many (bytes of an easy-VQA image, [(question, answer), …])."""
    asked = {}
    for question, answer, image in read_json(f"{EASY}/data/{part}/questions.json"):
        asked.setdefault(image, []).append((question, answer))
    for image, of_it in asked.items():
        yield Path(f"{EASY}/data/{part}/images/{image}.png").read_bytes(), of_it


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def zipped(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)


def textvqa(root: Path) -> None:
    """The 0.5.1 JSON files, and the images of both parts in one archive."""
    ids = count()
    for part, name, n in (("train", "train", N), ("test", "val", N // 3)):
        data = []
        for (image, asked), _ in zip(drawings(part), range(n), strict=False):
            image_id = hashlib.md5(image).hexdigest()[:16]
            write(root / f"train_images/{image_id}.jpg", image)
            for question, answer in asked[:2]:
                record = {"question_id": next(ids), "image_id": image_id, "question": question, "set_name": name}
                data.append(record | {"answers": [answer] * 10, "image_classes": ["Clock"]})
        write(root / f"TextVQA_0.5.1_{name}.json", {"dataset_type": name, "dataset_name": "textvqa", "data": data})
    zipped(root / "train_images", root / "train_val_images.zip")


def stvqa(root: Path) -> None:
    """Task 1 of the train part, with all answers, and its image folders."""
    data = []
    for i, ((image, asked), _) in enumerate(zip(drawings("train"), range(N + N // 3), strict=False)):
        folder = ("coco-text", "iiit_text", "vizwiz")[i % 3]
        write(root / f"train/{folder}/img_{i:06}.jpg", image)
        for question, answer in asked[:2]:
            record = {"question_id": len(data), "dataset": folder, "file_name": f"img_{i:06}.jpg", "set_name": "train"}
            data.append(record | {"file_path": f"{folder}/img_{i:06}.jpg", "question": question, "answers": [answer]})
    write(root / "train_task_1.json", {"dataset_name": "st-vqa", "data": data})


def chartqa(root: Path) -> None:
    """The repository's folder. Images with the same name in two parts are different images."""
    for part, n in (("train", N), ("val", 3), ("test", N // 3)):
        by_kind = {"human": [], "augmented": []}
        for i, ((image, asked), _) in enumerate(
            zip(drawings("test" if part == "test" else "train"), range(n), strict=False)
        ):
            write(root / f"ChartQA Dataset/{part}/png/{i}.png", image)
            for question, answer in asked[:2]:
                by_kind["human" if i % 2 else "augmented"].append(
                    {"imgname": f"{i}.png", "query": question, "label": answer}
                )
        for kind, data in by_kind.items():
            write(root / f"ChartQA Dataset/{part}/{part}_{kind}.json", data)


def okvqa(root: Path) -> None:
    """Separate archives of questions and annotations, and COCO's images: one part zipped, the other not."""
    for part, name, n in (("train", "train2014", N), ("test", "val2014", N // 3)):
        questions, annotations = [], []
        for i, ((image, asked), _) in enumerate(zip(drawings(part), range(n), strict=False)):
            write(root / f"{name}/COCO_{name}_{i + 1:012}.jpg", image)
            for j, (question, answer) in enumerate(asked[: 1 + (i == 0)]):
                ids = {"image_id": i + 1, "question_id": 10 * (i + 1) + j}
                questions.append({**ids, "question": question})
                answers = [{"answer_id": k, "answer": answer[:5], "raw_answer": answer} for k in range(10)]
                annotations.append({**ids, "question_type": "one", "answers": answers})
        for file, content in (
            (f"OpenEnded_mscoco_{name}_questions.json", {"questions": questions}),
            (f"mscoco_{name}_annotations.json", {"annotations": annotations}),
        ):
            with zipfile.ZipFile(root / f"{file}.zip", "w") as archive:
                archive.writestr(file, json.dumps(content))
    zipped(root / "train2014", root / "train2014.zip")


LAYOUTS = {"textVQA": textvqa, "stVQA": stvqa, "chartVQA": chartqa, "okVQA": okvqa}


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "image"} for row in rows])
    table = table.append_column("image", pa.array([{"bytes": row["image"], "path": None} for row in rows], image))
    pa.parquet.write_table(table, path)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def prepared_from(source: Path, name: str, tmp_path: Path) -> Path:
    prepare.main([name, "--source", str(source), "--data", str(tmp_path / "data")])
    return tmp_path / "data" / DATASETS[name].preparation.folder


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


def zipped_one(path: Path, files: dict[str, bytes], **how) -> None:
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def samples_of(prepared, name, split):
    where = getattr(DATASETS[name], split)
    return load_samples(name, split, prepared[name] / where.annotations, prepared[name] / where.images)
