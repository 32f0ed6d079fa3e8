"""Write and read lmms-eval's result files: results.json and samples_<task>.jsonl.

The format is that of lmms-eval 0.7.3 (evaluation_tracker.py, evaluator.py). Its sample lines have the prompt as `input`
but no `doc`; ours have both, so that they can be scored without the dataset. Its file names begin with the date.
"""

import ast
import contextlib
import json
import math
import re
import sys
from pathlib import Path

from mpa.answers.metrics import most_common
from mpa.data import DATASETS
from mpa.data.loading import is_texts, labelled
from mpa.data.protocol import Sample
from mpa.files import records
from mpa.files.records import InputError
from mpa.method.prompts import answer_prompt
from mpa.runs import scoring

RESULTS = "results.json"
# Its parts, each with an entry for every task.
PARTS = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def write_lmms_eval(folder: Path, result: list[dict], dataset: str, preset: str, model_path: str) -> Path:
    """Write samples_<task>.jsonl and results.json to `folder`. Other tasks in an existing results.json are kept."""
    names = scoring.metric_names(dataset, preset)
    task, headline = DATASETS[dataset].lmms_eval or (dataset.lower(), names[0])
    rows = {name: scoring.values(result, name) for name in names}
    keys = {name: headline if name == names[0] else name for name in names}
    lines = []
    for i, r in enumerate(result):
        answers = scoring.answers_of(r)
        doc = {"question_id": r["question_id"], "image_path": r["image_path"], "question": r["GT_question"]}
        lines.append(
            {
                "doc_id": i,
                "doc": doc | {"answers": answers} | {k: r[k] for k in ("type", "raw_answers") if k in r},
                "target": r["GT_answer"],
                "input": answer_prompt(r["GT_question"], preset),
                "filtered_resps": r["predictions"] or "",
                "doc_hash": records.digest(json.dumps(doc)),
                **{keys[name]: rows[name][i] for name in names},
                "submission": {"question_id": r["question_id"], "answer": r["predictions"] or ""},
            }
        )
    n, scores = len(result), {"alias": task, "samples": len(result)}
    for name, found in rows.items():
        mean = sum(found) / n
        scores[f"{keys[name]},none"] = mean
        spread = math.sqrt(sum((value - mean) ** 2 for value in found) / max(n - 1, 1) / n)
        scores[f"{keys[name]}_stderr,none"] = spread
    of_task = {
        "results": scores,
        "group_subtasks": [],
        "configs": {"task": task, "output_type": "generate_until"},
        "versions": "mpa",
        "n-shot": 0,
        "higher_is_better": {keys[name]: True for name in names},
        "n-samples": {"original": n, "effective": n},
    }
    with records.locked(folder / RESULTS, wait=True):
        document = results_in(folder)
        for key, value in of_task.items():
            document[key] = document.get(key, {}) | {task: value}
        document |= {"model_source": "mpa", "model_name": model_path}
        document["config"] = {"model": "mpa", "model_args": model_path}
        samples = folder / f"samples_{task}.jsonl"
        records.write_text(samples, "".join(records.dumps(line, samples) + "\n" for line in lines))
        records.write_json(folder / RESULTS, document)
    return folder


def results_in(folder: Path) -> dict:
    """The content of results.json in `folder`, {} if there is none. Raises InputError if it is not lmms-eval's."""
    path = folder / RESULTS
    document = records.read_json(path) if path.exists() else {}
    if not isinstance(document, dict) or not all(isinstance(document.get(key, {}), dict) for key in PARTS):
        raise InputError(
            f"{path}: not a results.json of lmms-eval. Move it away and run again; finished answers are kept."
        )
    return document


def dataset_of(file_name: str) -> str | None:
    """The dataset of a samples file, from lmms-eval's task name in the file name; None if the task is unknown.

    >>> dataset_of("20250101_120000_samples_chartqa.jsonl"), dataset_of("samples_textvqa_val_lite.jsonl")
    ('chartVQA', 'textVQA')
    """
    found = re.search(r"(?:^|_)samples_(.+?)(?:_lite)?\.jsonl?$", file_name)
    tasks = {dataset.lmms_eval[0]: name for name, dataset in DATASETS.items() if dataset.lmms_eval}
    return tasks.get(found[1]) if found else None


def is_lmms_eval(lines) -> bool:
    return bool(lines) and isinstance(lines, list) and isinstance(lines[0], dict) and "filtered_resps" in lines[0]


def read_lmms_eval(path: Path, lines: list[dict], samples: list[Sample] | None) -> list[dict]:
    """The lines of a samples_<task>.jsonl as Eval records.

    Answers come from the line's `doc`, else from `samples`, the dataset's test split: by question id if the line has
    one, else by `doc_id`, the position. If the line has a prompt or a target, it must be that question's. Raises
    InputError for a malformed line, a line of another question, or a duplicate.
    """
    by_id = {s.key: s for s in samples or ()}
    result, seen, unchecked = [], {}, 0
    for i, line in enumerate(lines):
        try:
            record, question_id = _shaped(line)
            if record["answers"] is None:
                if not samples:
                    raise ValueError("no answers in it. Name the dataset's test file with --annotations")
                sample, checked = _question_of(line, question_id, samples, by_id)
                unchecked += not checked
                question_id, record["GT_question"] = sample.question_id, sample.question
                record |= {"answers": sample.answers, **sample.more}
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}, line {i + 1}: {error}.") from None
        question_id = line["doc_id"] if question_id is None else question_id
        if str(question_id) in seen:
            raise InputError(
                f"{path}: lines {seen[str(question_id)]} and {i + 1} answer the same question, {question_id!r}."
            )
        seen[str(question_id)] = i + 1
        result.append({"question_id": question_id} | record | {"GT_answer": most_common(record["answers"])})
    if unchecked:
        print(
            f"warning: {path}: {unchecked} lines have no prompt and no target, so their question ids cannot be checked.",
            file=sys.stderr,
        )
    return result


