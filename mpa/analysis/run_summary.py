"""The summary of one run, for one dataset and one pair of models: the funnel, a few example images, and the table.

`scripts/tables.py --dataset …` prints it and writes summary.json; the demo and mpa.sh end with it.
"""

import statistics
from pathlib import Path

from mpa.analysis import guard
from mpa.data import DATASETS
from mpa.files import log_file, records
from mpa.files.outputs import refuse_others
from mpa.files.records import funnel_line
from mpa.method.verdict import BOTH_RIGHT, HELD_OUT, LVLM_FAILED, PARITY, SVLM_FAILED
from mpa.runs import comparable
from mpa.runs.case import Case
from mpa.runs.comparable import NotComparable
from mpa.runs.evaluations import Evaluation, read_meta
from mpa.runs.layout import MPA, Cell

ROWS = {
    "base": "S-VLM before",
    "all_pseudo": "all pseudo labels, without PI",
    "random_pseudo": "random pseudo labels, as many",
    "mpa": "MPA",
    "human_n": "human labels, as many",
    "human": "human labels, all",
    "lvlm": "L-VLM",
}

# PI's verdicts (`verdict.REASONS`) in the summary's words, where these differ.
VERDICTS = {PARITY: "parity sample", BOTH_RIGHT: "S-VLM answers correctly", HELD_OUT: "held out for evaluation"}

FEW_QUESTIONS, FEW_SAMPLES = 30, 50  # below which the summary warns


def model_of(case: Case, row: str) -> str:
    """The short name of the model whose accuracy a row shows."""
    return {"base": case.cell.svlm, "lvlm": case.cell.lvlm}.get(row) or case.files.levelled(row).name


def seconds(case: Case) -> dict[str, float]:
    """Seconds per stage. Training and evaluation of the baselines are counted separately."""

    def of(file: Path) -> float:
        return case.run.meta(file).get("seconds") or 0.0

    training = {row: of(case.files.levelled(row)) for row in ROWS}
    evaluation = {row: of(case.files.evaluation(model_of(case, row))) for row in ROWS}
    main = ("base", MPA, "lvlm")
    return {
        "PA": of(case.pa_json),
        "PI": round(sum(map(of, case.answers_json.values())), 1),
        "PL": training[MPA],
        "evaluate": round(sum(evaluation[row] for row in main), 1),
        "baselines": round(sum(training[r] + evaluation[r] for r in ROWS if r not in main), 1),
    }


def summary(case: Case) -> dict:
    rows, evaluated = {}, {row: case.evaluation(model_of(case, row)) for row in ROWS}
    for row, found in evaluated.items():
        # The L-VLM's agreement with itself is why a question is held out.
        if not found or not found.records or (row == "lvlm" and not DATASETS[case.cell.dataset].labelled):
            continue
        rows[row] = {
            "accuracy": found.summary["score"],
            "n": found.summary["n"],
            "ci95": found.summary["ci95"],
            "train_samples": case.trained(row).get("samples") or 0,
            "lost": found.lost,
        }
    result = {"rows": rows, "method": case.method, "funnel": case.meta.get("funnel") or {}, "seconds": seconds(case)}
    if evaluated["base"] and evaluated[MPA]:
        try:
            result |= gain(case, evaluated["base"], evaluated[MPA])
        except NotComparable as error:  # the rest of the summary is as it is
            result["no_gain"] = str(error)
    return result


def gain(case: Case, before: Evaluation, after: Evaluation) -> dict:
    """{"gain"}, and for unlabelled images also {"guard"}: its figures and conclusion. Raises NotComparable."""
    if DATASETS[case.cell.dataset].labelled:
        pairs = comparable.compare(before, after)
        found = pairs.summary()
        return {"gain": {"accuracy": found["score"], "ci95": found["ci95"], "n": found["n"], "notes": pairs.notes}}
    of_run = guard.Guard(case.folder, case.cell)
    found = guard.compare(before, after, max(1, len(of_run.variants)))
    told = {"guard": found.as_json() | {"conclusion": guard.conclusion(found, of_run.share)}}
    if found.no_verdict:
        return told
    return told | {"gain": {"accuracy": found.gain, "ci95": found.interval, "n": found.n, "notes": list(found.notes)}}


def examples(case: Case, n: int = 6) -> list[str]:
    """A few annotated images and their verdicts, as text: the first of each verdict, then the first of all."""
    lines, first = [], {}
    for place, s in enumerate(case.samples):
        name = Path(s.image_path).name
        if s.lvlm_answer is None:
            why = "left out"
            lines.append(f"  {name}: left out: {s.detail}")
        else:
            why = s.detail if s.reason in (LVLM_FAILED, SVLM_FAILED) and s.detail else VERDICTS.get(s.reason, s.reason)
            reply = "" if s.svlm_answer is None else f" · S-VLM: {s.svlm_answer}"
            lines.append(f"  {name}: {s.question} {s.annotation}\n      L-VLM again: {s.lvlm_answer}{reply} → {why}")
        first.setdefault(why, place)
    chosen = [*first.values(), *(place for place in range(len(lines)) if place not in first.values())]
    return [lines[place] for place in sorted(chosen[:n])]


