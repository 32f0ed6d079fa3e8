"""Stage 2, the Parity Identifier: keep what the L-VLM answers consistently and the S-VLM gets wrong.

    python scripts/PI.py --dataset textVQA --model-path-lvlm Qwen/Qwen2-VL-7B-Instruct \\
        --model-path-svlm Qwen/Qwen2-VL-2B-Instruct
    python scripts/PI.py --dataset textVQA --lvlm-json PI_…7B….json --svlm-json PI_…2B….json --out train.json

Reads  the PA file of the same run, or --pa-json. With --lvlm-json and --svlm-json it reads existing answers of
       both models instead; then no model is loaded, and the file name gives the dataset.
       If the images have moved, use --path-map OLD=NEW or --image-root.
Writes results/RUN/PI_<lvlm>_<lvlm>_<dataset>.json and PI_<lvlm>_<svlm>_<dataset>.json, the answers;
       PI_<lvlm>_train_<lvlm>_<svlm>_<dataset>.json, the parity set (paper, section 3.2, equations 1 and 2);
       and beside it <its name>.reasons.json: each sample with both answers, and why it is kept or not.
One model is in memory at a time. The S-VLM is asked only the questions on which the L-VLM agrees with itself.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.answers.matching import MATCHERS
from mpa.data import DATASETS
from mpa.engines import ENGINES
from mpa.files import records
from mpa.files.argument_types import number
from mpa.files.records import InputError, funnel_line
from mpa.method import rules
from mpa.method.presets import ANCHORED_DEFAULTS, HOLD_OUT, PRESETS
from mpa.stages import cli
from mpa.stages.identify import Asking, read
from mpa.stages.stage import counted
from mpa.stages.train_set import TrainFile, matched_within_words, select


def arguments(argv=None):
    p = cli.parser(__doc__)
    cli.add_lvlm(p)
    cli.add_svlm(p)
    p.add_argument("--pa-json", type=Path, metavar="FILE", help="the PA file, like --annotations (default: this run's)")
    p.add_argument(
        "--match",
        choices=MATCHERS,
        help="rule for when two answers agree (default: exact; contains with --preset released)",
    )
    p.add_argument(
        "--hold-out",
        type=number(0, 0.99, float),
        metavar="SHARE",
        help=f"share of the images in the held-out set (default: {HOLD_OUT} for the dataset `images` and --preset anchored, else 0)",
    )
    asked = p.topic("what is asked")
    asked.add_argument(
        "--lvlm-json",
        type=Path,
        metavar="FILE",
        help="the L-VLM's existing answers; needs --svlm-json, and no model runs",
    )
    asked.add_argument("--svlm-json", type=Path, metavar="FILE", help="the S-VLM's existing answers")
    asked.add_argument(
        "--answer-all",
        action="store_true",
        help="ask the S-VLM all questions, for statistics; the parity set stays the same",
    )
    asked.add_argument(
        "--only-lvlm",
        action="store_true",
        help="stop after the L-VLM's answers, which all S-VLMs of a run share; no S-VLM is asked",
    )
    asked.add_argument(
        "--held-out-questions",
        metavar="FILE",
        help="what you would ask about the held-out images, without answers: a JSON list of {image, question}, or `train` for the "
        "questions of the dataset's train split; the guard asks these instead of the L-VLM's own (docs/no-harm.md)",
    )
    asked.add_argument(
        "--max-held-out-questions",
        type=number(1),
        default=1000,
        metavar="N",
        help="of more --held-out-questions N at random, by --seed; the L-VLM answers each (default: 1000)",
    )
    p.topic("models and memory").add_argument(
        "--engine-lvlm", choices=ENGINES, help="the L-VLM's engine (default: --engine)"
    )
    rules.add_flags(p.topic("rules beyond the paper (docs/no-harm.md)"))
    args = cli.parse(p, argv, named_by=("svlm_json",))
    if bool(args.lvlm_json) != bool(args.svlm_json):
        p.error("--lvlm-json and --svlm-json must be given together")
    if args.annotations and args.pa_json:
        p.error("--annotations and --pa-json both name the PA file; give one")
    if args.only_lvlm and (args.lvlm_json or args.dry_run):
        p.error("--only-lvlm asks the L-VLM; it goes with neither --lvlm-json nor --dry-run")
    lvlm, svlm = records.short_name(args.model_path_lvlm), records.short_name(args.model_path_svlm)
    if lvlm == svlm and not (args.lvlm_json or args.only_lvlm):
        raise InputError(f"L-VLM and S-VLM have the same name, {lvlm!r}, and would share files. Rename a folder.")
    args.pa_json = args.pa_json or (Path(args.annotations) if args.annotations else None)
    args.match = args.match or PRESETS[args.preset].match
    defaults = {"hold_out": 0.0 if DATASETS[args.dataset].labelled else HOLD_OUT}
    for name, value in (defaults | ANCHORED_DEFAULTS if args.anchored else defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.held_out_questions and not args.hold_out:
        p.error(f"--held-out-questions needs a held-out set: --hold-out {HOLD_OUT}")
    return args


def main(argv=None) -> Path:
    args = arguments(argv)
    cli.open_log(args)
    train = TrainFile(args, rules.settings_of(args))
    if args.lvlm_json:
        samples, judge, funnel = read(args, train)
    else:
        stage = Asking(args, train)  # D_PA, and all checks
        if args.dry_run:
            stage.dry_run()
            raise SystemExit
        lvlm_answers = stage.ask_lvlm()  # Ã
        if args.only_lvlm:
            if stage.given:  # now, as all S-VLMs of the run share the L-VLM's answers to them
                stage.write_held_out(*stage.hold_out(lvlm_answers))
            return stage.lvlm.out
        samples, judge, funnel = stage.ask_svlm(lvlm_answers)  # Â

    samples, selection = select(samples, judge)  # D_PI
    funnel |= {"parity": len(selection.parity)}
    funnel |= {} if selection.anchors is None else {"anchors": len(selection.anchors)}
    within_words = matched_within_words(samples, judge, args.preset)
    facts = {"matched_within_words": within_words} if within_words else {}
    train.write(samples, selection, funnel=funnel, **facts)

    print("PI: " + funnel_line(funnel))
    if any(within_words.values()):
        what = " and ".join(f"{n} of the {who}'s" for who, n in within_words.items())
        print(f"PI: answers that match only without the words around them, such as 'The answer is …': {what}.")
    answers = [r for s in samples for r in (s.lvlm, s.svlm) if r]
    if left_out := counted(r["left_out"] for r in answers if r.get("left_out")):
        print(f"PI: {left_out}")
    if not selection.parity:
        print("PI: the parity set is empty: the S-VLM already answers all that the L-VLM answers.", file=sys.stderr)
    print(f"The parity set is {train.path}. Next: PL/Qwen2-VL-Finetune/scripts/PL.sh with the same RUN and DATASET.")
    return train.path


if __name__ == "__main__":
    cli.run(main)
