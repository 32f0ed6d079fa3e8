"""Table 4, the human ratings before and after PI, from the files that scripts/rate.py wrote."""

import math
from collections import Counter, defaultdict

import numpy as np

from mpa.analysis import ratings
from mpa.analysis.paper_tables import PAPER, SOURCE, UNKNOWN
from mpa.analysis.table_formats import NAMES, Estimate, Figure, Table, names
from mpa.answers.intervals import combined
from mpa.answers.raters import alpha, interval, kappa
from mpa.runs.layout import Cell
from mpa.runs.trainings import Runs

LABELS = {"answerable": "answerable", "correct": "answer correct", "human": "reads as written by a person"}
NOTES = [
    "Percent of yes, with 95 % intervals (Wilson; Newcombe for sums and differences), over items; an item counts with the mean "
    "of its raters. D_PA: 'not kept' and D_PI, weighted by their sizes. Alpha: Krippendorff's, over all items of both sets that "
    "two or more raters rated (alpha, items). Kappa: Cohen's for two raters, Fleiss' for more, over the items that all of them "
    "rated; raters of fewer than half of the items are left out of it. Both with a bootstrap interval over items.",
    f"{SOURCE} How it drew the samples before PI is {UNKNOWN}.",
]


def ratings_table(runs: Runs) -> Table:
    """One row for each ratings file and aspect; without a file, the paper's figures alone."""
    kinds = NAMES | {"rated": str, "not kept by PI": Estimate}
    kinds |= {
        "D_PA, before PI": Estimate,
        "D_PI, after PI": Estimate,
        "change": Estimate,
        "items": str,
        "raters": float,
    }
    kinds |= {
        "alpha": Estimate,
        "alpha, items": float,
        "kappa": Estimate,
        "before, paper": float,
        "after, paper": float,
    }
    table = Table("ratings", "Table 4: human ratings of pseudo labels before and after PI", kinds, notes=NOTES)
    for file in runs.ratings:
        meta, found = ratings.read_meta(file), ratings.latest(file)
        cell = names(Cell(*(meta[name] for name in Cell._fields)))
        table.rows += [cell | row(aspect, found, meta["sizes"]) for aspect in ratings.ASPECTS]
    if not table.rows:
        table.rows = [row(aspect, {}, {}) for aspect in ratings.ASPECTS]
    return table


def row(aspect: str, found: dict, sizes: dict[str, int]) -> dict:
    """The cells of one aspect. `found` is `ratings.latest`; `sizes` are those of D_PA without D_PI, and of D_PI."""
    published = PAPER["table4"][aspect]
    cells = {"rated": LABELS[aspect], "notes": []}
    cells |= {f"{name}, paper": Figure(published[name], digits=0) for name in ratings.SETS}
    by_item, raters = defaultdict(dict), set()  # {(set, id): {rater: value}}
    for (rater, key, name), values in found.items():
        if values.get(aspect) is not None:
            by_item[name, key][rater] = values[aspect]
            raters.add(rater)
    if not by_item:
        return cells
    means = {s: [np.mean(list(v.values())) for (name, _), v in by_item.items() if name == s] for s in ratings.SETS}
    cells["items"] = " + ".join(str(len(means[name])) for name in ratings.SETS)
    cells["raters"] = Figure(len(raters), digits=0)
    parts = {name: (float(np.mean(values)), len(values)) for name, values in means.items() if values}
    for name, column in zip(ratings.SETS, ("not kept by PI", "D_PI, after PI"), strict=True):
        if name in parts:
            cells[column] = _percent(combined((1.0, *parts[name])))
    if len(parts) == len(ratings.SETS):
        rest = sizes["before"] / sum(sizes.values())
        before, after = parts["before"], parts["after"]
        cells["D_PA, before PI"] = _percent(combined((rest, *before), (1 - rest, *after)))
        cells["change"] = _percent(combined((rest, *after), (-rest, *before)), sign=True)
    return cells | _agreement(by_item, sorted(raters), cells["notes"])


def _agreement(by_item: dict, raters: list[str], notes: list[str]) -> dict:
    """The cells of alpha and of kappa, the latter with a note where it is not of all items and raters."""
    if len(raters) < 2:
        return {}
    yes = np.array([sum(values.values()) for values in by_item.values()])
    counts = np.stack([np.array([len(values) for values in by_item.values()]) - yes, yes], axis=1)
    cells = {"alpha": _with_interval(alpha, counts)}
    cells["alpha, items"] = Figure(int((counts.sum(axis=1) > 1).sum()), digits=0)
    rated = Counter(rater for values in by_item.values() for rater in values)
    those = [rater for rater in raters if 2 * rated[rater] >= len(by_item)]
    if len(those) < 2:
        return cells
    table = [[values[rater] for rater in those] for values in by_item.values() if values.keys() >= set(those)]
    if len(table) < len(by_item) or len(those) < len(raters):
        left_out = f" Without {', '.join(sorted(set(raters) - set(those)))}." if len(those) < len(raters) else ""
        notes.append(
            f"Kappa: over {len(table)} of {len(by_item)} items, those that all {len(those)} raters rated.{left_out}"
        )
    return cells | {"kappa": _with_interval(kappa, np.array(table, dtype=int).reshape(-1, len(those)))}


def _with_interval(statistic, ratings: np.ndarray) -> Estimate | str:
    value = statistic(ratings)
    return "undefined" if math.isnan(value) else Estimate(value, *interval(statistic, ratings), digits=2)


def _percent(found: tuple[float, tuple[float, float]], sign: bool = False) -> Estimate:
    value, (low, high) = found
    return Estimate(100 * value, 100 * low, 100 * high, sign=sign)
