"""Stage 2, the Parity Identifier: keep what the L-VLM answers consistently and the S-VLM gets wrong.

    python scripts/PI.py --dataset textVQA --model-path-lvlm Qwen/Qwen2-VL-7B-Instruct \\
        --model-path-svlm Qwen/Qwen2-VL-2B-Instruct
    python scripts/PI.py --dataset textVQA --lvlm-json PI_…7B….json --svlm-json PI_…2B….json --out train.json

Reads  the PA file of the same run, or --pa-json. With --lvlm-json and --svlm-json, answers of both
       models made before: then no model is loaded, and the data set is read from the file's name.
       Pictures that have moved are found with --path-map OLD=NEW, or below --image-root.
Writes results/RUN/PI_<lvlm>_<lvlm>_<dataset>.json and PI_<lvlm>_<svlm>_<dataset>.json, the answers, and
       PI_<lvlm>_train_<lvlm>_<svlm>_<dataset>.json, the parity set (paper, section 3.2, equations 1 and 2).
One model is in memory at a time, and the S-VLM is asked only where the L-VLM agrees with itself.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import cli, ranks, records
from mpa.answering import answers, question_request
from mpa.datasets import locate, look_for_pictures
from mpa.engines import ENGINES, Request
from mpa.journal import finished
from mpa.matching import MATCHERS
from mpa.prompts import parse_annotation, train_prompt, with_question_mark
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
        help="of the pictures, kept from training to evaluate on (default: 0.15 for images, which have no test set)",
    )
    args = cli.parse(p, argv, named_by=("svlm_json",))
    if bool(args.lvlm_json) != bool(args.svlm_json):
        p.error("--lvlm-json and --svlm-json go together")
    if args.annotations and args.pa_json:
        p.error("--annotations and --pa-json both name the PA file; give one")
    args.pa_json = args.pa_json or (Path(args.annotations) if args.annotations else None)
    args.match = args.match or ("contains" if args.preset == "released" else "exact")
    args.hold_out = args.hold_out if args.hold_out is not None else 0.15 if args.dataset == "images" else 0.0
    return args


def answers_of_pa(args, pa_json: Path, annotations: list[dict]) -> dict[str, dict] | None:
    """The L-VLM's replies that PA has brought along by id, or None: not all there, or made with other settings."""
    if not records.meta_path(pa_json).exists() or not all(r.get("follow_up") for r in annotations):
        return None
    made = records.read_json(records.meta_path(pa_json)).get("settings", {})
    names = ("preset", "dtype", "max_new_tokens", "min_pixels", "max_pixels")
    ours = {name: getattr(args, name) for name in names} | {"model": cli.model_identity(args, args.model_path_lvlm)}
    same = all(made.get(name) == value for name, value in ours.items())
    # The question must be the one that was put to it: people edit these files.
    same = same and all(
        parse_annotation(r["reply"], args.preset).question == r["predicted_question"] for r in annotations
    )
    return {str(r["question_id"]): r["follow_up"] for r in annotations} if same else None


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


def agrees(record: dict, match) -> bool:
    """Does this model's answer match the annotation's?"""
    return match(record["predictions"], record["PA_answer"])


def identify_parity(lvlm: list[dict], svlm: list[dict], match, preset: str) -> list[dict]:
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
        if match(l["predictions"], s["PA_answer"]) and not agrees(s, match):
            prompt = train_prompt(s["PA_question"], preset)
            parity.append(records.train_record(s["question_id"], s["image_path"], prompt, s["PA_answer"]))
    return parity


def held_out_pictures(consistent: list[dict], share: float) -> set[str]:
    """A share of the pictures, at least one if any, chosen by a hash of their path."""
    pictures = sorted({r["image_path"] for r in consistent}, key=records.digest)
    return set(pictures[: max(1, round(share * len(pictures)))]) if share else set()


def held_out_file(args, lvlm: str) -> Path:
    return records.run_folder(args.run) / f"PI_{lvlm}_heldout_{args.dataset}.json"


def write_held_out(args, lvlm: str, held_out: list[dict]) -> None:
    """Pictures on which the L-VLM agrees with itself, kept from training: a test set of agreement with it."""
    test = [
        {
            "question_id": r["question_id"],
            "image_path": r["image_path"],
            "question": r["PA_question"],
            "answers": [r["PA_answer"]],
        }
        for r in held_out
    ]
    records.write_json(held_out_file(args, lvlm), test)


def usable_annotations(annotations: list[dict], args) -> list[dict]:
    """The PA records that have a question and an answer, their pictures where they lie now.

    The released code's, which have no `reply`, have lost their question mark; under `paper` it is put back.
    """
    usable = []
    for r in annotations:
        if not (r["predicted_question"] and r["predicted_answer"]):
            continue
        question = r["predicted_question"]
        if args.preset == "paper" and "reply" not in r:
            question = with_question_mark(question)
        path = locate(r["image_path"], args.path_map, args.image_root)
        usable.append(r | {"image_path": path, "predicted_question": question})
    return usable


