"""Does the guard tell the truth? Its verdicts on held-out pseudo questions beside those of the labelled test."""

import math
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from mpa import given_questions, scoring
from mpa.agreement import Z, wilson
from mpa.check_tables import NAMES, names, points
from mpa.datasets.loading import train_labels
from mpa.evaluations import gains
from mpa.guard import BETTER, OPEN, WORSE, Guard, answers_file, compare
from mpa.runs import Experiment, Runs, Training
from mpa.table_formats import Estimate, Figure, Table

VERDICTS = (BETTER, OPEN, WORSE)


def told_by_labels(training: Training) -> str:
    """The verdict of the labelled test: better or worse if the 95 % interval of the paired gain leaves out 0."""
    low, high = scoring.summary(gains(training.before, training.after).tolist())["ci95"]
    return WORSE if high < 0 else BETTER if low > 0 else OPEN


@cache
def _train_split(dataset: str) -> dict:
    """{question id of --held-out-questions train: the sample, with its answers}."""
    return {given_questions.ID.format(i): sample for i, sample in enumerate(train_labels(dataset))}


def told_by_train_labels(before: list[dict], after: list[dict], preset: str, dataset: str) -> str | None:
    """The guard's verdict if it had the train split's answers instead of the L-VLM's: what so many questions can tell at best.

    None if the questions are not those of the train split, or it is not here.
    """
    labelled = []
    for records in (before, after):
        samples = [_train_split(dataset).get(r["question_id"]) for r in records]
        for r, s in zip(records, samples, strict=True):
            if s is None or (s.question, Path(s.image_path).name) != (r["GT_question"], Path(r["image_path"]).name):
                return None
        labelled.append([r | {"answers": s.answers} for r, s in zip(records, samples, strict=True)])
    return compare(*labelled, preset).verdict


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
    """A row of the table; what it found goes into `pairs`: held-out gain, test gain, guard's verdict, test's, by train labels."""
    answers = [Guard(t.after.path.parent, t.cell).answers(t.variant) for t in asked]
    found, labelled = [compare(*a) for a in answers], [told_by_train_labels(*a, e.cell.dataset) for a in answers]
    changes = [gains(t.before, t.after) for t in asked]
    verdicts = [(one.verdict, told_by_labels(t)) for one, t in zip(found, asked, strict=True)]
    for one, change, both, by_labels in zip(found, changes, verdicts, labelled, strict=True):
        pairs.append((one.gain, float(np.mean(change)), *both, by_labels))
    counts = [" / ".join(str([both[i] for both in verdicts].count(v)) for v in VERDICTS) for i in (0, 1)]
    same = len({t.after.content for t in asked}) == 1
    row = names(e.cell) | {"variant": f"{e.variant}, {e.label}" if e.label else e.variant, "seeds": len(asked)}
    row |= {"held-out change": Figure(100 * float(np.mean([one.gain for one in found])), digits=1, sign=True)}
    row |= {"test change": points(np.mean(changes, axis=0)) if same else None, "guard": counts[0], "test": counts[1]}
    return row | {"held-out n": Figure(float(np.mean([one.n for one in found])), digits=0), "test n": len(changes[0])}


def _right(verdicts: list[tuple[str, str]]) -> str:
    """How many of the (verdict, test's verdict) are equal, and how many on worse or not."""
    n, parts = len(verdicts), []
    harm = sum((told == WORSE) == (test == WORSE) for told, test in verdicts)
    for what, right in (("on worse or not", harm), ("of three", sum(told == test for told, test in verdicts))):
        low, high = wilson(right / n, n)
        parts.append(f"{what} {right} of {n}, {100 * right / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    return "; ".join(parts)


def _summary(pairs: list[tuple[float, float, str, str, str | None]]) -> list[str]:
    verdicts = [(guard, test) for _, _, guard, test, _ in pairs]
    n, counts = len(pairs), Counter(verdicts)
    notes = [f"Verdicts as the test's: {_right(verdicts)}."]
    labelled = [(by_labels, test) for *_, test, by_labels in pairs if by_labels]
    if labelled:
        notes.append(f"The same with the train split's answers instead of the L-VLM's: {_right(labelled)}.")
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
