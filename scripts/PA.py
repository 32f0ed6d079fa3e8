"""Stage 1, the Pseudo Annotator: the L-VLM writes a question and its answer for each image.

    python scripts/PA.py --dataset textVQA --model-path-lvlm Qwen/Qwen2-VL-7B-Instruct
    python scripts/PA.py --dataset images --image-root ~/Pictures --limit 100

Reads  the dataset's train images. The model never sees their labels.
Writes results/RUN/PA_<lvlm>_<dataset>.json (paper, section 3.1).
If a reply cannot be parsed, the image is asked again; after the last try it is left out, with the reason.
If the stage is stopped or killed, the same command continues it.
With --questions-per-image N the L-VLM writes N questions about each image, each asked to differ from those before; the later ones
have ids such as 17/2.
Your own images: --task selects the kind of question, or --prompt-file gives your own prompt.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.data import DATASETS
from mpa.data.loading import load_samples
from mpa.files.argument_types import number
from mpa.files.earlier_replies import Asked
from mpa.files.image_files import fingerprints
from mpa.method.presets import PRESETS
from mpa.method.prompts import TASK_PROMPTS
from mpa.stages import cli
from mpa.stages.annotate import another, make, own_prompt, request
from mpa.stages.stage import AskedModel, Stage, run_files


def arguments(argv=None):
    p = cli.parser(__doc__)
    cli.add_lvlm(p)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--task", choices=TASK_PROMPTS, help="the kind of question (default: the dataset's task)")
    what.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="your own task prompt; it must ask for the lines Question: and Answer:",
    )
    p.add_argument(
        "--temperature",
        type=number(0, kind=float),
        default=0.0,
        metavar="T",
        help="of the first try's sampling; 0: greedy (default: 0)",
    )
    more = p.topic("annotations")
    more.add_argument(
        "--top-p",
        type=number(0, 1, float, above=True),
        default=0.95,
        help="nucleus sampling: sample from the likeliest tokens with this total probability (default: 0.95)",
    )
    more.add_argument(
        "--tries",
        type=number(0),
        default=2,
        help="retries, sampled, for replies that cannot be parsed (default: 2)",
    )
    more.add_argument(
        "--questions-per-image",
        type=number(1),
        default=1,
        metavar="N",
        help="write N different questions about each image (default: 1, as in the paper)",
    )
    more.add_argument(
        "--keep-refusals",
        action="store_true",
        help='keep annotations whose answer is a refusal, such as "N/A"; they teach the S-VLM to refuse',
    )
    more.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask the L-VLM its own question at once, while the image is encoded; PI reuses these answers",
    )
    args = cli.parse(p, argv)
    args.prompt = (
        own_prompt(args.prompt_file) if args.prompt_file else TASK_PROMPTS[args.task or DATASETS[args.dataset].task]
    )
    return args


def main(argv=None) -> Path:
    args = arguments(argv)
    cli.open_log(args)
    preset, model = PRESETS[args.preset], AskedModel(args, args.model_path_lvlm)
    tries = args.tries if preset.tries is None else preset.tries
    samples = load_samples(args.dataset, "train", args.annotations, args.image_root, args.path_map)
    model.check()
    samples = cli.selected(samples, args)
    images = fingerprints(s.image_path for s in samples)
    out = args.out or run_files(args).pa
    stage = Stage(
        model,
        out,
        "PA",
        [args.prompt, *((s.key, s.image_path, images[s.image_path], s.question, s.answers) for s in samples)],
        Asked(images, [request(s, 0, args, []) for s in samples]),
        temperature=args.temperature,
        top_p=args.top_p,
        tries=tries,
        fused=args.fused,
        keep_refusals=args.keep_refusals,
        **({"questions_per_image": args.questions_per_image} if args.questions_per_image > 1 else {}),
        # Engines sample differently; greedy replies are the same with all engines.
        engine=model.replies_from if args.temperature or tries else "any",
    )
    questions = [another(s, place) for s in samples for place in range(1, args.questions_per_image + 1)]
    if args.dry_run:
        if not stage.finished():
            model.dry_run([request(s, 0, args, []) for s in questions], "PA")
        return out
    with stage.to_do() as to_do:
        if to_do:
            make(args, stage, samples, questions, tries, images)
    return out


if __name__ == "__main__":
    cli.run(main)
