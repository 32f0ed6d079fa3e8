"""What a run gained: the funnel, a few pictures in words, and the table, from its result files alone.

    python scripts/tables.py --dataset easyVQA --lvlm data/mini/teacher --svlm data/mini/student results/demo
    python scripts/tables.py … results/demo results/demo-1 results/demo-2      # mean and spread over runs

Reads  the result and meta files of each run folder.
Writes summary.json in each: {"rows": {row: {"accuracy", "n", "ci95", "train_samples"}}, "gain", "funnel",
       "seconds"}; accuracies from 0 to 1, by the data set's headline metric.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import cli, records
from mpa.datasets import DATASETS
from mpa.metrics import METRICS, bootstrap_interval

ROWS = {
    "base": "S-VLM before",
    "all_pseudo": "all pseudo labels, without PI",
    "random_pseudo": "random pseudo labels, as many",
    "mpa": "MPA",
    "human_n": "human labels, as many",
    "human": "human labels, all",
    "lvlm": "L-VLM",
}


class Run:
    """The files of one run folder, for one data set and one pair of models."""

    def __init__(self, folder: Path, dataset: str, lvlm: str, svlm: str):
        self.folder, self.dataset, self.lvlm, self.svlm = folder, dataset, lvlm, svlm
        self.pa = folder / f"PA_{lvlm}_{dataset}.json"
        self.train = folder / f"PI_{lvlm}_train_{lvlm}_{svlm}_{dataset}.json"

    def answers(self, model: str) -> Path:
        return self.folder / f"PI_{self.lvlm}_{model}_{self.dataset}.json"

    def model(self, row: str) -> str:
        """The short name of the model whose accuracy a row shows."""
        if row in ("base", "lvlm"):
            return self.svlm if row == "base" else self.lvlm
        return f"PL_{self.lvlm}_{self.svlm}_{self.dataset}" + ("" if row == "mpa" else f"_{row}")

    def scores(self, row: str) -> list[float] | None:
        """The headline score of each test question, or None where the row was not evaluated."""
        path = self.folder / f"Eval_{self.model(row)}_{self.dataset}.json"
        if not path.exists():
            return None
        metric = METRICS[DATASETS[self.dataset].metrics[0]]
        return [metric(r["predictions"] or "", r["answers"]) for r in records.read_records(path, "Eval")]

    def seconds(self) -> dict[str, float]:
        """Seconds by stage; the baselines' training and evaluation apart."""

        def of(path: Path) -> float:
            return records.read_json(path)["seconds"] if path.exists() else 0.0

        training = {row: of(self.folder / self.model(row) / "train_meta.json") for row in ROWS}
        evaluation = {row: of(self.folder / f"Eval_{self.model(row)}_{self.dataset}.meta.json") for row in ROWS}
        main = ("base", "mpa", "lvlm")
        return {
            "PA": of(records.meta_path(self.pa)),
            "PI": round(sum(of(records.meta_path(self.answers(m))) for m in (self.lvlm, self.svlm)), 1),
            "PL": training["mpa"],
            "evaluate": round(sum(evaluation[row] for row in main), 1),
            "baselines": round(sum(training[r] + evaluation[r] for r in ROWS if r not in main), 1),
        }


def summary(run: Run) -> dict:
    rows, scores = {}, {row: run.scores(row) for row in ROWS}
    for row, values in scores.items():
        if values is None:
            continue
        meta = run.folder / run.model(row) / "train_meta.json"
        rows[row] = {
            "accuracy": statistics.fmean(values),
            "n": len(values),
            "ci95": bootstrap_interval(values),
            "train_samples": records.read_json(meta)["samples"] if meta.exists() else 0,
        }
    result = {
        "rows": rows,
        "funnel": records.read_json(records.meta_path(run.train))["funnel"],
        "seconds": run.seconds(),
    }
    if scores["base"] and scores["mpa"] and len(scores["base"]) == len(scores["mpa"]):
        gains = [after - before for after, before in zip(scores["mpa"], scores["base"], strict=True)]
        result["gain"] = {"accuracy": statistics.fmean(gains), "ci95": bootstrap_interval(gains)}
    return result


