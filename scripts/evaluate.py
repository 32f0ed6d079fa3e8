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
from mpa.answers.metrics import most_common
from mpa.answers.normalise import normalise
from mpa.data import DATASETS
from mpa.data.loading import labelled, load_samples
from mpa.data.protocol import Sample
from mpa.engines import ENGINES
from mpa.files import distributed, outputs, records
from mpa.method import holdout
from mpa.runs import comparable, interchange, scoring
from mpa.runs.evaluations import Evaluation, read_meta
from mpa.runs.folders import RunFolder
from mpa.runs.layout import Cell, RunFiles
from mpa.stages import cli
from mpa.stages.answering import Answers, Question, question_request
from mpa.stages.stage import AskedModel, short_replies


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


class ScoredAnswers(Answers):
    """A model's answers to the test questions, each with its scores. The meta file has the means."""

    def record(self, question: Question, reply: dict) -> dict:
        record = super().record(question, reply)
        names = scoring.metric_names(self.model.args.scored_as, self.preset)
        image = self.prints[question.request.image_path]
        record["image_hash"] = image and image[1]
        return record | {"scores": {name: scoring.values([record], name)[0] for name in names}}

    def changed(self, samples: list[Sample]) -> dict[str, dict]:
        """A reply for each question whose image is another one than the held-out set was made from: it cannot be answered."""
        error = {"error": "the image has changed since PI", "permanent": True}
        known = {s.key: s.more.get("image_hash") for s in samples}
        found = {}
        for request in (q.request for q in self.questions):
            image = self.prints[request.image_path]
            if image and known[request.key] not in (None, image[1]):
                found[request.key] = {"key": request.key, **error}
        return found

    def summary(self, result: list[dict]) -> dict:
        few = scoring.few_answers_of(result, self.model.args.scored_as)
        facts = {"scores": scoring.score(result, self.model.args.scored_as, self.preset)}
        facts |= {"few_answers": few} if few else {}
        return facts | (super().summary(result) if self.model.args.held_out else {})


def files_of(args) -> RunFiles:
    return RunFiles(records.run_folder(args.run), Cell(args.dataset, records.short_name(args.model_path_lvlm)))


def evaluation(args, model: AskedModel, samples: list[Sample]) -> ScoredAnswers:
    name, files = records.short_name(model.path), files_of(args)
    out = args.out or (files.guard_answers(name) if args.held_out else files.evaluation(name))
    questions = []
    for s in samples:
        before = {"question_id": s.question_id, "image_path": s.image_path, "GT_question": s.question}
        before["GT_answer"] = most_common(s.answers)
        request = question_request(args, s.key, s.image_path, s.question)
        more = {name: value for name, value in s.more.items() if name != "image_hash"}
        questions.append(Question(request, before, {"answers": s.answers, **more}))
    return ScoredAnswers(model, out, f"evaluate {name}", "Eval", questions)


def lmms_eval_folder(stage: ScoredAnswers, name: str) -> Path:
    return stage.out.parent / "lmms-eval" / name


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
        files, stage = files_of(args), "PI.sh with --hold-out 0.15"
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
