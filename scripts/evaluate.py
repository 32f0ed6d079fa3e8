"""Stage 4: ask models the human test questions, and score the answers as the data set's field does.

    python scripts/evaluate.py --dataset textVQA --model-path Qwen/Qwen2-VL-2B-Instruct results/RUN/PL_…
    python scripts/evaluate.py --dataset textVQA --predictions results/RUN/Eval_….json

Reads  the data set's test questions; or, with --predictions, a result file to score without a model.
Writes results/RUN/Eval_<model>_<dataset>.json for each model, its scores in the meta file beside it.
For `images`, which have no human labels, the score is agreement with the L-VLM on pictures held out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import cli, records
from mpa.answering import answers, question_request
from mpa.datasets import DATASETS, load_samples
from mpa.metrics import METRICS, bootstrap_interval, most_common


def arguments(argv=None):
    p = cli.parser(__doc__)
    p.add_argument(
        "--model-path", nargs="+", default=[cli.SVLM], help="models: folders or hub ids (default: %(default)s)"
    )
    p.add_argument("--predictions", type=Path, metavar="FILE", help="an Eval_….json to score; no model runs")
    p.add_argument("--model-path-lvlm", default=cli.LVLM, help="for images: whose held-out answers to compare with")
    return p.parse_args(argv)


def predict(args, model_path: str, samples) -> tuple[Path, list[dict]]:
    """One model's answers to the test questions, in its Eval file with the scores in the meta file."""
    name = records.short_name(model_path)
    out = args.out or records.run_folder(args.run) / f"Eval_{name}_{args.dataset}.json"
    asked = []
    for s in samples:
        request = question_request(args, s.key, s.image_path, s.question)
        fields = {"question_id": s.question_id, "image_path": s.image_path, "GT_question": s.question}
        asked.append((request, fields | {"GT_answer": most_common(s.answers)}, {"answers": s.answers}))

    def facts(result: list[dict]) -> dict:
        return {"scores": score(args.dataset, result, args.preset)}

    return out, answers(args, model_path, out, "Eval", asked, f"evaluate {name}", facts=facts)


def score(dataset: str, result: list[dict], preset: str) -> dict:
    """{metric: {"score", "ci95", "n"}} over a result file's records, the headline first; from 0 to 1.

    A question without a prediction counts as wrong. Files of the released code hold only the most
    common answer, `GT_answer`; they are scored as if all ten people had given it.
    """
    names = DATASETS[dataset].metrics
    names = ("contains", *(n for n in names if n != "contains")) if preset == "released" else names
    scores = {}
    for name in names:
        values = [
            METRICS[name](r["predictions"], r.get("answers") or [r["GT_answer"]] * 10)
            if r["predictions"] is not None
            else 0.0
            for r in result
        ]
        mean = sum(values) / len(values)
        scores[name] = {"score": mean, "ci95": bootstrap_interval(values), "n": len(values)}
    return scores


def report(args, what: str, result: list[dict]) -> None:
    scores = score(args.dataset, result, args.preset)
    print(
        f"\n{what} on {args.dataset}" + (": agreement with the L-VLM, not accuracy" if args.dataset == "images" else "")
    )
    for i, (name, s) in enumerate(scores.items()):
        low, high = s["ci95"]
        mark = "  ← headline" if i == 0 else ""
        print(
            f"  {name:<9} {100 * s['score']:5.1f} %   95 % interval {100 * low:.1f} to {100 * high:.1f}   n = {s['n']}{mark}"
        )
    left_out = cli.counted(r["left_out"] for r in result if r.get("left_out"))
    if left_out:
        print(f"  {left_out}; counted as wrong")
    if not all("answers" in r for r in result):
        print("  This file holds one answer a question: scored as if all people had given it.")


def main(argv=None) -> None:
    args = arguments(argv)
    if args.predictions:
        result = records.read_records(args.predictions, "Eval")
        if not result:
            raise records.InputError(f"{args.predictions}: no records in it.")
        report(args, args.predictions.name, result)
        if args.out:
            records.write_json(args.out, score(args.dataset, result, args.preset))
            print(f"Wrote {args.out}.")
        return
    if args.out and len(args.model_path) > 1:
        raise records.InputError("--out names one file; with several --model-path use --run.")
    annotations = args.annotations
    if args.dataset == "images" and not annotations:
        lvlm = records.short_name(args.model_path_lvlm)
        annotations = records.find_input(
            records.run_folder(args.run), "PI_{lvlm}_heldout_images.json", lvlm, "--annotations", "PI.sh"
        )
    samples = cli.chosen(load_samples(args.dataset, "test", annotations, args.image_root), args)
    names = [records.short_name(path) for path in args.model_path]
    if len(set(names)) < len(names):
        raise records.InputError(f"models with the same name would share a file: {', '.join(names)}. Rename a folder.")
    for model_path in args.model_path:
        out, result = predict(args, model_path, samples)
        report(args, records.short_name(model_path), result)
        print(f"Wrote {out}.")


if __name__ == "__main__":
    cli.run(main)
