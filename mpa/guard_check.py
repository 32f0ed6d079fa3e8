"""Does the guard tell the truth? Its verdicts on held-out pseudo questions beside those of the labelled test."""

import math
from collections import Counter

import numpy as np

from mpa import scoring
from mpa.agreement import Z, wilson
from mpa.check_tables import NAMES, names, points
from mpa.evaluations import gains
from mpa.guard import BETTER, OPEN, WORSE, Guard, answers_file
from mpa.runs import Experiment, Runs, Training
from mpa.table_formats import Estimate, Figure, Table

VERDICTS = (BETTER, OPEN, WORSE)


def told_by_labels(training: Training) -> str:
    """The verdict of the labelled test: better or worse if the 95 % interval of the paired gain leaves out 0."""
    low, high = scoring.summary(gains(training.before, training.after).tolist())["ci95"]
    return WORSE if high < 0 else BETTER if low > 0 else OPEN


def guard_table(runs: Runs) -> Table:
    """Each variant's change by the guard and by the test, and how often they agree over all trainings."""
    columns = NAMES | {"variant": str, "seeds": float, "held-out change": Figure, "test change": Estimate}
    columns |= {"guard": str, "test": str, "held-out n": Figure, "test n": float}
    table = Table("guard", "The guard's verdicts and those of the labelled test, in points", columns)
    pairs = []
    for e in runs.experiments:
        asked = [t for t in e.seeds if t.before and _asked(t)]
        if asked:
            table.rows.append(_row(e, asked, pairs))
    table.notes.append("guard, test: better / not told apart / worse, as numbers of trainings.")
    if pairs:
        table.notes += _summary(pairs)
    return table


def _asked(t: Training) -> bool:
    models = (t.cell.svlm, t.after.model)
    return all(answers_file(t.after.path.parent, t.cell.lvlm, model, t.cell.dataset).exists() for model in models)


def _row(e: Experiment, asked: list[Training], pairs: list) -> dict:
    """A row of the table; what it found goes into `pairs` as (held-out gain, test gain, guard's verdict, test's)."""
    found = [Guard(t.after.path.parent, t.cell).compare(t.variant) for t in asked]
    changes = [gains(t.before, t.after) for t in asked]
    verdicts = [(one.verdict, told_by_labels(t)) for one, t in zip(found, asked, strict=True)]
    for one, change, both in zip(found, changes, verdicts, strict=True):
        pairs.append((one.gain, float(np.mean(change)), *both))
    counts = [" / ".join(str([both[i] for both in verdicts].count(v)) for v in VERDICTS) for i in (0, 1)]
    same = len({t.after.content for t in asked}) == 1
    row = names(e.cell) | {"variant": f"{e.variant}, {e.label}" if e.label else e.variant, "seeds": len(asked)}
    row |= {"held-out change": Figure(100 * float(np.mean([one.gain for one in found])), digits=1, sign=True)}
    row |= {"test change": points(np.mean(changes, axis=0)) if same else None, "guard": counts[0], "test": counts[1]}
    return row | {"held-out n": Figure(float(np.mean([one.n for one in found])), digits=0), "test n": len(changes[0])}


def _summary(pairs: list[tuple[float, float, str, str]]) -> list[str]:
    n, counts = len(pairs), Counter((guard, test) for _, _, guard, test in pairs)
    harm = [(guard == WORSE) == (test == WORSE) for _, _, guard, test in pairs]
    notes = []
    for what, right in (("same verdict", sum(counts[v, v] for v in VERDICTS)), ("same on worse or not", sum(harm))):
        low, high = wilson(right / n, n)
        notes.append(f"{what}: {right} of {n} trainings, {100 * right / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}].")
    worse = {guard: counts[guard, WORSE] for guard in VERDICTS}
    notes.append(
        f"Worse by the test: {sum(worse.values())}; the guard called {worse[WORSE]} of them worse, "
        f"{worse[OPEN]} not told apart, {worse[BETTER]} better. It recommends a levelled model only if that is better."
    )
    alarms = {test: counts[WORSE, test] for test in VERDICTS}
    notes.append(f"Called worse by the guard: {sum(alarms.values())}; better by the test: {alarms[BETTER]}.")
    held_out, test = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
    if n > 3 and held_out.std() and test.std():
        r = float(np.corrcoef(held_out, test)[0, 1])
        ends = [math.tanh(math.atanh(min(r, 1 - 1e-12)) + side * Z / math.sqrt(n - 3)) for side in (-1, 1)]
        notes.append(
            f"Correlation of both changes: {r:.3f} [{ends[0]:.3f}, {ends[1]:.3f}], n = {n}; "
            f"mean difference, held-out minus test: {100 * float(np.mean(held_out - test)):+.1f} points."
        )
    return notes
