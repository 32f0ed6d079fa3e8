"""The paper's tables from the trainings that `mpa.runs.trainings` finds, ours beside the paper's. A cell without a run stays empty.

Means, their intervals and n are those of the evaluations' meta files; samples those of the training's and PI's. Only a gain needs
the records: their scores, which evaluate.py wrote, are not computed anew.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from mpa.analysis.run_summary import ROWS
from mpa.analysis.table_formats import NAMES, Figure, Interval, Table, names
from mpa.data import DATASETS
from mpa.runs import comparable
from mpa.runs.comparable import NotComparable
from mpa.runs.layout import MPA, Cell
from mpa.runs.trainings import Runs, SeedGroup

PAPER = json.loads(Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))
UNKNOWN = "not published"
SOURCE = PAPER["source"]
TRAINED_ON = ROWS | {"rejected": "pseudo labels that PI did not keep"}


def paper_name(model: str) -> str:
    """A model's name in the paper; its short name if the paper does not have it."""
    return PAPER["short_names"].get(model, model)


def in_paper(cell: Cell) -> bool:
    """Is this a cell of the paper's matrix?"""
    models = paper_name(cell.lvlm) in PAPER["models"]["lvlm"] and paper_name(cell.svlm) in PAPER["models"]["svlm"]
    return models and cell.dataset in PAPER["datasets"]


def over_seeds(values, scale: float = 1, **form) -> Figure | None:
    """Mean and, of several values, standard deviation; None if a value is missing."""
    values = list(values)
    if not values or None in values:
        return None
    values = [scale * value for value in values]
    return Figure(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, **form)


def main_row(group: SeedGroup) -> dict:
    """Before, after, gain, interval, n and parity samples of MPA."""
    seeds, row, notes = group.seeds, names(group.cell), []
    row["method"], row["settings"] = seeds[0].method, group.label
    if row["method"] != "MPA":
        row["settings"] = ", ".join(filter(None, (row["method"], group.label)))
    row["after"] = over_seeds((t.after.summary["score"] for t in seeds), 100)
    row["seeds"] = Figure(len(seeds), digits=0)
    row["parity samples"] = over_seeds((t.parity_samples for t in seeds), digits=0)
    evaluations = {e.path: e for t in seeds for e in (t.before, t.after) if e}.values()
    if unfinished := sum(e.meta.get("unfinished") or 0 for e in evaluations):
        notes.append(f"{unfinished} replies failed with a temporary error: repeat the evaluation.")
    notes += [f"{e.path.name}: {e.lost}." for e in evaluations if e.lost]
    if row["method"] != "MPA":
        notes.append("Not the paper's method: also trained on samples that both models answer right (docs/no-harm.md).")
    if all(t.before for t in seeds):
        notes += _compared(row, seeds)
    else:
        notes.append("The S-VLM was not evaluated on the same questions before PL.")
    return row | {"notes": notes}


def _compared(row: dict, seeds: list) -> list[str]:
    """Add what compares before and after to the row. Returns notes."""
    same_before = all(t.before.meta == seeds[0].before.meta for t in seeds)  # one, linked into several folders
    row["before"] = over_seeds((t.before.summary["score"] for t in (seeds[:1] if same_before else seeds)), 100)
    try:
        found = [comparable.compare(t.before, t.after) for t in seeds]
    except NotComparable as error:
        return [f"No gain: {error}"]
    row["n"] = _counts([len(pairs.gains) for pairs in found])
    row["gain"] = over_seeds((pairs.gains.mean() for pairs in found), 100, sign=True)
    row["95 % interval"] = Interval(*(100 * bound for bound in comparable.interval(found)), sign=True)
    notes = list(dict.fromkeys(note for pairs in found for note in pairs.notes))
    if len({t.after.content for t in seeds}) > 1:
        notes.append("The seeds were evaluated on different questions.")
    return notes


def main_table(runs: Runs, whole_matrix: bool = False) -> Table:
    """S-VLM x L-VLM x dataset: all combinations of those found, and with `whole_matrix` also the paper's."""
    kinds = NAMES | {"settings": str, "before": Figure, "after": Figure}
    kinds |= {"gain": Figure, "95 % interval": Interval, "n": float, "parity samples": Figure, "seeds": float}
    rows = defaultdict(list)
    for group in runs.groups:
        if group.variant == MPA:
            rows[group.cell].append(main_row(group))
    cells = dict.fromkeys([*_product(runs.cells), *(_paper_matrix(runs.cells) if whole_matrix else ())])
    table = Table("main", "S-VLMs before and after MPA, accuracy in percent", kinds | {"gain, paper": float})
    for cell in cells:
        for row in rows.get(cell) or [_without_run(runs, cell)]:
            published, note = _published_gain(cell)
            row["notes"] = [*row.get("notes", ()), *note]
            if not DATASETS[cell.dataset].labelled:
                row["notes"].append("Agreement with the L-VLM on the held-out set, not accuracy.")
            table.rows.append(row | {"gain, paper": published})
    if not any(row.get("settings") for row in table.rows):
        del table.columns["settings"]
    table.notes.append(
        "95 % interval: of the gain, paired by question, over the images (docs/tables.md). ±: over seeds."
    )
    table.notes.append(SOURCE)
    return table


