"""Result files that evaluate scores without a model: ours, the released code’s, and lmms-eval’s."""

from pathlib import Path

from mpa.answers.normalise import normalise
from mpa.data.loading import labelled, load_samples
from mpa.files import records
from mpa.runs import interchange
from mpa.stages import cli


def read_predictions(args, path: Path) -> list[dict]:
    """A result file's records, with the answers of --annotations if given."""
    samples = None
    if args.annotations:
        samples = load_samples(args.dataset, "test", args.annotations, args.image_root, images=False)
    lines = records.read_json(path)
    if interchange.is_lmms_eval(lines):
        result = interchange.read_lmms_eval(path, lines, samples)
    else:
        result = records.read_records(path, "Eval")
        if samples:
            result = with_answers(path, result, samples)
    if not result:
        raise records.InputError(f"{path}: contains no records.")
    without = [i for i, r in enumerate(result) if not labelled(r.get("answers") or [r["GT_answer"] or ""])]
    if without:
        raise records.InputError(
            f"{path}, record {without[0]}: no answer to score against; {len(without) - 1} more of {len(result)} have "
            "none. Name the annotation file with --annotations."
        )
    return cli.selected(result, args)


def with_answers(path: Path, result: list[dict], samples: list) -> list[dict]:
    """The records, with the answers from the annotation file."""
    known = {s.key: s for s in samples}
    pairs = [(r, known[str(r["question_id"])]) for r in result if str(r["question_id"]) in known]
    for r, s in pairs:  # ids are numbers from 0 in many files
        if normalise(r["GT_question"]) != normalise(s.question):
            raise records.InputError(
                f"{path}: question {r['question_id']!r} is {r['GT_question']!r} in it and {s.question!r} in the annotation file: "
                "these are not the same questions."
            )
    if len(pairs) < len(result):
        raise records.InputError(
            f"{path}: only {len(pairs)} of its {len(result)} questions are in the annotation file. "
            "Is it of another dataset or split?"
        )
    return [r | {k: v for k, v in s.more.items() if k != "image_hash"} | {"answers": s.answers} for r, s in pairs]
