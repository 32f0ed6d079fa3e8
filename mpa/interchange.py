"""Result files as other tools write and read them: lmms-eval's results.json and samples_<task>.jsonl.

Shapes as of lmms-eval 0.7 (evaluation_tracker.py, evaluator.py). Its current sample lines have no `doc`;
ours have, as those of older versions, so that they can be scored anywhere.
"""

import json
import math
from pathlib import Path

from mpa import records, scoring
from mpa.datasets import Sample
from mpa.metrics import most_common
from mpa.prompts import answer_prompt
from mpa.records import InputError

TASKS = {  # our data sets by lmms-eval's names for their test parts, and its name for the headline there
    "textVQA": ("textvqa_val", "exact_match"),
    "stVQA": ("stvqa", "anls"),
    "chartVQA": ("chartqa", "relaxed_overall"),
    "okVQA": ("ok_vqa_val2014", "exact_match"),
    "easyVQA": ("easyvqa", "exact_match"),
    "images": ("images", "exact_match"),
}


def write_lmms_eval(folder: Path, result: list[dict], dataset: str, preset: str, model_path: str) -> Path:
    """Write samples_<task>.jsonl and results.json to `folder`; other tasks in a results.json there stay."""
    task, headline = TASKS[dataset]
    names = scoring.metric_names(dataset, preset)
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
    folder.mkdir(parents=True, exist_ok=True)
    samples = folder / f"samples_{task}.jsonl"
    records.write_text(samples, "".join(json.dumps(line) + "\n" for line in lines))

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
    path = folder / "results.json"
    document = records.read_json(path) if path.exists() else {}
    for key, value in of_task.items():
        document[key] = document.get(key, {}) | {task: value}
    document |= {"model_source": "mpa", "model_name": model_path, "config": {"model": "mpa", "model_args": model_path}}
    records.write_json(path, document)
    return folder


def is_lmms_eval(lines) -> bool:
    return bool(lines) and isinstance(lines, list) and isinstance(lines[0], dict) and "filtered_resps" in lines[0]


def read_lmms_eval(path: Path, lines: list[dict], samples: list[Sample] | None) -> list[dict]:
    """The lines of a samples_<task>.jsonl as Eval records.

    Answers come from the line's own `doc`, or else from `samples`, the data set's test part: by the question's
    id where the line has one, else by `doc_id` as the position. Raises InputError where neither will do.
    """
    by_id = {s.key: s for s in samples or ()}
    result = []
    for i, line in enumerate(lines):
        try:
            reply = line["filtered_resps"]
            reply = reply[0] if isinstance(reply, list) else reply
            doc, submission = line.get("doc") or {}, line.get("submission") or {}
            answers = doc.get("answers") or ([doc["answer"]] if "answer" in doc else None)
            if not isinstance(reply, str) or not all(isinstance(answer, str) for answer in answers or ()):
                raise TypeError("text where replies and answers should be")
            question, more = doc.get("question"), {k: doc[k] for k in ("type", "raw_answers") if k in doc}
            if "type" in more:
                more["type"] = more["type"].removesuffix("_test")  # lmms-lab/ChartQA's human_test
            question_id = doc.get("question_id", submission.get("question_id", line["doc_id"]))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path}, line {i + 1}: no sample of lmms-eval: no {error}.") from None
        if not answers:
            sample = by_id.get(str(question_id))
            if sample is None and samples and line["doc_id"] < len(samples):
                sample = samples[line["doc_id"]]
                if line.get("target") not in sample.answers:  # the position is all there is: it must be the same order
                    sample = None
            if sample is None:
                raise InputError(
                    f"{path}, line {i + 1}: no answers in it, and no question {question_id!r} in the data set. "
                    "Name the data set's test file with --annotations."
                )
            question_id, question, answers, more = sample.question_id, sample.question, sample.answers, sample.more
        result.append(
            {
                "question_id": question_id,
                "image_path": doc.get("image_path"),
                "GT_question": question,
                "GT_answer": most_common(answers),
                "predictions": reply,
                "answers": answers,
                **more,
            }
        )
    return result
