"""ST-VQA, task 1 (https://rrc.cvc.uab.es/?ch=11): questions about scene text, one or two answers each, scored by ANLS.

    {"question_id": 0, "file_path": "coco-text/COCO_train2014_000000000081.jpg", "question": …, "answers": ["…"]}

The official test part has no labels, so 15 % of the official train part's images become the test set.
"""

from mpa.data.protocol import CopiedRow, Dataset, Preparation, Split, data_of, one_per_image, split_by_image

NAME = "train_task_1_onePerImage"


def read(record: dict) -> tuple:
    return record["question_id"], record["file_path"], record["question"], record["answers"]


def official(source) -> dict:
    found = source.json("train_task_1.json", "data")
    return {"all": found and [{"file_path": f"{r.get('dataset')}/{r.get('file_name')}", **r} for r in found]}


def from_copy(row: CopiedRow) -> dict:
    question_id = row.columns.get("question_id", row.index)
    path = row.columns.get("file_path") or row.columns.get("path") or row.image_name
    return {"question_id": question_id, "file_path": path, "question": row.question, "answers": row.answers}


def files(parts: dict, seed: int) -> dict:
    unique = one_per_image(parts["all"], lambda r: r["file_path"])
    rest, test = split_by_image(unique, lambda r: r["file_path"], 0.85, seed)
    train, val = split_by_image(rest, lambda r: r["file_path"], 0.85, seed)
    return {
        f"{NAME}_train.json": {"data": rest},
        f"{NAME}_val.json": {"data": test},
        f"QwenTrainFormat_{NAME}_train.json": train,
        f"QwenTrainFormat_{NAME}_eval.json": val,
    }


DATASET = Dataset(
    name="stVQA",
    task="text",
    metrics=("anls", "accuracy"),
    train=Split(f"STVQA/{NAME}_train.json", "STVQA/train/data", data_of, read),
    test=Split(f"STVQA/{NAME}_val.json", "STVQA/train/data", data_of, read),
    lmms_eval=("stvqa", "anls"),
    preparation=Preparation(
        folder="STVQA",
        download="train_task_1.json and the folders of images (coco-text/ …)",
        official=official,
        files=files,
        expected={"official train": (26074, None), f"QwenTrainFormat_{NAME}_eval.json": (2413, 2413)},
        from_copy=from_copy,
        copy_parts={"train": "all", "val": "all", "test": "all"},
    ),
)
