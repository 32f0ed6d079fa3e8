"""TextVQA 0.5.1 (https://textvqa.org): questions about text in photographs of Open Images, ten answers each.

    {"question_id": 0, "image_id": "0054c91397f2fe05", "question": "what is the brand of phone?", "answers": ["nokia", …]}

The official test part has no labels, so the official val part is the test set. Training uses one question per image.
In facebook/textvqa, the Hugging Face copy, the test split has ten empty answers per question.
"""

from mpa.data.protocol import CopiedRow, Dataset, Preparation, Split, data_of, one_per_image, split_by_image


def read(record: dict) -> tuple:
    if not isinstance(record["image_id"], str):
        raise TypeError("'image_id' should be text")
    return record["question_id"], f"{record['image_id']}.jpg", record["question"], record["answers"]


def official(source) -> dict:
    train, val = (source.json(f"TextVQA_0.5.1_{part}.json", "data") for part in ("train", "val"))
    return {"train": train, "test": val}


def from_copy(row: CopiedRow) -> dict:
    question_id = row.columns.get("question_id", row.index)
    image_id = row.columns["image_id"]
    return {"question_id": question_id, "image_id": image_id, "question": row.question, "answers": row.answers}


def files(parts: dict, seed: int) -> dict:
    contents = {}
    if "train" in parts:
        unique = one_per_image(parts["train"], lambda r: r["image_id"])
        contents["TextVQA_0.5.1_unique_train.json"] = {"data": unique}
        train, val = split_by_image(unique, lambda r: r["image_id"], 0.85, seed)
        contents |= {"qwenTrainFormat_train.json": train, "qwenTrainFormat_eval.json": val}
    if "test" in parts:
        contents["TextVQA_0.5.1_val.json"] = {"data": parts["test"]}
    return contents


DATASET = Dataset(
    name="textVQA",
    task="text",
    metrics=("textvqa", "vqa"),
    train=Split("TextVQA/TextVQA_0.5.1_unique_train.json", "TextVQA/train_images", data_of, read),
    test=Split("TextVQA/TextVQA_0.5.1_val.json", "TextVQA/train_images", data_of, read),
    lmms_eval=("textvqa_val", "exact_match"),
    preparation=Preparation(
        folder="TextVQA",
        download="TextVQA_0.5.1_train.json, TextVQA_0.5.1_val.json and train_val_images.zip",
        official=official,
        files=files,
        expected={
            "official train": (34602, 21953),
            "TextVQA_0.5.1_unique_train.json": (21953, 21953),
            "qwenTrainFormat_train.json": (18660, 18660),
            "qwenTrainFormat_eval.json": (3293, 3293),
            "TextVQA_0.5.1_val.json": (5000, 3166),
        },
        from_copy=from_copy,
        copy_parts={"val": "test"},
    ),
)
