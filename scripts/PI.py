"""Stage 2, the Parity Identifier: keep what the L-VLM answers consistently and the S-VLM gets wrong.

    python scripts/PI.py --dataset textVQA --model-path-lvlm Qwen/Qwen2-VL-7B-Instruct \\
        --model-path-svlm Qwen/Qwen2-VL-2B-Instruct
    python scripts/PI.py --dataset textVQA --lvlm-json PI_…7B….json --svlm-json PI_…2B….json --out train.json

Reads  the PA file of the same run, or --pa-json. With --lvlm-json and --svlm-json it reads existing answers of
       both models instead; then no model is loaded, and the file name gives the dataset.
       If the images have moved, use --path-map OLD=NEW or --image-root.
Writes results/RUN/PI_<lvlm>_<lvlm>_<dataset>.json and PI_<lvlm>_<svlm>_<dataset>.json, the answers, and
       PI_<lvlm>_train_<lvlm>_<svlm>_<dataset>.json, the parity set (paper, section 3.2, equations 1 and 2).
       With --anchors R also samples that both models answer right; each record's `kind` is "parity" or "anchor".
One model is in memory at a time. The S-VLM is asked only the questions on which the L-VLM agrees with itself.
"""

import json
import os
import sys
from collections import Counter
from itertools import compress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.answers.finish_reasons import why_cut
from mpa.answers.matching import MATCHERS
from mpa.data import DATASETS
from mpa.data.paths import locate, missing_images
from mpa.engines import ENGINES
from mpa.files import distributed, outputs, records
from mpa.files.argument_types import number
from mpa.files.journal import finished
from mpa.files.records import InputError
from mpa.method import anchors, holdout
from mpa.method.parity import ParityRule, capped, funnel_line
from mpa.method.presets import ANCHORED_DEFAULTS, PRESETS
from mpa.method.prompts import holds_mark
from mpa.stages import answer_all, asked_again, cli, given_questions
from mpa.stages.annotations import answers_of_pa, usable_annotations
from mpa.stages.answering import Answers, Question, question_request
from mpa.stages.stage import Model, counted, short_replies

# Beyond the paper, in meta files where they are set: what counts as consistent, and what of it is taken for the train file.
CONSISTENCY = ("min_probability", "blind", "votes")
LIMITS = ("min_pixels", "max_pixels", "max_tiles")
SELECTION = ("max_svlm_probability", "weights", "max_per_question", "max_per_answer")


