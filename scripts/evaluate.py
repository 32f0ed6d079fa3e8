"""Stage 4: ask models the human test questions, and score the answers with the dataset's standard metrics.

    python scripts/evaluate.py --dataset textVQA --model-path Qwen/Qwen2-VL-2B-Instruct results/RUN/PL_…
    python scripts/evaluate.py --predictions results/RUN/Eval_…_textVQA.json
    python scripts/evaluate.py --compare results/RUN/Eval_before_textVQA.json results/RUN/Eval_after_textVQA.json

Reads  the dataset's test questions. With --predictions or --compare it reads result files (ours, the released
       code's, or lmms-eval's samples_….jsonl) and scores them without a model.
Writes results/RUN/Eval_<model>_<dataset>.json for each model, with the scores of each question. The meta file has
       the means. With --log-samples it also writes lmms-eval's files to results/RUN/lmms-eval/<model>/.
The dataset `images` has no human labels: its score is agreement with the L-VLM on the held-out set. With --held-out, so it is for
every dataset, and the files are results/RUN/Heldout_<lvlm>_<model>_<dataset>.json: scripts/guard.py compares them.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.analysis.guard import SCORED_AS
from mpa.data import DATASETS
from mpa.data.loading import load_samples
from mpa.engines import ENGINES
from mpa.files import distributed, outputs, records
from mpa.method import holdout
from mpa.runs import comparable, interchange, scoring
from mpa.runs.evaluations import Evaluation, read_meta
from mpa.runs.folders import RunFolder
from mpa.stages import cli
from mpa.stages.answering import question_request
from mpa.stages.predictions import read_predictions
from mpa.stages.scored_answers import ScoredAnswers, evaluation
from mpa.stages.stage import AskedModel, run_files, short_replies


def arguments(argv=None):
    p = cli.parser(__doc__)
    p.add_argument(
        "--model-path",
        nargs="+",
        default=[cli.SVLM],
        metavar="MODEL",
        help=f"models: folders or hub ids (default: {cli.SVLM})",
    )
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--predictions", type=Path, metavar="FILE", help="a result file to score; no model runs")
    existing.add_argument(
        "--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="the gain of AFTER, question by question"
    )
    cli.add_lvlm(p, "; for `images`, the score is agreement with it")
    p.topic("models and memory").add_argument(
        "--engine-lvlm", choices=ENGINES, help="the L-VLM's engine (default: --engine)"
    )
    p.add_argument(
        "--held-out",
        action="store_true",
        help="ask the run's held-out questions (PI's --hold-out) instead of the test's; `images` has no others",
    )
    p.topic("results").add_argument(
        "--log-samples", action="store_true", help="also write lmms-eval's results.json and samples_….jsonl"
    )
    args = cli.parse(p, argv, named_by=("predictions", "compare"))
    if args.quantization and args.model_path_lvlm not in args.model_path:
        p.error("--quantization is for the L-VLM, and none of these models is it; name it with --model-path-lvlm")
    if args.held_out and (args.log_samples or args.predictions or args.compare):
        p.error("--held-out goes with none of --log-samples, --predictions and --compare")
    args.held_out = args.held_out or not DATASETS[args.dataset].labelled
    args.scored_as = SCORED_AS if args.held_out else args.dataset
    if args.out and len(args.model_path) > 1:
        p.error("--out names one file; with several models use --run")
    return args


def lmms_eval_folder(stage: ScoredAnswers, name: str) -> Path:
    return stage.out.parent / "lmms-eval" / name


def report(args, what: str, result: list[dict]) -> dict:
    """Print and return the scores of a result."""
    scores = scoring.score(result, args.scored_as, args.preset)
    agreement = ", held-out questions: agreement with the L-VLM, not accuracy" if args.held_out else ""
    print("\n".join([f"\n{what} on {args.dataset}{agreement}", *scoring.table(scores, args.scored_as)]))
    if lost := scoring.lost(result):
        causes = [f"{n} {why}" for why, n in Counter(r["left_out"] for r in result if r.get("left_out")).most_common()]
        print(f"  {lost} ({', '.join([*causes, *filter(None, [short_replies(result)])])})")
    if few := scoring.few_answers_of(result, args.scored_as):
        print(f"  {few}")
    single = sum(not r.get("answers") for r in result)
    if single:
        print(f"  {single} of {len(result)} records have one answer: scored as if all annotators had given it.")
    return scores


def compare(args) -> dict:
    """Print the gain of the second file over the first, on the questions in both."""
    sides = []
    for path in args.compare:
        meta = read_meta(records.meta_path(path)) if records.meta_path(path).exists() else None
        sides.append(Evaluation.of(path, read_predictions(args, path), args.dataset, args.preset, meta))
    found = comparable.compare(*sides, one_model=False)
    rows = found.by_metric(scoring.metric_names(args.dataset, args.preset))
    print(f"\n{args.compare[1].name} against {args.compare[0].name} on {args.dataset}")
    changed = scoring.changed(found.records, args)
    print("\n".join([*scoring.comparison(rows, args.dataset), *changed, *(f"  {note}" for note in found.notes)]))
    return rows


def main(argv=None) -> None:
    args = arguments(argv)
    if args.predictions or args.compare:
        kind = "scores" if args.predictions else "comparison"
        if args.out:
            outputs.refuse_others(args.out, kind, outputs.inputs_of(args))
        found = (
            compare(args)
            if args.compare
            else report(args, args.predictions.name, read_predictions(args, args.predictions))
        )
        if args.out:
            outputs.write(args.out, records.as_json(found, args.out), kind)
            print(f"Wrote {args.out}.")
        return
    cli.open_log(args)
    annotations = args.annotations
    if args.held_out and not annotations:
        files, stage = run_files(args), "PI.sh with --hold-out 0.15"
        given = files.held_out_given
        annotations = given if given.exists() else files.needed(files.held_out, "--annotations", stage)
    models = [AskedModel(args, path) for path in args.model_path]
    names = [records.short_name(model.path) for model in models]
    if len(set(names)) < len(names):
        raise records.InputError(f"Models with the same name would share a file: {', '.join(names)}. Rename a folder.")
    samples = load_samples(args.scored_as, "test", annotations, args.image_root, args.path_map)
    samples = cli.selected(samples, args)
    for model in models:
        model.check()
    if args.held_out and (folder := records.run_folder(args.run)).is_dir():
        holdout.refuse_trained_on(samples, RunFolder(folder).train_files(args.dataset))
    if args.dry_run:
        requests = [question_request(args, s.key, s.image_path, s.question) for s in samples]
        for name, model in zip(names, models, strict=True):
            model.dry_run(requests, f"evaluate {name}")
        return
    for model in models[1:]:
        model.check_memory()  # now, not after the hours of those before
    stages = [evaluation(args, model, samples) for model in models]
    for stage, name in zip(stages, names, strict=True):
        stage.check()
        if args.log_samples:
            interchange.results_in(lmms_eval_folder(stage, name))
    scores = {}
    for name, stage in zip(names, stages, strict=True):
        result = stage.ask(stage.changed(samples))
        scores[name] = report(args, name, result)
        print(f"Results are in {stage.out}.")
        if args.log_samples and distributed.FIRST:
            folder = lmms_eval_folder(stage, name)
            interchange.write_lmms_eval(folder, result, args.dataset, args.preset, stage.model.path)
            print(f"lmms-eval's files are in {folder}.")
    if len(scores) > 1:
        print("\n".join(["", *scoring.side_by_side(scores, args.scored_as)]))


if __name__ == "__main__":
    cli.run(main)
