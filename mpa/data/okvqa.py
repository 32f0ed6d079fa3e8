"""OK-VQA 1.1 (https://okvqa.allenai.org): questions about COCO photographs that need outside knowledge, ten answers each.

    {"image_id": 51606, "question_id": 516065, "question": "What is the hairstyle of the blond called?",
     "answers": ["pony tail", …], "raw_answers": ["pony tail", …]}

In the official and the released files, "answers" are stemmed ("race") and "raw_answers" are not ("racing"). The
released train file groups questions by image: {"image_id": 51606, "qas": [{…}]}. The official val part is the test set.
"""

from collections.abc import Iterator

from mpa.data.protocol import CopiedRow, Dataset, Preparation, Split, list_of_records, split_by_image
from mpa.files.records import InputError


def records(document) -> Iterator[dict]:
    for record in list_of_records(document):
        for qa in record.get("qas", [record]):
            yield {**qa, "image_id": record["image_id"]}


def reader(prefix: str):
    def read(record: dict) -> tuple:
        more = {"raw_answers": record["raw_answers"]} if "raw_answers" in record else {}
        image = f"{prefix}_{int(record['image_id']):012d}.jpg"
        return record["question_id"], image, record["question"], record["answers"], more

    return read


def official(source) -> dict:
    found = {}
    for part, name in (("train", "train2014"), ("test", "val2014")):
        questions, annotations = f"OpenEnded_mscoco_{name}_questions.json", f"mscoco_{name}_annotations.json"
        both = {
            questions: source.json(questions, "questions"),
            annotations: source.json(annotations, "annotations"),
        }
        if both := source.all_or_none(both):
            answers = {a.get("question_id"): a.get("answers") for a in both[annotations]}
            found[part] = [joined(source, q, answers.get(q.get("question_id"))) for q in both[questions]]
    return found


def joined(source, question: dict, answers) -> dict:
    try:
        record = {name: question[name] for name in ("image_id", "question", "question_id")}
        return record | {"answers": [a["answer"] for a in answers], "raw_answers": [a["raw_answer"] for a in answers]}
    except (KeyError, TypeError) as error:
        which = question.get("question_id")
        raise InputError(
            f"{source.root}: OK-VQA question {which}: no annotation with answers and raw answers for it ({error})."
        ) from None


def from_copy(row: CopiedRow) -> dict:
    question_id = int(row.columns["question_id"])
    image_id = row.columns.get("image_id", question_id // 10)  # a COCO question id is the image id and one more digit
    record = {"image_id": image_id, "question": row.question, "question_id": question_id, "answers": row.answers}
    return record | ({"raw_answers": row.raw_answers} if row.raw_answers is not None else {})


def files(parts: dict, seed: int) -> dict:
    contents = {}
    if "train" in parts:
        by_image = {}
        for r in parts["train"]:
            by_image.setdefault(r["image_id"], []).append({k: v for k, v in r.items() if k != "image_id"})
        contents["okvqa_train_unique_combine.json"] = [{"image_id": i, "qas": qas} for i, qas in by_image.items()]
        train, val = split_by_image(parts["train"], lambda r: r["image_id"], 0.85, seed)
        contents |= {"okvqa_QwenFormat_train.json": train, "okvqa_QwenFormat_eval.json": val}
    if "test" in parts:
        contents["okvqa_val_combine.json"] = parts["test"]
    return contents


DATASET = Dataset(
    name="okVQA",
    task="knowledge",
    metrics=("vqa", "textvqa"),
    train=Split("OKVQA/okvqa_train_unique_combine.json", "OKVQA/train2014", records, reader("COCO_train2014")),
    test=Split("OKVQA/okvqa_val_combine.json", "OKVQA/val2014", records, reader("COCO_val2014")),
    lmms_eval=("ok_vqa_val2014", "exact_match"),
    preparation=Preparation(
        folder="OKVQA",
        download=(
            "OpenEnded_mscoco_{train,val}2014_questions.json, mscoco_{train,val}2014_annotations.json and COCO's images"
        ),
        official=official,
        files=files,
        expected={
            "official train": (9009, 8998),
            "okvqa_train_unique_combine.json": (9009, 8998),
            "okvqa_QwenFormat_train.json": (7659, 7648),
            "okvqa_QwenFormat_eval.json": (1350, 1350),
            "okvqa_val_combine.json": (5046, 5033),
        },
        from_copy=from_copy,
        copy_parts={"val": "test"},
    ),
)
