"""Any folder of images, without questions and answers. The train split is all images below it.

    {"question_id": "a/b.png", "image_path": "/images/a/b.png", "question": …, "answers": ["…"]}

The test split is PI's held-out set: the L-VLM's questions and answers. Scores measure agreement with it, not accuracy.
"""

from mpa.data.protocol import Dataset, Split, list_of_records


def read(record: dict) -> tuple:
    known = {name: record[name] for name in ("image_hash",) if name in record}  # the image that the L-VLM has seen
    return record["question_id"], record["image_path"], record["question"], record["answers"], known


DATASET = Dataset(
    name="images",
    task="general",
    metrics=("exact",),
    train=Split("", "images", list_of_records, read),
    test=Split("", "/", list_of_records, read),
    lmms_eval=("images", "exact_match"),
    labelled=False,
)
