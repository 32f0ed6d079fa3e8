"""ChartQA (https://github.com/vis-nlp/ChartQA): questions about charts, one answer each. Half of the test set is human.

    {"question_id": 0, "imgname": "10095.png", "query": "How many bars?", "label": "6", "type": "human"}

The released files have no "type": their test file has the 1,250 augmented questions first, then the 1,250 human ones.
The val part has its own image folder.
"""

from mpa.data.protocol import CopiedRow, Dataset, Preparation, Split, list_of_records, one_per_image


def read(record: dict) -> tuple:
    more = {"type": record["type"]} if "type" in record else {}
    return record["question_id"], record["imgname"], record["query"], [record["label"]], more


def test_records(document) -> list:
    records = list_of_records(document)
    if len(records) != 2500 or "type" in records[0]:
        return records
    return [{**r, "type": "augmented" if i < 1250 else "human"} for i, r in enumerate(records)]


def official(source) -> dict:
    """Per part, the augmented questions first and then the human ones, as in the released files."""
    found = {}
    for part in ("train", "val", "test"):
        names = {kind: f"{part}/{part}_{kind}.json" for kind in ("augmented", "human")}
        by_kind = source.all_or_none({name: source.json(name) for name in names.values()})
        records = [{**r, "type": kind} for kind, name in names.items() for r in by_kind.get(name, ())]
        found[part] = [{**r, "question_id": i} for i, r in enumerate(records)]
    return found


def from_copy(row: CopiedRow) -> dict:
    kind = row.columns.get("type", {0: "human", 1: "augmented"}.get(row.columns.get("human_or_machine"), ""))
    name = row.columns.get("imgname") or row.image_name
    label = row.answers[0]
    return {
        "question_id": row.index,
        "imgname": name,
        "query": row.question,
        "label": label,
        "type": kind.removesuffix("_test"),
    }


def files(parts: dict, seed: int) -> dict:
    contents = {}
    for part, released in (("train", "train_onePerImage.json"), ("val", None), ("test", "test_combined.json")):
        if part not in parts:
            continue
        records = parts[part] if part == "test" else one_per_image(parts[part], lambda r: r["imgname"])
        numbered = [{**r, "question_id": i} for i, r in enumerate(records)]
        if released:
            contents[released] = numbered
        if part != "test":  # the official val part serves as eval, as in the released files
            contents[f"train_onePerImage_QwenFormat_{'eval' if part == 'val' else part}.json"] = numbered
    return contents


DATASET = Dataset(
    name="chartVQA",
    task="chart",
    metrics=("relaxed", "tolerant"),
    train=Split("ChartVQA/train_onePerImage.json", "ChartVQA/ChartQA_Dataset/train/png", list_of_records, read),
    test=Split("ChartVQA/test_combined.json", "ChartVQA/ChartQA_Dataset/test/png", test_records, read),
    lmms_eval=("chartqa", "relaxed_overall"),
    preparation=Preparation(
        folder="ChartVQA",
        download="train/, val/ and test/, each with *_human.json, *_augmented.json and png/",
        official=official,
        files=files,
        expected={
            "official train": (28299, 18317),
            "train_onePerImage.json": (18317, 18317),
            "train_onePerImage_QwenFormat_train.json": (18317, 18317),
            "train_onePerImage_QwenFormat_eval.json": (1056, 1056),
            "test_combined.json": (2500, 1509),
        },
        from_copy=from_copy,
        val_images="ChartVQA/ChartQA_Dataset/val/png",
        image_in_download="{part}/png/{name}",
    ),
)