def _counts(counts: list[int]) -> Figure | str:
    """One number, or the range of several."""
    low, high = min(counts), max(counts)
    return Figure(low, digits=0) if low == high else f"{low} to {high}"


def _without_run(runs: Runs, cell: Cell) -> dict:
    """A cell without an MPA training: what is known of the S-VLM before."""
    row, before = names(cell), runs.evaluation(cell.dataset, cell.svlm)
    return row | ({"before": Figure(100 * before.summary["score"])} if before and cell in runs.cells else {})


def _product(cells: list[Cell]) -> list[Cell]:
    """All combinations of the datasets, L-VLMs and S-VLMs of some cells, ordered."""
    datasets, lvlms, svlms = (sorted(set(names)) for names in zip(*cells, strict=True)) if cells else ((), (), ())
    datasets = sorted(datasets, key=list(DATASETS).index)
    return [Cell(dataset, lvlm, svlm) for dataset in datasets for lvlm in lvlms for svlm in svlms]


def _paper_matrix(cells: list[Cell]) -> list[Cell]:
    """The cells of the paper's matrix that are not among `cells` under a checkpoint's own name."""
    known = {(cell.dataset, paper_name(cell.lvlm), paper_name(cell.svlm)) for cell in _product(cells)}
    models = PAPER["models"]
    matrix = [Cell(d, lvlm, s) for d in PAPER["datasets"] for lvlm in models["lvlm"] for s in models["svlm"]]
    return [cell for cell in matrix if cell not in known]


def _published_gain(cell: Cell):
    """(the paper's gain in a cell, notes on it)."""
    for entry in PAPER["main"]:
        if (entry["dataset"], entry["lvlm"], entry["svlm"]) == (cell.dataset, *map(paper_name, cell[1:])):
            return Figure(entry["gain"], sign=True), [entry["note"]]
    return (UNKNOWN if in_paper(cell) else "–"), []


def ablation_table(runs: Runs) -> Table:
    """Table 6: what PL trains on, its samples and the accuracy, for cells with more than MPA; then the paper's."""
    kinds = NAMES | {"training data": str, "settings": str, "samples": Figure}
    kinds |= {"accuracy": Figure, "95 % interval": Interval, "n": float, "seeds": float}
    kinds |= {"samples, paper": str, "accuracy, paper": float}
    table = Table("ablation", "Table 6: training data of the S-VLM, accuracy in percent", kinds)
    by_cell = defaultdict(list)
    for group in runs.groups:
        by_cell[group.cell].append(group)
    for cell, groups in by_cell.items():
        if {group.variant for group in groups} != {MPA}:
            table.rows += _ablation_rows(runs, cell, groups)
    shown = {(row["dataset"], row["variant"]) for row in table.rows}
    for entry in PAPER["table6"]:
        if (entry["dataset"], entry["variant"]) not in shown:
            row = {"dataset": entry["dataset"], "training data": TRAINED_ON[entry["variant"]]}
            table.rows.append(row | _published_ablation(entry["dataset"], entry["variant"]))
    if not any(row.get("settings") for row in table.rows):
        del table.columns["settings"]
    table.notes.append("95 % interval: of the accuracy of one seed, by a bootstrap over the questions. ±: over seeds.")
    table.notes.append(f"{SOURCE} Table 6: the models are {UNKNOWN}.")
    return table