def ask_both(args, lvlm: str, svlm: str, match) -> tuple[list[dict], list[dict], dict]:
    """The L-VLM's answers to all annotations, the S-VLM's where the first half of PI holds, and the funnel so far."""
    if lvlm == svlm:
        raise InputError(f"L-VLM and S-VLM have the same name, {lvlm!r}, and so the same files. Rename a folder.")
    for model_path in (args.model_path_lvlm, args.model_path_svlm):
        cli.check_model(args, model_path)
    name = f"PA_{{lvlm}}_{args.dataset}.json"
    pa_json = args.pa_json or records.find_input(records.run_folder(args.run), name, lvlm, "--pa-json", "PA.sh")
    annotations = cli.chosen(records.read_records(pa_json, "PA"), args)
    usable = usable_annotations(annotations, args)
    if not usable:
        raise InputError(f"{pa_json}: none of its {len(annotations)} records has a question and an answer.")

    look_for_pictures([r["image_path"] for r in usable])
    ready = answers_of_pa(args, pa_json, usable)
    if args.dry_run:
        for who, model_path in (("L-VLM", args.model_path_lvlm), ("S-VLM, at most", args.model_path_svlm)):
            if who != "L-VLM" or ready is None:
                cli.dry_run(args, model_path, [question_of(r, args) for r in usable], f"PI {who}")
        raise SystemExit
    lvlm_answers = answer(args, "L-VLM", args.model_path_lvlm, usable, lvlm, ready)
    consistent = [r for r in lvlm_answers if agrees(r, match)]
    held_out = held_out_pictures(consistent, args.hold_out)
    if held_out and ranks.FIRST:
        write_held_out(args, lvlm, [r for r in consistent if r["image_path"] in held_out])
    ids = {str(r["question_id"]) for r in consistent}
    asked = [r for r in usable if args.answer_all or str(r["question_id"]) in ids]
    asked = [r for r in asked if r["image_path"] not in held_out]
    if not asked:
        kept = f", all held out (--hold-out {args.hold_out:g}): nothing is left to train on" if held_out else ""
        raise InputError(
            f"{pa_json}: the L-VLM agrees with itself on {len(consistent)} of {len(usable)} samples "
            f"(--match {args.match}){kept}. Annotate more pictures."
        )
    choice = {"match": args.match, "answer_all": args.answer_all, "hold_out": args.hold_out}
    svlm_answers = answer(args, "S-VLM", args.model_path_svlm, asked, lvlm, **choice)
    funnel = {"pictures": len(annotations), "parsed": len(usable), "L-consistent": len(consistent)}
    return lvlm_answers, svlm_answers, funnel | ({"held out": len(held_out)} if held_out else {})


def main(argv=None) -> Path:
    args = arguments(argv)
    match = MATCHERS[args.match]
    lvlm, svlm = records.short_name(args.model_path_lvlm), records.short_name(args.model_path_svlm)
    if args.lvlm_json:
        lvlm_answers = records.read_records(args.lvlm_json, "PI")
        svlm_answers = [
            r | {"image_path": locate(r["image_path"], args.path_map, args.image_root)}
            for r in cli.chosen(records.read_records(args.svlm_json, "PI"), args)
        ]
        funnel = {"L-consistent": sum(agrees(r, match) for r in lvlm_answers)}
    else:
        lvlm_answers, svlm_answers, funnel = ask_both(args, lvlm, svlm, match)

    parity = identify_parity(lvlm_answers, svlm_answers, match, args.preset)
    funnel["parity"] = len(parity)
    out = args.out or records.run_folder(args.run) / f"PI_{lvlm}_train_{lvlm}_{svlm}_{args.dataset}.json"
    settings = {name: getattr(args, name) for name in ("preset", "match", "hold_out")}
    if args.lvlm_json:
        settings |= {"lvlm_json": str(args.lvlm_json), "svlm_json": str(args.svlm_json)}
    settings["content"] = records.digest(json.dumps([lvlm_answers, svlm_answers]))
    facts = {"funnel": funnel}
    if not args.lvlm_json:
        facts |= {"model_path_lvlm": args.model_path_lvlm, "model_path_svlm": args.model_path_svlm}
    if args.hold_out and not args.lvlm_json:
        facts["held_out"] = held_out_file(args, lvlm).name
    if not finished(out, settings, args.restart):
        records.write_result(out, parity, settings, **facts)
    print("PI: " + " → ".join(f"{n} {what}" for what, n in funnel.items()))
    left_out = cli.counted(r["left_out"] for r in [*lvlm_answers, *svlm_answers] if r.get("left_out"))
    if left_out:
        print(f"PI: {left_out}")
    if not parity:
        print("PI: the parity set is empty: the S-VLM already answers everything that the L-VLM does.", file=sys.stderr)
    print(f"The parity set is {out}. Next: PL/Qwen2-VL-Finetune/scripts/PL.sh with the same RUN and DATASET.")
    return out


if __name__ == "__main__":
    cli.run(main)