def _shaped(line) -> tuple[dict, int | str | None]:
    """(an Eval record of the line, the question id). `answers` and the id are None if the line has none.

    Raises TypeError if the line is not in lmms-eval's format.
    """

    def field(place: dict, name: str, kinds, expected: str):
        value = place.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise TypeError(f"{name!r} should be {expected}: {json.dumps(value)[:80]}")
        return value

    if not isinstance(line, dict) or "filtered_resps" not in line:
        raise TypeError("not a sample of lmms-eval: no 'filtered_resps'")
    if field(line, "doc_id", int, "a number") is None:
        raise TypeError("not a sample of lmms-eval: no 'doc_id'")
    doc, submission = (field(line, name, dict, "an object") or {} for name in ("doc", "submission"))

    reply = line["filtered_resps"]
    while isinstance(reply, list) and len(reply) == 1:
        (reply,) = reply
    if not isinstance(reply, str):
        raise TypeError(f"'filtered_resps' should be one reply: {json.dumps(reply)[:80]}")

    answers = None
    for name in ("answers", "answer"):
        found = doc.get(name)
        if found is None or answers is not None:
            continue
        answers = [found] if name == "answer" and isinstance(found, str) else found
        if not is_texts(answers):
            raise TypeError(f"{name!r} should be a list of text: {json.dumps(found)[:80]}")
        if not labelled(answers):
            raise TypeError(f"{name!r} holds no answer to score against (a test split without labels?)")
    more = {}
    if kind := field(doc, "type", str, "text"):
        more["type"] = kind.removesuffix("_test")  # lmms-lab/ChartQA's human_test
    if raw := field(doc, "raw_answers", list, "a list of text"):
        if not is_texts(raw):
            raise TypeError(f"'raw_answers' should be a list of text: {json.dumps(raw)[:80]}")
        more["raw_answers"] = raw

    ids = [field(place, "question_id", (int, str), "a number or text") for place in (doc, submission)]
    image = submission.get("image")  # OK-VQA: <question_id>.jpg
    if isinstance(image, str) and image.endswith(".jpg"):
        ids.append(image.removesuffix(".jpg"))
    record = {
        "image_path": field(doc, "image_path", str, "text"),
        "GT_question": field(doc, "question", str, "text"),
        "GT_answer": None,
        "predictions": reply,
        "answers": answers,
    }
    return record | more, next((id for id in ids if id is not None), None)


def _question_of(line: dict, question_id, samples: list[Sample], by_id: dict[str, Sample]) -> tuple[Sample, bool]:
    """(the sample of a line that has no answers, whether the line's prompt or target confirms it).

    Raises ValueError if there is no such sample, if prompt or target belong to another one, or if only the position is
    known.
    """
    where = f"question {question_id!r}" if question_id is not None else f"'doc_id' {line['doc_id']} (a position)"
    if question_id is not None:
        sample = by_id.get(str(question_id))
    else:
        sample = samples[line["doc_id"]] if 0 <= line["doc_id"] < len(samples) else None
    if sample is None:
        raise ValueError(f"no answers in it, and no {where} in the dataset (another dataset or split?)")

    prompt, target, checked = line.get("input"), line.get("target"), False
    remedy = (
        "Name the test file of the same split, in the same order, with --annotations "
        "(data/prepare.py --source-format hf makes it from lmms-eval's copy of the dataset)"
    )
    if isinstance(prompt, str) and prompt.strip():
        checked = True
        if _folded(sample.question) not in _folded(prompt):
            raise ValueError(
                f"no answers in it, and {where} is {sample.question!r} in the dataset, but the prompt differs. {remedy}"
            )
    # If a task names a column that its dataset lacks, the target is the column's name.
    if isinstance(target, str) and _folded(target) not in ("", "answer", "answers", "none"):
        checked = True
        targets = {_folded(t) for t in _listed(target)}
        if targets.isdisjoint(map(_folded, sample.answers + sample.more.get("raw_answers", []))):
            raise ValueError(
                f"no answers in it, and {where} has other answers in the dataset than {target!r}. {remedy}"
            )
    if not checked and question_id is None:
        raise ValueError(f"no answers in it, only {where}, and no prompt or target to identify the question. {remedy}")
    return sample, checked


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _listed(target: str) -> list[str]:
    """The answers in a target: lmms-eval writes a list as its Python repr."""
    if target.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            found = ast.literal_eval(target)
            if isinstance(found, list):
                return [target, *map(str, found)]
    return [target]