def _ablation_rows(runs: Runs, cell: Cell, groups: list[SeedGroup]) -> list[dict]:
    """The rows of one cell in the order of the demo's table, other variants before the L-VLM."""
    found = defaultdict(list)
    for group in groups:
        samples = over_seeds((t.samples for t in group.seeds), digits=0)
        row = {"settings": group.label, "method": group.seeds[0].method, "samples": samples}
        found[group.variant].append(row | _accuracy([t.after for t in group.seeds]))
    first = groups[0].seeds[0]
    for variant, model in (("base", cell.svlm), ("lvlm", cell.lvlm)):
        if evaluation := runs.evaluation(cell.dataset, model, first.folder, first.after.content):
            found[variant].append({"samples": None, **_accuracy([evaluation])})
    order = [*(v for v in TRAINED_ON if v != "lvlm"), *sorted(set(found) - set(TRAINED_ON)), "lvlm"]
    rows = [{"variant": variant} | row for variant in order for row in found.get(variant, ())]
    return [
        names(cell)
        | {"training data": row["method"] if row["variant"] == MPA else TRAINED_ON.get(row["variant"], row["variant"])}
        | row
        | _published_ablation(cell.dataset, row["variant"])
        for row in rows
    ]


def _accuracy(evaluations: list) -> dict:
    summaries = [evaluation.summary for evaluation in evaluations]
    row = {
        "accuracy": over_seeds((s["score"] for s in summaries), 100),
        "n": _counts([s["n"] for s in summaries]),
    }
    row["seeds"] = Figure(len(summaries), digits=0)
    row["notes"] = [f"{e.path.name}: {e.lost}." for e in evaluations if e.lost]
    if len(summaries) == 1:
        row["95 % interval"] = Interval(*(100 * bound for bound in summaries[0]["ci95"]))
    return row


def _published_ablation(dataset: str, variant: str) -> dict:
    for entry in PAPER["table6"]:
        if (entry["dataset"], entry["variant"]) == (dataset, variant):
            return {
                "variant": variant,
                "samples, paper": entry["samples"],
                "accuracy, paper": Figure(entry["accuracy"]),
            }
    unknown = UNKNOWN if dataset in PAPER["datasets"] else "–"
    return {"samples, paper": "" if variant in ("base", "lvlm") else unknown, "accuracy, paper": unknown}


def claims_table(runs: Runs, main: Table) -> Table:
    """The headline claims: best gain, mean gain, and how many times as many samples D_PA has as D_PI."""
    kinds = {"claim": str, "ours": float, "95 % interval": Interval, "of": str, "paper": float, "of, paper": str}
    table = Table("claims", "Headline claims", kinds)
    rows = [row for row in main.rows if "gain" in row and row["method"] == "MPA" and DATASETS[row["dataset"]].labelled]
    claims = ("best gain", "mean gain", "samples of D_PA over D_PI")
    best, mean, ratio = ({"claim": claim, "notes": []} for claim in claims)
    if rows:
        top = max(rows, key=lambda row: row["gain"].value)
        settings = f" ({top['settings']})" if top.get("settings") else ""
        best |= {"ours": top["gain"], "95 % interval": top["95 % interval"]}
        best["of"] = f"{top['dataset']}, {top['S-VLM']} from {top['L-VLM']}{settings}, of {_count(rows, 'row')}"
        mean |= {"ours": Figure(statistics.fmean(row["gain"].value for row in rows), sign=True)}
        mean["of"] = _count(rows, "row") + " of the main table"
        if len(rows) > 1:
            mean["of"] += f", standard deviation over them {statistics.stdev(row['gain'].value for row in rows):.1f}"
    ratio |= _ratio(runs)
    for row in (best, mean, ratio):
        entry = PAPER["claims"][row["claim"]]
        figure = entry["figure"]
        row["paper"] = figure if isinstance(figure, str) else Figure(figure, sign=True)
        row["of, paper"] = entry["of"]
        row["notes"] += [entry["note"]] if "note" in entry else []
    table.rows = [best, mean, ratio]
    table.notes.append("Gains in points of accuracy. The best of many gains is too high by chance: see its interval.")
    table.notes.append(SOURCE)
    return table


def _count(rows: list, what: str) -> str:
    return f"{len(rows)} {what}{'s' if len(rows) > 1 else ''}"


def _ratio(runs: Runs) -> dict:
    """D_PA over D_PI, all parity sets together, and its range."""
    funnels = [one.meta.get("funnel") or {} for one in runs.of_mpa]
    pairs = [(f["parsed"], f["parity"]) for f in funnels if f.get("parsed") and "parity" in f]
    pa, pi = (sum(column) for column in zip(*pairs, strict=True)) if pairs else (0, 0)
    if not pi:
        return {}
    single = [a / p for a, p in pairs if p]
    of = f"{pa} over {pi} in {_count(pairs, 'parity set')}, from {min(single):.1f} to {max(single):.1f}"
    return {
        "ours": Figure(pa / pi),
        "of": of + (f"; {len(pairs) - len(single)} are empty" if len(single) < len(pairs) else ""),
    }
