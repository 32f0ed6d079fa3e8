"""Does the guard tell the truth? Its verdicts on held-out pseudo questions beside those of the labelled test."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mpa.analysis.check_tables import points
from mpa.analysis.guard import BETTER, OPEN, SCORED_AS, WORSE, Comparison, Guard, compare
from mpa.analysis.table_formats import NAMES, Estimate, Figure, Table, names
from mpa.answers.intervals import Z, wilson
from mpa.data.loading import train_labels
from mpa.files.records import InputError
from mpa.runs import comparable
from mpa.runs.comparable import Pairs
from mpa.runs.evaluations import Evaluation
from mpa.runs.layout import RunFiles
from mpa.runs.trainings import Runs, SeedGroup, Training
from mpa.stages import given_questions

VERDICTS = (BETTER, OPEN, WORSE)


@dataclass(frozen=True)
class Checked:
    """A training by the guard and by the labelled test. `by_labels` is `told_by_train_labels`."""

    guard: Comparison
    test: Pairs
    by_labels: str | None

    @property
    def verdicts(self) -> tuple[str, str]:
        """(the guard's on this model alone, the test's: better or worse if the 95 % interval of the gain leaves out 0)."""
        low, high = comparable.interval([self.test])
        return self.guard.verdict, WORSE if high < 0 else BETTER if low > 0 else OPEN


@cache
def _train_split(dataset: str) -> dict:
    """{question id of --held-out-questions train: the sample, with its answers}."""
    return {given_questions.ID.format(i): sample for i, sample in enumerate(train_labels(dataset))}


def told_by_train_labels(before: Evaluation, after: Evaluation, dataset: str) -> str | None:
    """The guard's verdict if it had the train split's answers instead of the L-VLM's: what so many questions can tell at best.

    None if the questions are not those of the train split, or it is not here.
    """
    labelled = []
    for one in (before, after):
        samples = [_train_split(dataset).get(r["question_id"]) for r in one.records]
        for r, s in zip(one.records, samples, strict=True):
            if s is None or (s.question, Path(s.image_path).name) != (r["GT_question"], Path(r["image_path"]).name):
                return None
        found = [r | {"answers": s.answers} for r, s in zip(one.records, samples, strict=True)]
        labelled.append(Evaluation.of(one.path, found, SCORED_AS, one.meta["settings"]["preset"], one.meta))
    return compare(*labelled).verdict


def guard_table(runs: Runs) -> Table:
    """Each variant's change by the guard and by the test, and how often they agree over all trainings."""
    columns = NAMES | {"variant": str, "seeds": float, "held-out change": Figure, "test change": Estimate}
    columns |= {"guard": str, "test": str, "held-out n": Figure, "test n": float}
    table = Table("guard", "The guard's verdicts and those of the labelled test, in points", columns)
    everything = []
    for group in runs.groups:
        notes = []
        found = [one for t in group.seeds if t.before and _asked(t) and (one := _checked(t, notes))]
        everything += found
        if found or notes:
            table.rows.append(_row(group, found) | {"notes": notes})
    table.notes.append("guard, test: better / not told apart / worse, as numbers of trainings.")
    if everything:
        table.notes += _summary(everything)
    return table


def _asked(t: Training) -> bool:
    files = RunFiles(t.folder, t.cell)
    return all(files.guard_answers(model).exists() for model in (t.cell.svlm, t.after.model))


def _checked(t: Training, notes: list[str]) -> Checked | None:
    """None, with a note, if the guard or the test can say nothing about it."""
    try:
        answers = Guard(t.folder, t.cell).answers(t.variant)
        found = Checked(
            compare(*answers), comparable.compare(t.before, t.after), told_by_train_labels(*answers, t.cell.dataset)
        )
    except InputError as error:
        notes.append(f"Left out: {error}")
        return None
    if found.guard.no_verdict:
        notes.append(f"Left out: {answers[1].path}: {found.guard.no_verdict}.")
        return None
    return found


def _row(group: SeedGroup, found: list[Checked]) -> dict:
    row = names(group.cell) | {"variant": group.title, "seeds": len(found)}
    if not found:
        return row
    verdicts = [one.verdicts for one in found]
    counts = [" / ".join(str([both[i] for both in verdicts].count(v)) for v in VERDICTS) for i in (0, 1)]
    row |= {"held-out change": Figure(100 * float(np.mean([one.guard.gain for one in found])), digits=1, sign=True)}
    row |= {"test change": points(*(one.test for one in found)), "guard": counts[0], "test": counts[1]}
    row["held-out n"] = Figure(float(np.mean([one.guard.n for one in found])), digits=0)
    return row | {"test n": len(found[0].test.gains)}


def _right(verdicts: list[tuple[str, str]]) -> str:
    """How many of the (verdict, test's verdict) are equal, and how many on worse or not."""
    n, parts = len(verdicts), []
    harm = sum((told == WORSE) == (test == WORSE) for told, test in verdicts)
    for what, right in (("on worse or not", harm), ("of three", sum(told == test for told, test in verdicts))):
        low, high = wilson(right / n, n)
        parts.append(f"{what} {right} of {n}, {100 * right / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    return "; ".join(parts)


def _summary(found: list[Checked]) -> list[str]:
    verdicts = [one.verdicts for one in found]
    n, counts = len(found), Counter(verdicts)
    notes = [f"Verdicts as the test's: {_right(verdicts)}."]
    labelled = [(one.by_labels, test) for one, (_, test) in zip(found, verdicts, strict=True) if one.by_labels]
    if labelled:
        notes.append(f"The same with the train split's answers instead of the L-VLM's: {_right(labelled)}.")
    worse = {guard: counts[guard, WORSE] for guard in VERDICTS}
    notes.append(
        f"Worse by the test: {sum(worse.values())}; the guard called {worse[WORSE]} of them worse, "
        f"{worse[OPEN]} not told apart, {worse[BETTER]} better. It recommends a levelled model only if that is better."
    )
    alarms = {test: counts[WORSE, test] for test in VERDICTS}
    notes.append(f"Called worse by the guard: {sum(alarms.values())}; better by the test: {alarms[BETTER]}.")
    held_out, test = (
        np.array(of) for of in zip(*((c.guard.gain, float(c.test.gains.mean())) for c in found), strict=True)
    )
    if n > 3 and held_out.std() and test.std():
        r = float(np.corrcoef(held_out, test)[0, 1])
        ends = [math.tanh(math.atanh(min(r, 1 - 1e-12)) + side * Z / math.sqrt(n - 3)) for side in (-1, 1)]
        notes.append(
            f"Correlation of both changes: {r:.3f} [{ends[0]:.3f}, {ends[1]:.3f}], n = {n}; "
            f"mean difference, held-out minus test: {100 * float(np.mean(held_out - test)):+.1f} points."
        )
    return notes