def examples(run: Run, n: int = 6) -> list[str]:
    """A few annotated pictures and what became of them, in words."""
    lvlm = {str(r["question_id"]): r for r in records.read_records(run.answers(run.lvlm), "PI")}
    svlm = {str(r["question_id"]): r for r in records.read_records(run.answers(run.svlm), "PI")}
    kept = {str(r["id"]) for r in records.read_records(run.train, "train")}
    lines = []
    for r in records.read_records(run.pa, "PA")[:n]:
        key = str(r["question_id"])
        if r.get("left_out") or key not in lvlm:
            lines.append(f"  {Path(r['image_path']).name}: left out: {r.get('left_out')}")
            continue
        asked = svlm.get(key)
        said = f"S-VLM: {asked['predictions']}" if asked else "S-VLM not asked"
        verdict = "parity sample" if key in kept else "S-VLM knows it" if asked else "L-VLM disagrees with itself"
        lines.append(
            f"  {Path(r['image_path']).name}: {r['predicted_question']} {r['predicted_answer']}\n"
            f"      L-VLM again: {lvlm[key]['predictions']} · {said} → {verdict}"
        )
    return lines


def table(result: dict) -> list[str]:
    lines = [f"  {'':<32}{'train samples':>14}{'accuracy':>10}   {'95 % interval':<16}{'n':>6}"]
    for row, r in result["rows"].items():
        low, high = (f"{100 * bound:.1f}" for bound in r["ci95"])
        samples = r["train_samples"] or "–"
        lines.append(
            f"  {ROWS[row]:<32}{samples:>14}{100 * r['accuracy']:>9.1f}%   {f'{low} to {high}':<16}{r['n']:>6}"
        )
    if "gain" in result:
        low, high = (f"{100 * bound:+.1f}" for bound in result["gain"]["ci95"])
        lines.append(
            f"  MPA gains {100 * result['gain']['accuracy']:+.1f} points (95 % interval {low} to {high}, same questions)."
        )
    return lines


def over_runs(results: list[dict]) -> list[str]:
    """Mean and standard deviation of each row over runs."""
    lines = [f"  {'':<32}{'train samples':>16}{'accuracy':>16}"]
    for row in results[0]["rows"]:
        cells = [result["rows"][row] for result in results if row in result["rows"]]
        accuracy = [100 * c["accuracy"] for c in cells]
        samples = [c["train_samples"] for c in cells]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (samples, accuracy)]
        lines.append(
            f"  {ROWS[row]:<32}{f'{statistics.fmean(samples):.0f} ± {spread[0]:.0f}':>16}"
            f"{f'{statistics.fmean(accuracy):.1f} ± {spread[1]:.1f}':>16}"
        )
    return lines


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, help="run folders")
    p.add_argument("--dataset", required=True, choices=DATASETS)
    p.add_argument("--lvlm", default=cli.LVLM, help="the L-VLM of the runs (default: %(default)s)")
    p.add_argument("--svlm", default=cli.SVLM, help="the S-VLM of the runs (default: %(default)s)")
    args = p.parse_args(argv)
    results = []
    for folder in args.runs:
        run = Run(folder, args.dataset, records.short_name(args.lvlm), records.short_name(args.svlm))
        result = summary(run)
        records.write_json(folder / "summary.json", result)
        results.append(result)
        print(f"\n{folder}: " + " → ".join(f"{n} {what}" for what, n in result["funnel"].items()))
        print("\n".join(["A few of them:", *examples(run), ""]))
        print("\n".join(table(result)))
        print("  Seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in result["seconds"].items() if s))
        print(f"Wrote {folder / 'summary.json'}.")
    if len(results) > 1:
        print(f"\nOver {len(results)} runs, mean ± standard deviation:")
        print("\n".join(over_runs(results)))


if __name__ == "__main__":
    cli.run(main)
