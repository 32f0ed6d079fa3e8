"""Stage 2, the Parity Identifier: keep what the L-VLM answers consistently and the S-VLM gets wrong.

    python scripts/PI.py --dataset textVQA --model-path-lvlm Qwen/Qwen2-VL-7B-Instruct \\
        --model-path-svlm Qwen/Qwen2-VL-2B-Instruct
    python scripts/PI.py --dataset textVQA --lvlm-json PI_…7B….json --svlm-json PI_…2B….json --out train.json

Reads  the PA file of the same run, or --pa-json. With --lvlm-json and --svlm-json, answers of both
       models made before: then no model is loaded.
Writes results/RUN/PI_<lvlm>_<lvlm>_<dataset>.json and PI_<lvlm>_<svlm>_<dataset>.json, the answers, and
       PI_<lvlm>_train_<lvlm>_<svlm>_<dataset>.json, the parity set (paper, section 3.2, equations 1 and 2).
One model is in memory at a time, and the S-VLM is asked only where the L-VLM agrees with itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import cli, records
from mpa.answering import answers, question_request
from mpa.matching import MATCHERS
from mpa.prompts import answer_prompt
from mpa.records import InputError


def arguments(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--model-path-lvlm", default=cli.LVLM, help="the L-VLM: a folder or hub id (default: %(default)s)")
    p.add_argument("--model-path-svlm", default=cli.SVLM, help="the S-VLM: a folder or hub id (default: %(default)s)")
    p.add_argument("--pa-json", type=Path, metavar="FILE", help="the annotations (default: those of this run)")
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
        type=float,
        metavar="SHARE",
        help="of the pictures, kept from training to evaluate on (default: 0.15 for images, which have no test set)",
    )
    args = p.parse_args(argv)
    if bool(args.lvlm_json) != bool(args.svlm_json):
        p.error("--lvlm-json and --svlm-json go together")
    args.match = args.match or ("contains" if args.preset == "released" else "exact")
    args.hold_out = args.hold_out if args.hold_out is not None else 0.15 if args.dataset == "images" else 0.0
    return args


def answers_of_pa(args, pa_json: Path, annotations: list[dict]) -> dict[str, dict] | None:
    """The L-VLM's replies that PA has brought along by id, or None: not all there, or made with other settings."""
    if not records.meta_path(pa_json).exists() or not all(r.get("follow_up") for r in annotations):
        return None
    made = records.read_json(records.meta_path(pa_json))["settings"]
    ours = {name: getattr(args, name) for name in ("preset", "engine", "dtype", "max_new_tokens")}
    ours |= {"model_path_lvlm": args.model_path_lvlm, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
    same = all(made.get(name) == value for name, value in ours.items())
    return {str(r["question_id"]): r["follow_up"] for r in annotations} if same else None


def answer(args, who: str, model_path: str, annotations: list[dict], lvlm: str, ready=None, **choice) -> list[dict]:
    """The answers of one model to the annotated questions, in its PI file.

    `ready` are its replies where they are known already; `choice` says how the questions were chosen.
    """
    name = records.short_name(model_path)
    out = records.run_folder(args.run) / f"PI_{lvlm}_{name}_{args.dataset}.json"
    asked = []
    for r in annotations:
        request = question_request(args, str(r["question_id"]), r["image_path"], r["predicted_question"])
        fields = {field: r[field] for field in ("question_id", "image_path")}
        asked.append(
            (request, fields | {"PA_question": r["predicted_question"], "PA_answer": r["predicted_answer"]}, {})
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
            question = s["PA_question"]
            prompt = question if preset == "released" else answer_prompt(question)
            parity.append(records.train_record(s["question_id"], s["image_path"], prompt, s["PA_answer"]))
    return parity


def is_held_out(record: dict, share: float) -> bool:
    """A share of the pictures, chosen by a hash of their path."""
    return int(records.digest(record["image_path"])[:8], 16) < share * 16**8


def write_held_out(args, lvlm: str, consistent: list[dict]) -> None:
    """The held-out pictures on which the L-VLM agrees with itself: a test set of agreement with it."""
    test = [
        {
            "question_id": r["question_id"],
            "image_path": r["image_path"],
            "question": r["PA_question"],
            "answers": [r["PA_answer"]],
        }
        for r in consistent
        if is_held_out(r, args.hold_out)
    ]
    records.write_json(records.run_folder(args.run) / f"PI_{lvlm}_heldout_{args.dataset}.json", test)


def ask_both(args, lvlm: str, svlm: str, match) -> tuple[list[dict], list[dict], dict]:
    """The L-VLM's answers to all annotations, the S-VLM's where the first half of PI holds, and the funnel so far."""
    if lvlm == svlm:
        raise InputError(f"L-VLM and S-VLM have the same name, {lvlm!r}, and so the same files. Rename a folder.")
    name = f"PA_{{lvlm}}_{args.dataset}.json"
    pa_json = args.pa_json or records.find_input(records.run_folder(args.run), name, lvlm, "--pa-json", "PA.sh")
    annotations = cli.chosen(records.read_records(pa_json, "PA"), args)
    usable = [r for r in annotations if r["predicted_question"] and r["predicted_answer"]]
    if not usable:
        raise InputError(f"{pa_json}: none of its {len(annotations)} records has a question and an answer.")

    ready = answers_of_pa(args, pa_json, usable)
    lvlm_answers = answer(args, "L-VLM", args.model_path_lvlm, usable, lvlm, ready)
    consistent = {str(r["question_id"]) for r in lvlm_answers if agrees(r, match)}
    if args.hold_out:
        write_held_out(args, lvlm, [r for r in lvlm_answers if str(r["question_id"]) in consistent])
    asked = [r for r in usable if args.answer_all or str(r["question_id"]) in consistent]
    asked = [r for r in asked if not is_held_out(r, args.hold_out)]
    if not asked:
        raise InputError(
            f"{pa_json}: the L-VLM agrees with itself on none of {len(usable)} samples (--match {args.match})."
        )
    choice = {"match": args.match, "answer_all": args.answer_all, "hold_out": args.hold_out}
    svlm_answers = answer(args, "S-VLM", args.model_path_svlm, asked, lvlm, **choice)
    return lvlm_answers, svlm_answers, {"pictures": len(annotations), "parsed": len(usable)}


def main(argv=None) -> Path:
    args = arguments(argv)
    match = MATCHERS[args.match]
    lvlm, svlm = records.short_name(args.model_path_lvlm), records.short_name(args.model_path_svlm)
    if args.lvlm_json:
        lvlm_answers = records.read_records(args.lvlm_json, "PI")
        svlm_answers, funnel = records.read_records(args.svlm_json, "PI"), {}
    else:
        lvlm_answers, svlm_answers, funnel = ask_both(args, lvlm, svlm, match)

    parity = identify_parity(lvlm_answers, svlm_answers, match, args.preset)
    funnel |= {"L-consistent": sum(agrees(r, match) for r in lvlm_answers), "parity": len(parity)}
    out = args.out or records.run_folder(args.run) / f"PI_{lvlm}_train_{lvlm}_{svlm}_{args.dataset}.json"
    settings = {name: str(getattr(args, name)) for name in ("preset", "match", "hold_out", "lvlm_json", "svlm_json")}
    records.write_result(out, parity, settings, funnel=funnel)
    print("PI: " + " → ".join(f"{n} {what}" for what, n in funnel.items()))
    left_out = cli.counted(r["left_out"] for r in [*lvlm_answers, *svlm_answers] if r.get("left_out"))
    if left_out:
        print(f"PI: {left_out}")
    if not parity:
        print("PI: the parity set is empty: the S-VLM already answers everything that the L-VLM does.", file=sys.stderr)
    print(f"Wrote {out}. Next: PL/Qwen2-VL-Finetune/scripts/PL.sh with the same RUN and DATASET.")
    return out


if __name__ == "__main__":
    cli.run(main)
