"""Stage 2, the Parity Identifier: keep what the L-VLM answers consistently and the S-VLM gets wrong.

    python scripts/PI.py --dataset textVQA --model-path-lvlm Qwen/Qwen2-VL-7B-Instruct \\
        --model-path-svlm Qwen/Qwen2-VL-2B-Instruct
    python scripts/PI.py --dataset textVQA --lvlm-json PI_…7B….json --svlm-json PI_…2B….json --out train.json

Reads  the PA file of the same run, or --pa-json. With --lvlm-json and --svlm-json, answers of both
       models made before: then no model is loaded, and the dataset is read from the file's name.
       Images that have moved are found with --path-map OLD=NEW, or below --image-root.
Writes results/RUN/PI_<lvlm>_<lvlm>_<dataset>.json and PI_<lvlm>_<svlm>_<dataset>.json, the answers, and
       PI_<lvlm>_train_<lvlm>_<svlm>_<dataset>.json, the parity set (paper, section 3.2, equations 1 and 2).
One model is in memory at a time, and the S-VLM is asked only where the L-VLM agrees with itself.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import cli, distributed, holdout, records
from mpa.answering import answers, question_request
from mpa.datasets import DATASETS
from mpa.datasets.paths import locate, look_for_images
from mpa.engines import ENGINES, Request
from mpa.image_files import fingerprints
from mpa.journal import finished
from mpa.matching import MATCHERS, Match
from mpa.models import resolved_dtype
from mpa.prompts import holds_mark, parse_annotation, train_prompt, with_question_mark
from mpa.records import InputError


def arguments(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--model-path-lvlm", default=cli.LVLM, help="the L-VLM: a folder or hub id (default: %(default)s)")
    p.add_argument("--model-path-svlm", default=cli.SVLM, help="the S-VLM: a folder or hub id (default: %(default)s)")
    p.add_argument("--engine-lvlm", choices=ENGINES, help="what runs the L-VLM (default: what runs the S-VLM)")
    p.add_argument(
        "--pa-json", type=Path, metavar="FILE", help="the PA file, as --annotations (default: that of this run)"
    )
    p.add_argument(
        "--lvlm-json", type=Path, metavar="FILE", help="the L-VLM's answers; with --svlm-json, no model runs"
    )
    p.add_argument("--svlm-json", type=Path, metavar="FILE", help="the S-VLM's answers")
    p.add_argument(
        "--match", choices=MATCHERS, help="when two answers agree (default: exact; contains with --preset released)"
    )
    p.add_argument(
        "--answer-all", action="store_true", help="ask the S-VLM also where the L-VLM disagrees with itself: statistics"
    )
    p.add_argument(
        "--hold-out",
        type=cli.number(0, 0.99, float),
        metavar="SHARE",
        help="of the images, kept from training to evaluate on (default: 0.15 for images, which have no test set)",
    )
    args = cli.parse(p, argv, named_by=("svlm_json",))
    if bool(args.lvlm_json) != bool(args.svlm_json):
        p.error("--lvlm-json and --svlm-json go together")
    if args.annotations and args.pa_json:
        p.error("--annotations and --pa-json both name the PA file; give one")
    args.pa_json = args.pa_json or (Path(args.annotations) if args.annotations else None)
    args.match = args.match or ("contains" if args.preset == "released" else "exact")
    args.hold_out = args.hold_out if args.hold_out is not None else 0.15 if not DATASETS[args.dataset].labelled else 0.0
    return args


def answers_of_pa(args, pa_json: Path, annotations: list[dict]) -> tuple[dict[str, dict], Counter]:
    """The L-VLM's replies that PA has brought along by id, and why others must be asked for.

    A reply serves where all that decides it is the same: model, preset, pixels, longest reply, the question, the image, and
    for a model that runs here the dtype.
    """
    meta = records.read_json(records.meta_path(pa_json)) if records.meta_path(pa_json).exists() else {}
    made = meta.get("settings", {}) if isinstance(meta, dict) else {}
    ours = {name: getattr(args, name) for name in ("preset", "max_new_tokens", "min_pixels", "max_pixels")}
    ours["model"] = cli.model_identity(args, args.model_path_lvlm)
    if ENGINES[cli.replier(args, args.model_path_lvlm)].local:
        ours["dtype"] = resolved_dtype(args.dtype, args.device)
    differing = [name for name, value in ours.items() if made.get(name) != value]
    ready, why = {}, Counter()
    for r in annotations:
        follow_up = r.get("follow_up") or {}
        if not made or not r.get("reply"):
            why["PA did not ask them"] += 1
        elif differing:
            why[f"PA asked with another {', '.join(differing)}"] += 1
        elif "text" not in follow_up:
            why["PA did not get an answer" if follow_up else "PA did not ask them"] += 1
        # The question must be the one that was put to it: people edit these files.
        elif parse_annotation(r["reply"], args.preset, keep_refusals=True).question != r["predicted_question"]:
            why["their question was edited"] += 1
        else:
            ready[str(r["question_id"])] = follow_up
    return ready, why


def question_of(annotation: dict, args) -> Request:
    return question_request(
        args, str(annotation["question_id"]), annotation["image_path"], annotation["predicted_question"]
    )


def answer(args, who: str, model_path: str, annotations: list[dict], lvlm: str, ready=None, **choice) -> list[dict]:
    """The answers of one model to the annotated questions, in its PI file.

    `ready` are its replies where they are known already; `choice` says how the questions were chosen.
    """
    name = records.short_name(model_path)
    out = records.run_folder(args.run) / f"PI_{lvlm}_{name}_{args.dataset}.json"
    asked = []
    for r in annotations:
        fields = {field: r[field] for field in ("question_id", "image_path")}
        asked.append(
            (
                question_of(r, args),
                fields | {"PA_question": r["predicted_question"], "PA_answer": r["predicted_answer"]},
                {},
            )
        )
    return answers(args, model_path, out, "PI", asked, f"PI {who} {name}", ready, choice)


def agrees(record: dict, args) -> bool:
    """Does this model's answer match the annotation's? Under `paper` also within words such as "The answer is …"."""
    return Match(args.match, args.preset)(record["predictions"], record["PA_answer"])


def consistent(record: dict, args) -> bool:
    """Does the L-VLM agree with itself? A reply that was cut off or filtered is no answer to agree with."""
    return agrees(record, args) and (args.preset == "released" or not record.get("finish_reason"))


def wrapped(found: list[dict], args) -> int:
    """How many of these answers match only within words or marks around them."""
    match = Match(args.match, args.preset)
    return sum(match.only_unwrapped(r["predictions"], r["PA_answer"]) for r in found)


def identify_parity(lvlm: list[dict], svlm: list[dict], args) -> list[dict]:
    """The parity set D_PI = {(I, Q, A): L-VLM's answer matches A, S-VLM's does not}, as train records.

    Samples come in the S-VLM file's order; those that only one of the files has are not in it. The
    prompt is what the S-VLM is evaluated with, or under `released` the bare question.
    """
    by_id = {str(r["question_id"]): r for r in lvlm}
    parity = []
    for s in svlm:
        l = by_id.get(str(s["question_id"]))  # noqa: E741
        if l is None or s.get("left_out"):
            continue
        # The annotation is the S-VLM file's for both, as in the released code.
        if consistent(l | {"PA_answer": s["PA_answer"]}, args) and not agrees(s, args):
            prompt = train_prompt(s["PA_question"], args.preset)
            parity.append(records.train_record(s["question_id"], s["image_path"], prompt, s["PA_answer"]))
    return parity


def hold_out(args, lvlm: str, found: list[dict]) -> tuple[set[str], str]:
    """(images held out, threshold): decided by the first call of a run, see `mpa.holdout`.

    `found` are the L-VLM's consistent answers. Those about images held out become the test set.
    """
    file = holdout.file_of(records.run_folder(args.run), lvlm, args.dataset)
    of = holdout.hashes(r["image_path"] for r in found) if args.hold_out or file.exists() else {}
    threshold = holdout.decide(file, of, args.hold_out)
    held_out = {path for path, content in of.items() if holdout.is_held_out(content, threshold)}
    test = [
        {
            "question_id": r["question_id"],
            "image_path": r["image_path"],
            "question": r["PA_question"],
            "answers": [r["PA_answer"]],
            "image_hash": of[r["image_path"]],
        }
        for r in found
        if r["image_path"] in held_out
    ]
    if test and distributed.FIRST:
        holdout.write(file, test, args.hold_out, threshold)
    return held_out, threshold


def usable_annotations(annotations: list[dict], args, left_out: Counter | None = None, marks=frozenset()) -> list[dict]:
    """The PA records that have a question and an answer, their images where they lie now.

    `left_out` counts why others are not among them: `marks` of the prompt's format, an image that has changed since.

    The released code's, which have no `reply`, have lost their question mark; under `paper` it is put back.
    """
    usable, left_out = [], Counter() if left_out is None else left_out
    paths = locate([r["image_path"] for r in annotations], args.path_map, args.image_root)
    images = fingerprints(path for r, path in zip(annotations, paths, strict=True) if r.get("image_hash"))
    for r, path in zip(annotations, paths, strict=True):
        question = r["predicted_question"]
        if not (question and r["predicted_answer"]):
            continue
        if args.preset == "paper" and "reply" not in r:
            question = with_question_mark(question)
        if holds_mark(f"{question}\n{r['predicted_answer']}", marks):
            left_out["a mark of the prompt format"] += 1
        elif images.get(path) and images[path][1] != r["image_hash"]:
            left_out["the image has changed since PA"] += 1
        else:
            usable.append(r | {"image_path": path, "predicted_question": question})
    return usable


def ask_both(args, lvlm: str, svlm: str) -> tuple[list[dict], list[dict], dict, str]:
    """The L-VLM's answers to all annotations, the S-VLM's where the first half of PI holds, the funnel so far, and the
    threshold of what is held out."""
    if lvlm == svlm:
        raise InputError(f"L-VLM and S-VLM have the same name, {lvlm!r}, and so the same files. Rename a folder.")
    for model_path in (args.model_path_lvlm, args.model_path_svlm):
        cli.check_model(args, model_path)
    name = f"PA_{{lvlm}}_{args.dataset}.json"
    pa_json = args.pa_json or records.find_input(records.run_folder(args.run), name, lvlm, "--pa-json", "PA.sh")
    annotations = cli.chosen(records.read_records(pa_json, "PA"), args)
    left_out = Counter()
    usable = usable_annotations(
        annotations, args, left_out, cli.marks_of(args, args.model_path_lvlm, args.model_path_svlm)
    )
    if left_out:
        print(f"PI: {cli.counted(left_out.elements())}", file=sys.stderr)
    if not usable:
        raise InputError(
            f"{pa_json}: none of its {len(annotations)} records has a question and an answer that can be used."
        )

    look_for_images([r["image_path"] for r in usable])
    ready, why = answers_of_pa(args, pa_json, usable)
    if args.dry_run:
        to_ask = [question_of(r, args) for r in usable]
        left = [request for request in to_ask if request.key not in ready]
        for who, model_path, requests in (
            ("L-VLM", args.model_path_lvlm, left),
            ("S-VLM, at most", args.model_path_svlm, to_ask),
        ):
            if requests:
                cli.dry_run(args, model_path, requests, f"PI {who}")
        raise SystemExit
    if ready and why:
        print(f"PI: {why.total()} answers of the L-VLM are asked for: {', '.join(f'{n} {w}' for w, n in why.items())}.")
    lvlm_answers = answer(args, "L-VLM", args.model_path_lvlm, usable, lvlm, ready)
    agreed = [r for r in lvlm_answers if consistent(r, args)]
    held_out, threshold = hold_out(args, lvlm, agreed)
    ids = {str(r["question_id"]) for r in agreed}
    asked = [r for r in usable if args.answer_all or str(r["question_id"]) in ids]
    asked = [r for r in asked if r["image_path"] not in held_out]
    if not asked:
        kept = f", all held out (--hold-out {args.hold_out:g}): nothing is left to train on" if held_out else ""
        raise InputError(
            f"{pa_json}: the L-VLM agrees with itself on {len(agreed)} of {len(usable)} samples "
            f"(--match {args.match}){kept}. Annotate more images."
        )
    choice = {"match": args.match, "answer_all": args.answer_all, "hold_out": args.hold_out}
    svlm_answers = answer(args, "S-VLM", args.model_path_svlm, asked, lvlm, **choice)
    funnel = {"pictures": len(annotations), "parsed": len(usable), "L-consistent": len(agreed)}
    return lvlm_answers, svlm_answers, funnel | ({"held out": len(held_out)} if held_out else {}), threshold


def main(argv=None) -> Path:
    args = arguments(argv)
    lvlm, svlm = records.short_name(args.model_path_lvlm), records.short_name(args.model_path_svlm)
    if args.lvlm_json:
        lvlm_answers = records.read_records(args.lvlm_json, "PI")
        svlm_answers = cli.chosen(records.read_records(args.svlm_json, "PI"), args)
        paths = locate([r["image_path"] for r in svlm_answers], args.path_map, args.image_root)
        svlm_answers = [r | {"image_path": path} for r, path in zip(svlm_answers, paths, strict=True)]
        found = {str(r["question_id"]): r for r in lvlm_answers if consistent(r, args)}
        tested = [s for s in svlm_answers if str(s["question_id"]) in found]
        held_out, threshold = hold_out(args, lvlm, tested)
        svlm_answers = [s for s in svlm_answers if s["image_path"] not in held_out]
        funnel = {"L-consistent": len(found)} | ({"held out": len(held_out)} if held_out else {})
    else:
        lvlm_answers, svlm_answers, funnel, threshold = ask_both(args, lvlm, svlm)

    parity = identify_parity(lvlm_answers, svlm_answers, args)
    if threshold:  # no byte of a held-out image, whatever its path
        hashes = holdout.hashes(r["image"] for r in parity)
        parity = [r for r in parity if not holdout.is_held_out(hashes[r["image"]], threshold)]
        holdout.refuse_held_out(parity, hashes, threshold, "the parity set")
    funnel["parity"] = len(parity)
    out = args.out or records.run_folder(args.run) / f"PI_{lvlm}_train_{lvlm}_{svlm}_{args.dataset}.json"
    settings = {name: getattr(args, name) for name in ("preset", "match", "hold_out")}
    if args.lvlm_json:
        settings |= {"lvlm_json": str(args.lvlm_json), "svlm_json": str(args.svlm_json)}
    settings["content"] = records.digest(json.dumps([lvlm_answers, svlm_answers]))
    facts = {"funnel": funnel}
    if not args.lvlm_json:
        facts |= {"model_path_lvlm": args.model_path_lvlm, "model_path_svlm": args.model_path_svlm}
    if threshold:
        held_out_file = holdout.file_of(records.run_folder(args.run), lvlm, args.dataset)
        facts["held_out"] = os.path.relpath(held_out_file, out.parent)
    seen = {who: wrapped(found, args) for who, found in (("L-VLM", lvlm_answers), ("S-VLM", svlm_answers))}
    if args.preset != "released":
        facts["matched_within_words"] = seen
    if not finished(out, settings, args.restart):
        records.write_result(out, parity, settings, **facts)
    print("PI: " + " → ".join(f"{n} {what}" for what, n in funnel.items()))
    if args.preset != "released" and any(seen.values()):
        what = " and ".join(f"{n} of the {who}'s" for who, n in seen.items())
        print(f"PI: answers that match only within words such as 'The answer is …': {what}.")
    left_out = cli.counted(r["left_out"] for r in [*lvlm_answers, *svlm_answers] if r.get("left_out"))
    if left_out:
        print(f"PI: {left_out}")
    if not parity:
        print("PI: the parity set is empty: the S-VLM already answers everything that the L-VLM does.", file=sys.stderr)
    print(f"The parity set is {out}. Next: PL/Qwen2-VL-Finetune/scripts/PL.sh with the same RUN and DATASET.")
    return out


if __name__ == "__main__":
    cli.run(main)