def cautions(result: dict) -> list[str]:
    """What makes the table say little: replies lost, few test questions, few training samples. Without labels also the guard's
    conclusion.
    """
    names, mpa = ROWS | {"mpa": result.get("method", ROWS["mpa"])}, result["rows"].get("mpa")
    lines = [f"  {names[row]}: {r['lost']}." for row, r in result["rows"].items() if r.get("lost")]
    lines += [f"  {note}" for note in result.get("gain", {}).get("notes", ())]
    lines += [f"  No gain: {result['no_gain']}"] if "no_gain" in result else []
    lines += [f"  {line}" for line in result.get("guard", {}).get("conclusion", ())]
    if mpa and mpa["n"] < FEW_QUESTIONS and "guard" not in result:
        lines.append(
            f"  Only {mpa['n']} test questions: the intervals are wide, and those of accuracies still too narrow."
        )
    if mpa and mpa["train_samples"] < FEW_SAMPLES:
        lines.append(
            f"  Only {mpa['train_samples']} training samples: annotate more images before you judge the method."
        )
    return lines


def table(result: dict, what: str) -> list[str]:
    """The rows as text. `what` names the measure: accuracy, or agreement with the L-VLM."""
    names = ROWS | {"mpa": result.get("method", ROWS["mpa"])}
    lines = [f"  {'':<32}{'train samples':>14}{what:>11}   {'95 % interval':<16}{'n':>6}"]
    for row, r in result["rows"].items():
        low, high = (f"{100 * bound:.1f}" for bound in r["ci95"])
        samples = r["train_samples"] or "–"
        lines.append(
            f"  {names[row]:<32}{samples:>14}{100 * r['accuracy']:>10.1f}%   {f'{low} to {high}':<16}{r['n']:>6}"
        )
    if "gain" in result:
        low, high = (f"{100 * bound:+.1f}" for bound in result["gain"]["ci95"])
        lines.append(
            f"  {names['mpa']} gains {100 * result['gain']['accuracy']:+.1f} points "
            f"(95 % interval {low} to {high}, same questions)."
        )
    return lines


def over_runs(results: list[dict], what: str) -> list[str]:
    """Mean and standard deviation of each row over runs."""
    names = ROWS | {"mpa": results[0].get("method", ROWS["mpa"])}
    lines = [f"  {'':<32}{'train samples':>16}{what:>16}"]
    for row in results[0]["rows"]:
        cells = [result["rows"][row] for result in results if row in result["rows"]]
        accuracy = [100 * c["accuracy"] for c in cells]
        samples = [c["train_samples"] for c in cells]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (samples, accuracy)]
        lines.append(
            f"  {names[row]:<32}{f'{statistics.fmean(samples):.0f} ± {spread[0]:.0f}':>16}"
            f"{f'{statistics.fmean(accuracy):.1f} ± {spread[1]:.1f}':>16}"
        )
    return lines


def summarise(folders: list[Path], dataset: str, lvlm: str, svlm: str) -> None:
    """Print the summary of each run folder and write its summary.json; with several folders, also the spread.

    `lvlm` and `svlm` are the models' paths. What is printed goes to the first folder's log.txt, too.
    """
    what = "accuracy" if DATASETS[dataset].labelled else "agreement"
    cell = Cell(dataset, records.short_name(lvlm), records.short_name(svlm))
    cases = [Case(folder, cell) for folder in folders]
    for case in cases:
        read_meta(records.meta_path(case.train_json))  # it must be there
    results = list(map(summary, cases))
    for case in cases:
        refuse_others(case.files.summary, "summary", ours=lambda path: True)  # it has no meta file
    log_file.open_log(folders[0] / "log.txt")
    for case, result in zip(cases, results, strict=True):
        records.write_json(case.files.summary, result)
        print(f"\n{case.folder}: " + funnel_line(result["funnel"]))
        print("\n".join(["Examples:", *examples(case), ""]))
        print("\n".join([*table(result, what), *cautions(result)]))
        if not DATASETS[dataset].labelled:
            print("  Agreement with the L-VLM on the held-out set. It is not accuracy: the L-VLM also makes errors.")
        print("  Seconds: " + ", ".join(f"{stage} {s:.0f}" for stage, s in result["seconds"].items() if s))
        print(f"Wrote {case.files.summary}.")
    if len(results) > 1:
        print(f"\nOver {len(results)} runs, mean ± standard deviation:")
        print("\n".join(over_runs(results, what)))