def arguments(argv=None):
    p = cli.parser(__doc__)
    cli.add_lvlm(p)
    cli.add_svlm(p)
    p.add_argument("--engine-lvlm", choices=ENGINES, help="the L-VLM's engine (default: --engine)")
    p.add_argument("--pa-json", type=Path, metavar="FILE", help="the PA file, like --annotations (default: this run's)")
    p.add_argument(
        "--lvlm-json",
        type=Path,
        metavar="FILE",
        help="the L-VLM's existing answers; needs --svlm-json, and no model runs",
    )
    p.add_argument("--svlm-json", type=Path, metavar="FILE", help="the S-VLM's existing answers")
    p.add_argument(
        "--match",
        choices=MATCHERS,
        help="rule for when two answers agree (default: exact; contains with --preset released)",
    )
    p.add_argument(
        "--answer-all",
        action="store_true",
        help="ask the S-VLM all questions, for statistics; the parity set stays the same",
    )
    p.add_argument(
        "--only-lvlm",
        action="store_true",
        help="stop after the L-VLM's answers, which all S-VLMs of a run share; no S-VLM is asked",
    )
    p.add_argument(
        "--hold-out",
        type=number(0, 0.99, float),
        metavar="SHARE",
        help="share of the images in the held-out set (default: 0.15 for the dataset `images` and --preset anchored, else 0)",
    )
    p.add_argument(
        "--held-out-questions",
        metavar="FILE",
        help="what you would ask about the held-out images, without answers: a JSON list of {image, question}, or `train` for the "
        "questions of the dataset's train split; the guard asks these instead of the L-VLM's own (docs/no-harm.md)",
    )
    p.add_argument(
        "--max-held-out-questions",
        type=number(1),
        default=1000,
        metavar="N",
        help="of more --held-out-questions N at random, by --seed; the L-VLM answers each (default: 1000)",
    )
    asked_again.add_flags(p)
    for what in ("question", "answer"):
        p.add_argument(
            f"--max-per-{what}",
            type=number(1),
            default=0,
            metavar="N",
            help=f"at most N parity samples of one {what}, chosen at random by --seed (default: any number)",
        )
    anchors.add_flags(p)
    args = cli.parse(p, argv, named_by=("svlm_json",))
    if bool(args.lvlm_json) != bool(args.svlm_json):
        p.error("--lvlm-json and --svlm-json must be given together")
    if args.annotations and args.pa_json:
        p.error("--annotations and --pa-json both name the PA file; give one")
    args.pa_json = args.pa_json or (Path(args.annotations) if args.annotations else None)
    args.match = args.match or PRESETS[args.preset].match
    lvlm, svlm = records.short_name(args.model_path_lvlm), records.short_name(args.model_path_svlm)
    if args.only_lvlm and (args.lvlm_json or args.dry_run):
        p.error("--only-lvlm asks the L-VLM; it goes with neither --lvlm-json nor --dry-run")
    if lvlm == svlm and not (args.lvlm_json or args.only_lvlm):
        raise InputError(f"L-VLM and S-VLM have the same name, {lvlm!r}, and would share files. Rename a folder.")
    args.score |= bool(args.max_svlm_probability or args.weights)
    if args.score and not args.lvlm_json and Model(args, args.model_path_svlm).replies_from != "hf":
        p.error(
            "--score, --weights and --max-svlm-probability need --engine hf for the S-VLM; the L-VLM has --engine-lvlm"
        )
    defaults = {"anchors": 0.0, "hold_out": 0.0 if DATASETS[args.dataset].labelled else 0.15}
    for name, value in (defaults | ANCHORED_DEFAULTS if args.anchored else defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.held_out_questions and not args.hold_out:
        p.error("--held-out-questions needs a held-out set: --hold-out 0.15")
    return args


def beyond_paper(args, names) -> dict:
    """Those of these settings that are in use."""
    chosen = {name: getattr(args, name) for name in names if getattr(args, name)}
    return chosen | ({"min_agreement": args.min_agreement} if "votes" in chosen else {})


def questions_of(annotations: list[dict], args) -> list[Question]:
    questions = []
    for r in annotations:
        key, image_path = str(r["question_id"]), r["image_path"]
        request = question_request(args, key, image_path, r["predicted_question"])
        before = {"question_id": r["question_id"], "image_path": image_path}
        before |= {"PA_question": r["predicted_question"], "PA_answer": r["predicted_answer"]}
        questions.append(Question(request, before))
    return questions


def of_lvlm(args, questions: list[Question]) -> Answers:
    """The L-VLM's answers to the questions, in its PI file."""
    path = args.model_path_lvlm
    label = f"PI L-VLM {records.short_name(path)}"
    return Answers(Model(args, path), answers_file(args, path), label, "PI", questions)


def of_svlm(args, questions: list[Question], needed: set[str]) -> Answers:
    """The S-VLM's answers, see `answer_all.of_svlm`."""
    choices = {"match": args.match, "hold_out": args.hold_out} | beyond_paper(args, CONSISTENCY)
    path = args.model_path_svlm
    label = f"PI S-VLM {records.short_name(path)}"
    return answer_all.of_svlm(args, answers_file(args, path), label, questions, needed, **choices)


def answers_file(args, path: str) -> Path:
    name, lvlm = records.short_name(path), records.short_name(args.model_path_lvlm)
    return records.run_folder(args.run) / f"PI_{lvlm}_{name}_{args.dataset}.json"


def held_out_of(args, consistent: list[dict]) -> tuple[set[str], str, list[dict]]:
    """(paths of the held-out images, threshold, test set). The first call of a run decides them, see `mpa.method.holdout`.

    `consistent` are the answers on which the L-VLM agrees with itself. Those about held-out images form the test set.
    """
    file = held_out_file(args)
    hashes = holdout.hashes(r["image_path"] for r in consistent) if args.hold_out or file.exists() else {}
    threshold = holdout.decide(file, hashes, args.hold_out)
    held_out = {path for path, content in hashes.items() if holdout.is_held_out(content, threshold)}
    test = [
        {
            "question_id": r["question_id"],
            "image_path": r["image_path"],
            "question": r["PA_question"],
            "answers": [r["PA_answer"]],
            "image_hash": hashes[r["image_path"]],
        }
        for r in consistent
        if r["image_path"] in held_out
    ]
    return held_out, threshold, test


def write_held_out(args, test: list[dict], threshold: str) -> None:
    if test and distributed.FIRST:
        cli.open_log(args, writes=True)
        holdout.write(held_out_file(args), test, args.hold_out, threshold)


def held_out_file(args) -> Path:
    lvlm = records.short_name(args.model_path_lvlm)
    return holdout.file_of(records.run_folder(args.run), lvlm, args.dataset)


def read_annotations(args) -> tuple[Path, int, list[dict]]:
    """(the PA file, the number of its images, its usable annotations)."""
    lvlm = records.short_name(args.model_path_lvlm)
    name = f"PA_{{lvlm}}_{args.dataset}.json"
    pa_json = args.pa_json or records.find_input(records.run_folder(args.run), name, lvlm, "--pa-json", "PA.sh")
    annotations = cli.selected(records.read_records(pa_json, "PA"), args)
    left_out = Counter()
    usable = usable_annotations(annotations, args, left_out, Model(args, args.model_path_lvlm).marks)
    if left_out:
        print(f"PI: {counted(left_out.elements())}", file=sys.stderr)
    if not usable:
        raise InputError(f"{pa_json}: none of its {len(annotations)} records has a usable question and answer.")
    missing_images([r["image_path"] for r in usable])
    return pa_json, len({r["image_path"] for r in annotations}), usable


def dry_run(args, questions: list[Question], ready: dict) -> None:
    requests = [question.request for question in questions]
    if pending := [request for request in requests if request.key not in ready]:
        Model(args, args.model_path_lvlm).dry_run(pending, "PI L-VLM")
    if args.votes:
        votes = [q.request for q in asked_again.sampled(args, questions)]
        Model(args, args.model_path_lvlm).dry_run(votes, "PI L-VLM, votes")
    if args.blind:
        Model(args, args.model_path_lvlm).dry_run(requests, "PI L-VLM without the image")
    Model(args, args.model_path_svlm).dry_run(requests, "PI S-VLM, at most")
    if args.score:
        scored = [q.request for q in asked_again.with_answers(questions)]
        Model(args, args.model_path_svlm).dry_run(scored, "PI S-VLM, annotated answers, at most")


def check_settings(args, rule: ParityRule, lvlm: Answers, ready: dict[str, dict]) -> None:
    """Raise InputError for what is there with other settings, as far as they are known before the L-VLM has answered."""
    lvlm.check(ready=ready)
    holdout.decide(held_out_file(args), {}, args.hold_out)
    for stage in asked_again.stages(args, lvlm.questions):
        stage.check()
    if not args.only_lvlm:
        of_svlm(args, [], set()).check(content=False)
        check_train_set(args, rule)


def ask_lvlm(args, rule: ParityRule, pa_json: Path, annotations: list[dict]) -> tuple[list[Question], list[dict]]:
    """(all questions, the L-VLM's answers). Both are the same for all S-VLMs."""
    ready, why = answers_of_pa(args, pa_json, annotations)
    questions = questions_of(annotations, args)
    lvlm = of_lvlm(args, questions)
    check_settings(args, rule, lvlm, ready)
    if args.dry_run:
        dry_run(args, questions, ready)
        raise SystemExit
    if not args.only_lvlm:
        Model(args, args.model_path_svlm).check_memory()  # now, not after the L-VLM's hours
    if ready and why:
        print(f"PI: asking the L-VLM {why.total()} questions: {', '.join(f'{n} {w}' for w, n in why.items())}.")
    return questions, lvlm.records(ready)


def see_more(args, rule: ParityRule, questions: list[Question], lvlm_answers: list[dict]) -> None:
    """Ask the L-VLM what --votes and --blind need: all questions, so that these answers are the same for all S-VLMs and matchers."""
    if args.min_probability and all(r.get("logprob") is None for r in lvlm_answers):
        raise InputError(
            f"{answers_file(args, args.model_path_lvlm)}: no answer has a log-probability, so --min-probability cannot be used. "
            "This server or engine does not give it."
        )
    if args.votes:
        rule.see_votes(asked_again.votes(args, questions), args.min_agreement)
    if args.blind:
        rule.see_blind(asked_again.blind(args, questions))


def without_marks(args, questions: list[Question], lvlm_answers: list[dict]) -> tuple[list[Question], list[dict]]:
    """Those without a mark of the S-VLM's prompt format."""
    marks = Model(args, args.model_path_svlm).marks
    kept = [not holds_mark(f"{r['PA_question']}\n{r['PA_answer']}", marks) for r in lvlm_answers]
    if not all(kept):
        print(f"PI: {counted(['a mark of the S-VLM’s prompt format'] * kept.count(False))}", file=sys.stderr)
    return list(compress(questions, kept)), list(compress(lvlm_answers, kept))


def lost_answers(args, lvlm_answers: list[dict]) -> str:
    """Why most of the L-VLM's answers cannot agree with the annotations, where they are cut off or missing; else ""."""
    cut = sum(bool(why_cut(r.get("finish_reason"))) for r in lvlm_answers) if PRESETS[args.preset].checked else 0
    failed = [r["left_out"] for r in lvlm_answers if r.get("left_out")]
    if cut + len(failed) < len(lvlm_answers) / 2:
        return ""
    what = ", ".join(filter(None, [short_replies(lvlm_answers) if cut else "", counted(failed)]))
    return f"Of the L-VLM's {len(lvlm_answers)} answers: {what}. More images would not help."


def ask_both(args, rule: ParityRule) -> tuple[list[dict], list[dict], dict, str]:
    """(L-VLM's answers, S-VLM's answers, funnel, hold-out threshold).

    The L-VLM is asked all questions, the S-VLM those on which the L-VLM agrees with itself.
    """
    pa_json, n, annotations = read_annotations(args)
    given = given_questions.of(args)
    for path in (args.model_path_lvlm, args.model_path_svlm):
        Model(args, path).check()
    questions, lvlm_answers = ask_lvlm(args, rule, pa_json, annotations)
    see_more(args, rule, questions, lvlm_answers)
    questions, lvlm_answers = without_marks(args, questions, lvlm_answers)
    consistent = [r for r in lvlm_answers if rule.consistent(r)]
    held_out, threshold, test = held_out_of(args, consistent)
    ids = {str(r["question_id"]) for r in consistent}
    for_svlm = [q for q in questions if q.request.image_path not in held_out]
    if not (for_svlm if args.answer_all else any(q.request.key in ids for q in for_svlm)):
        kept = f"; all are held out (--hold-out {args.hold_out:g}), so none is left to train on" if held_out else ""
        remedy = "Annotate more images."
        if len(questions) < n / 2:
            remedy = f"Only {len(questions)} of {n} images were annotated: see `reply` and `left_out` in that file."
        raise InputError(
            f"{pa_json}: the L-VLM agrees with itself on {len(consistent)} of {len(questions)} samples "
            f"(--match {args.match}){kept}. {lost_answers(args, lvlm_answers) or remedy}"
        )
    svlm = of_svlm(args, for_svlm, ids)
    further = [asked_again.scored(args, svlm.questions)] if args.score else []
    if given:
        chosen, of_given = given_questions.about(args, given, threshold)
        further.append(of_given)
    for stage in further:
        stage.check()
    svlm_answers = svlm.records() if svlm.check() else None  # nothing is asked, nothing is written
    check_train_set(args, rule, lvlm_answers, svlm_answers)
    write_held_out(args, test, threshold)
    if given:
        given_questions.write(args, given, chosen, of_given)
    if svlm_answers is None:
        svlm_answers = svlm.records()
    if args.score:
        answered = {str(r["question_id"]) for r in svlm_answers}
        rule.see_probabilities(asked_again.scores(args, [q for q in for_svlm if q.request.key in answered]))
    funnel = {"pictures": n, "parsed": len(questions), "L-consistent": len(consistent)}
    return lvlm_answers, svlm_answers, funnel | ({"held out": len(held_out)} if held_out else {}), threshold


def read_both(args, rule: ParityRule) -> tuple[list[dict], list[dict], dict, str]:
    """Like `ask_both`, but from existing answers: --lvlm-json and --svlm-json."""
    lvlm_answers = records.read_records(args.lvlm_json, "PI")
    svlm_answers = cli.selected(records.read_records(args.svlm_json, "PI"), args)
    paths = locate([r["image_path"] for r in svlm_answers], args.path_map, args.image_root)
    svlm_answers = [r | {"image_path": path} for r, path in zip(svlm_answers, paths, strict=True)]
    consistent = {str(r["question_id"]) for r in lvlm_answers if rule.consistent(r)}
    held_out, threshold, test = held_out_of(args, [r for r in svlm_answers if str(r["question_id"]) in consistent])
    svlm_answers = [r for r in svlm_answers if r["image_path"] not in held_out]
    funnel = {"L-consistent": len(consistent)} | ({"held out": len(held_out)} if held_out else {})
    check_train_set(args, rule, lvlm_answers, svlm_answers)
    write_held_out(args, test, threshold)
    return lvlm_answers, svlm_answers, funnel, threshold


def train_set(args, rule: ParityRule, lvlm_answers: list[dict], svlm_answers: list[dict], threshold: str):
    """(train records, the number of parity samples in it and with --anchors that of anchors)."""
    parity, right = rule.answered(lvlm_answers, svlm_answers)
    right = right if args.anchors else []
    if threshold:  # also drop copies of held-out images under other paths
        hashes = holdout.hashes(r["image_path"] for r in [*parity, *right])
        parity, right = (
            [r for r in found if not holdout.is_held_out(hashes[r["image_path"]], threshold)]
            for found in (parity, right)
        )
    found = len(parity)
    parity, right = (capped(r, args.max_per_question, args.max_per_answer, args.seed) for r in (parity, right))
    if len(parity) < found:
        print(f"PI: {found - len(parity)} parity samples are over --max-per-question or --max-per-answer.")
    if not args.anchors:
        return [rule.train_record(r) for r in parity], {"parity": len(parity)}
    chosen = anchors.choose(parity, right, args.anchors, args.anchor_by, args.seed)
    if len(chosen) < round(args.anchors * len(parity)) and args.anchors < anchors.ALL:
        print(f"PI: only {len(chosen)} anchors: both models answer no other samples right.", file=sys.stderr)
    return anchors.train_records(rule, parity, chosen), {"parity": len(parity), "anchors": len(chosen)}


def train_file(args) -> Path:
    lvlm, svlm = records.short_name(args.model_path_lvlm), records.short_name(args.model_path_svlm)
    return args.out or records.run_folder(args.run) / f"PI_{lvlm}_train_{lvlm}_{svlm}_{args.dataset}.json"


def train_settings(args, rule: ParityRule, lvlm_answers: list[dict] | None, svlm_answers: list[dict] | None) -> dict:
    """The settings of the train file; without the answers, those that are known before."""
    settings = {name: getattr(args, name) for name in ("preset", "match", "hold_out")}
    if args.lvlm_json:
        settings |= {"lvlm_json": str(args.lvlm_json), "svlm_json": str(args.svlm_json)}
    if args.anchors:
        settings |= {"anchors": f"{args.anchors:g} by {args.anchor_by}", "seed": args.seed}
    chosen = beyond_paper(args, CONSISTENCY + SELECTION)
    settings |= chosen | ({"seed": args.seed} if chosen else {})
    if lvlm_answers is not None and svlm_answers is not None:
        settings["content"] = selected_from(train_file(args), rule, lvlm_answers, svlm_answers)
    return settings


def selected_from(out: Path, rule: ParityRule, lvlm_answers: list[dict], svlm_answers: list[dict]) -> str:
    """The digest of the answers; of those that decide the parity set alone, where it was selected before --answer-all asked the rest."""
    consistent = {str(r["question_id"]) for r in lvlm_answers if rule.consistent(r)}
    deciding = [r for r in svlm_answers if str(r["question_id"]) in consistent]
    before = records.digest(json.dumps([lvlm_answers, deciding]))
    meta = records.read_json(records.meta_path(out)) if records.meta_path(out).exists() else {}
    there = meta.get("settings", {}).get("content") if isinstance(meta, dict) else None
    return before if there == before else records.digest(json.dumps([lvlm_answers, svlm_answers]))


def check_train_set(
    args, rule: ParityRule, lvlm_answers: list[dict] | None = None, svlm_answers: list[dict] | None = None
) -> bool:
    """Whether the train file is there. Raises InputError if it was made with other settings, or is another command's."""
    outputs.refuse_others(
        train_file(args), "train", [*outputs.inputs_of(args), answers_file(args, args.model_path_lvlm)]
    )
    settings = train_settings(args, rule, lvlm_answers, svlm_answers)
    # It is derived from the answers: from others it is made anew.
    return finished(train_file(args), settings, args.restart, lambda: not args.lvlm_json)


def limits_of(args) -> dict:
    """The limits of an image with which the S-VLM was asked, {} if its answers do not say: what trains on the set needs them."""
    file = records.meta_path(args.svlm_json or answers_file(args, args.model_path_svlm))
    meta = records.read_json(file) if file.exists() else {}
    settings = meta.get("settings") if isinstance(meta, dict) else None
    return {name: settings[name] for name in LIMITS if name in settings} if isinstance(settings, dict) else {}


def write_train_set(args, rule: ParityRule, train: list[dict], lvlm_answers: list, svlm_answers: list, **facts) -> Path:
    out, settings = train_file(args), train_settings(args, rule, lvlm_answers, svlm_answers)
    if not args.lvlm_json:
        facts |= {"model_path_lvlm": args.model_path_lvlm, "model_path_svlm": args.model_path_svlm}
    facts |= limits_of(args)
    if held_out_file(args).exists():
        facts["held_out"] = os.path.relpath(held_out_file(args), out.parent)
    if not check_train_set(args, rule, lvlm_answers, svlm_answers):
        cli.open_log(args, writes=True)
        if out.exists() and not args.restart:
            print(f"PI: {out} was made from other answers; it is made anew.")
        records.write_result(out, train, settings, **facts)
    return out


def main(argv=None) -> Path:
    args = arguments(argv)
    cli.open_log(args)
    rule = ParityRule(args.match, args.preset, **{name: getattr(args, name) for name in ParityRule.OPTIONAL})
    if args.only_lvlm:
        pa_json, _, annotations = read_annotations(args)
        given = given_questions.of(args)
        Model(args, args.model_path_lvlm).check()
        questions, answers = ask_lvlm(args, rule, pa_json, annotations)
        see_more(args, rule, questions, answers)
        if given:  # now, as all S-VLMs of the run share the L-VLM's answers to them
            _, threshold, test = held_out_of(args, [r for r in answers if rule.consistent(r)])
            chosen, of_given = given_questions.about(args, given, threshold)
            of_given.check()
            write_held_out(args, test, threshold)
            given_questions.write(args, given, chosen, of_given)
        return answers_file(args, args.model_path_lvlm)
    if args.lvlm_json:
        names = map(records.short_name, (args.model_path_lvlm, args.model_path_svlm))
        rule = ParityRule.of(vars(args), args.lvlm_json.parent, *names, args.dataset)
    lvlm_answers, svlm_answers, funnel, threshold = (read_both if args.lvlm_json else ask_both)(args, rule)
    train, counts = train_set(args, rule, lvlm_answers, svlm_answers, threshold)
    funnel |= counts
    facts, wrapped = {"funnel": funnel}, {}
    if not PRESETS[args.preset].literal:
        wrapped = {"L-VLM": rule.only_unwrapped(lvlm_answers), "S-VLM": rule.only_unwrapped(svlm_answers)}
        facts["matched_within_words"] = wrapped
    out = write_train_set(args, rule, train, lvlm_answers, svlm_answers, **facts)

    print("PI: " + funnel_line(funnel))
    if any(wrapped.values()):
        what = " and ".join(f"{n} of the {who}'s" for who, n in wrapped.items())
        print(f"PI: answers that match only without the words around them, such as 'The answer is …': {what}.")
    if left_out := counted(r["left_out"] for r in [*lvlm_answers, *svlm_answers] if r.get("left_out")):
        print(f"PI: {left_out}")
    if not counts["parity"]:
        print("PI: the parity set is empty: the S-VLM already answers all that the L-VLM answers.", file=sys.stderr)
    print(f"The parity set is {out}. Next: PL/Qwen2-VL-Finetune/scripts/PL.sh with the same RUN and DATASET.")
    return out


if __name__ == "__main__":
    cli.run(main)
