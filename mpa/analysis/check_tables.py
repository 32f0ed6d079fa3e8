"""The checks of the paper's analysis as tables, from result files alone: `scripts/checks.py` prints them.

All intervals are 95 %: of shares by Wilson's score, of accuracies by a bootstrap over the questions, of differences by `mpa.answers.paired`.
"""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from mpa.analysis.calibration import Reliability
from mpa.analysis.table_formats import NAMES, Estimate, Figure, Table, names
from mpa.answers.answer_types import ANSWER_TYPES, QUESTION_TYPES, answer_type, question_type
from mpa.answers.intervals import wilson
from mpa.data import DATASETS
from mpa.files import records
from mpa.method.verdict import NO_ANNOTATION, in_order
from mpa.runs import comparable, scoring
from mpa.runs.case import Case, checked_against_labels, inspected
from mpa.runs.comparable import NotComparable, Pairs
from mpa.runs.evaluations import Evaluation
from mpa.runs.folders import ParitySet
from mpa.runs.layout import MPA, Cell, RunFiles
from mpa.runs.trainings import Runs, SeedGroup, Training


def percent(k: float, n: int) -> Estimate | str:
    """A share of n in percent with its interval."""
    if not n:
        return "–"
    low, high = wilson(k / n, n)
    return Estimate(100 * k / n, 100 * low, 100 * high)


def mean(values) -> Estimate | str:
    """The mean of scores, in points, with its interval."""
    values = list(map(float, values))
    if not values:
        return "–"
    found = scoring.summary(values)
    return Estimate(100 * found["score"], *(100 * bound for bound in found["ci95"]))


def points(*found: Pairs) -> Estimate | str:
    """A paired difference in points; of several seeds the mean of theirs."""
    if not found or not all(len(pairs.gains) for pairs in found):
        return "–"
    value = float(np.mean([pairs.gains.mean() for pairs in found]))
    return Estimate(100 * value, *(100 * bound for bound in comparable.interval(found)), sign=True)


def difference(row: dict, name: str, *evaluations: tuple[Evaluation, Evaluation]) -> list[Pairs]:
    """Put `points` of these comparisons, one for each seed, into a row; where they are none, a note that says why."""
    notes = row.setdefault("notes", [])
    try:
        found = [comparable.compare(*pair) for pair in evaluations]
    except NotComparable as error:
        notes.append(f"{name}: {error}")
        return []
    row[name] = points(*found)
    notes += [f"{name}: {note}" for note in dict.fromkeys(note for pairs in found for note in pairs.notes)]
    return found


# --- inspection ------------------------------------------------------------------------------------------


def reasons_table(case: Case) -> Table:
    """How many annotations PI kept and rejected, by reason, and how many of those are right where a label tells."""
    cell, samples, right = case.cell, case.samples, Counter()
    checked = checked_against_labels(case, [s for s in samples if s.question and s.annotation])
    for sample, is_right in checked:
        right[sample.reason, is_right] += 1
    table = Table(
        "reasons",
        f"{cell.dataset}, {cell.svlm} from {cell.lvlm}: PI's verdicts",
        {"reason": str, "samples": float, "share, %": Estimate, "with a label": float, "right annotation, %": Estimate},
    )
    counts = Counter(s.reason for s in samples)
    for reason in in_order(counts):
        n, known = counts[reason], right[reason, True] + right[reason, False]
        row = {"reason": reason, "samples": n, "share, %": percent(n, len(samples)), "with a label": known}
        table.rows.append(row | {"right annotation, %": percent(right[reason, True], known)})
    table.notes.append("Right: equal (matcher tolerant) to the human answer to the same question about the same image.")
    return table


def calibration_table(cell: Cell, found: list[Reliability]) -> Table:
    """The probabilities of each model's answers beside how many are right, in all and in those of at least 90 %."""
    columns = {"model": str, "right means": str, "n": float, "mean probability, %": Figure, "right, %": Estimate}
    columns |= {"calibration error, points": Figure, "n of 90 % and more": float, "of these right, %": Estimate}
    table = Table("calibration", f"{cell.dataset}, {cell.svlm} from {cell.lvlm}: probabilities of answers", columns)
    for one in found:
        sure = one.right[one.probabilities >= 0.9]
        row = {"model": one.model, "right means": one.what, "n": len(one.right)}
        row |= {"mean probability, %": Figure(100 * float(one.probabilities.mean())), "right, %": mean(one.right)}
        row |= {"calibration error, points": Figure(100 * one.error), "n of 90 % and more": len(sure)}
        table.rows.append(row | {"of these right, %": mean(sure)})
    table.notes.append("Probability: of the whole answer with its end. Calibration error: Guo et al. 2017, ten bins.")
    return table


def inspection_table(case: Case, n: int, seed: int) -> Table:
    cell = case.cell
    columns = {"verdict": str, "image": str, "question": str, "annotation": str, "L-VLM": str, "S-VLM": str}
    table = Table(
        "inspection", f"{cell.dataset}, {cell.svlm} from {cell.lvlm}: up to {n} kept and {n} rejected samples", columns
    )
    for s in inspected(case.samples, n, seed):
        texts = [
            ("" if text is None else text[:200]) for text in (s.question, s.annotation, s.lvlm_answer, s.svlm_answer)
        ]
        row = dict(zip(columns, [s.reason, Path(s.image_path).name, *texts], strict=True))
        table.rows.append(row | {"notes": [s.detail[:200]] if s.reason == NO_ANNOTATION else []})
    folders = sorted({str(Path(s.image_path).parent) for s in case.samples})
    table.notes.append(f"Drawn with seed {seed}. Images in {', '.join(folders[:3])}.")
    return table


# --- coverage --------------------------------------------------------------------------------------------


def _by(kind, pairs) -> Counter:
    return Counter(kind(question, answer) for question, answer in pairs if question and answer)


def coverage_table(case: Case, of: str) -> Table:
    """D_PA, D_PI, human train questions and test questions by answer or question type (`of`: "answer" or "question")."""
    cell, task = case.cell, case.task
    kind = (lambda q, a: answer_type(a, task)) if of == "answer" else (lambda q, a: question_type(q))
    samples = [s for s in case.samples if s.question and s.annotation]
    sets = {
        "D_PA": _by(kind, [(s.question, s.annotation) for s in samples]),
        "D_PI": _by(kind, [(s.question, s.annotation) for s in case.kept]),
        "human": _by(kind, [(s.ground_truth_question, (s.ground_truth or [None])[0]) for s in case.samples]),
    }
    before, after = case.evaluation(cell.svlm), case.evaluation(case.model)
    columns = {f"{of} type": str} | {f"{name}, %": Estimate for name in sets}
    columns |= {"test questions": float, "before": Estimate, "after": Estimate, "gain": Estimate}
    table = Table(f"{of}-types", f"{cell.dataset}, {cell.svlm} from {cell.lvlm}: coverage by {of} type", columns)
    tested = _tested(kind, before, after, table.notes)
    for name in ANSWER_TYPES if of == "answer" else QUESTION_TYPES:
        shares = {f"{which}, %": percent(found[name], found.total()) for which, found in sets.items()}
        pairs = tested.get(name)
        if not (pairs or any(found[name] for found in sets.values())):
            continue
        was, now = pairs.scores if pairs else ((), ())
        row = {f"{of} type": name} | shares | {"test questions": len(was), "before": mean(was), "after": mean(now)}
        table.rows.append(row | {"gain": points(pairs) if pairs else "–"})
    sizes = ", ".join(f"{name} {found.total():,}" for name, found in sets.items())
    table.notes.append(
        f"Samples: {sizes}. Test questions by the type of their first answer; scores by the main metric."
    )
    return table


def _tested(kind, before: Evaluation | None, after: Evaluation | None, notes: list[str]) -> dict[str, Pairs]:
    """{type: the test questions that both evaluations can be compared on}; where they cannot, a note says why."""
    if not (before and after):
        return {}
    try:
        pairs = comparable.compare(before, after)
    except NotComparable as error:
        notes.append(f"No test questions: {error}")
        return {}
    notes += pairs.notes
    asked = (before.records[place] for place in pairs.places[0])
    kinds = np.array([kind(r["GT_question"], scoring.answers_of(r)[0]) for r in asked])
    return {str(name): pairs.of(kinds == name) for name in set(kinds)}


# --- two L-VLMs ------------------------------------------------------------------------------------------


def overlap_table(runs: Runs) -> Table:
    """Each two L-VLMs that teach one S-VLM on one dataset in one folder: parity sets, their overlap, and what each gives."""
    columns = {"dataset": str, "S-VLM": str, "run": str, "L-VLMs": str, "parity sets": str, "images in both": Estimate}
    columns |= {"same question": float, "same answer": float, "gains": str, "second minus first": Estimate}
    table = Table("overlap", "Two L-VLMs for one S-VLM", columns)
    by_place = {}
    for one in runs.of_mpa:
        by_place.setdefault((one.file.parent, one.cell.dataset, one.cell.svlm), []).append(one)
    for _, found in sorted(by_place.items(), key=str):
        for pair in combinations(sorted(found, key=lambda one: one.cell), 2):
            table.rows.append(_overlap(runs, pair))
    table.notes.append(
        "Images in both: % of the smaller parity set. Gains: points of accuracy; the difference is paired."
    )
    return table


def _overlap(runs: Runs, pair: tuple[ParitySet, ParitySet]) -> dict:
    sets, cells, folder = (
        [records.read_parity(one.file) for one in pair],
        [one.cell for one in pair],
        pair[0].file.parent,
    )
    by_image = [{r["image"]: tuple(turn["value"] for turn in r["conversations"][:2]) for r in found} for found in sets]
    both = by_image[0].keys() & by_image[1].keys()
    asked = [image for image in both if by_image[0][image][0] == by_image[1][image][0]]
    row = {"dataset": cells[0].dataset, "S-VLM": cells[0].svlm, "run": folder.name}
    row |= {"L-VLMs": " and ".join(cell.lvlm for cell in cells), "parity sets": " and ".join(str(len(s)) for s in sets)}
    row |= {"images in both": percent(len(both), min(map(len, by_image))), "same question": len(asked)}
    row["same answer"] = sum(by_image[0][image] == by_image[1][image] for image in asked)
    before = runs.evaluation(cells[0].dataset, cells[0].svlm, folder)
    after = [runs.evaluation(cell.dataset, RunFiles(folder, cell).levelled().name, folder) for cell in cells]
    if before and all(after):
        both = [{}, {}]
        for one, e in zip(both, after, strict=True):
            difference(one, "gain", (before, e))
        row["gains"] = " and ".join(str(one.get("gain", "–")) for one in both)
        row["notes"] = [note for one in both for note in one["notes"]]
        difference(row, "second minus first", after)
    return row


# --- a corrupted L-VLM -----------------------------------------------------------------------------------


def degraded_table(runs: Runs) -> Table:
    """What PI keeps of corrupted annotations, and what they do to the S-VLM, against the same run without them."""
    columns = NAMES | {
        "run": str,
        "corrupted": str,
        "annotations": float,
        "L-consistent, %": Estimate,
        "kept, %": Estimate,
    }
    columns |= {"others kept, %": Estimate, "parity samples": float, "accuracy": Estimate, "minus MPA's": Estimate}
    columns |= {"of this type": Estimate, "minus MPA's, of this type": Estimate}
    table = Table("degraded", "An L-VLM that is wrong about one type of answer", columns)
    trainings = {(t.folder, t.cell, t.variant): t for t in runs.trainings}
    for one in sorted(runs.parity, key=lambda one: (*one.cell, str(one.file.parent))):
        corrupt, folder = one.meta["settings"].get("corrupt"), one.file.parent
        if not corrupt:
            continue
        bad, others = (one.meta["survived"][name] for name in ("corrupted", "others"))
        row = names(one.cell) | {"run": folder.name, "annotations": bad["n"], "parity samples": one.meta["n"]}
        row["corrupted"] = f"{100 * corrupt['share']:g} % of {corrupt['type']}, {corrupt['where']}"
        row["L-consistent, %"] = percent(bad["consistent"], bad["n"])
        row |= {"kept, %": percent(bad["parity"], bad["n"]), "others kept, %": percent(others["parity"], others["n"])}
        for t in trainings.values():
            if (t.folder, t.cell, t.pi) == (folder, one.cell, one.meta):
                row |= _against_mpa(t.after, trainings.get((folder, one.cell, MPA)), corrupt["type"])
        table.rows.append(row)
    table.rows.sort(key=lambda row: [str(row[name]) for name in ("dataset", "L-VLM", "S-VLM", "run", "corrupted")])
    table.notes.append("both: the L-VLM repeats its wrong answer. annotation: it does not, so PI can see it.")
    return table


def _against_mpa(after: Evaluation, mpa: Training | None, kind: str) -> dict:
    """Accuracy after a training, over all questions and over those of one answer type, and minus that after MPA's."""
    task = DATASETS[after.dataset].task
    of_type = np.array([answer_type(scoring.answers_of(r)[0], task) == kind for r in after.records])
    row = {"accuracy": mean(after.scores), "of this type": mean(after.scores[of_type])}
    for pairs in difference(row, "minus MPA's", (mpa.after, after)) if mpa else ():
        row["minus MPA's, of this type"] = points(pairs.of(of_type[pairs.places[1]]))
    return row


# --- transfer and sweeps ---------------------------------------------------------------------------------


def transfer_table(runs: Runs) -> Table:
    """Rows: what the S-VLM was trained on; columns: what it was evaluated on; cells: gain, over seeds the mean."""
    datasets = [name for name in DATASETS if any(t.cell.dataset == name for t in runs.trainings)]
    columns = {"L-VLM": str, "S-VLM": str, "trained on": str, "variant": str, **dict.fromkeys(datasets, Estimate)}
    table = Table("transfer", "Gain on each dataset by the dataset of training, in points", columns)
    for group in runs.groups:
        row = {"L-VLM": group.cell.lvlm, "S-VLM": group.cell.svlm, "trained on": group.cell.dataset}
        row["variant"] = group.name
        for dataset in datasets:
            found = [_on(runs, t, dataset) for t in group.seeds]
            if all(all(pair) for pair in found):
                difference(row, dataset, *found)
        table.rows.append(row)
    table.notes.append(
        "A negative number outside the row's own dataset is forgetting. Over several seeds: the mean of their gains."
    )
    return table


def _on(runs: Runs, training: Training, dataset: str) -> tuple[Evaluation | None, Evaluation | None]:
    """The S-VLM's evaluations on a dataset before and after a training."""
    after = runs.evaluation(dataset, training.after.model, training.folder)
    return after and runs.evaluation(dataset, training.cell.svlm, training.folder, after.content), after


def sweep_table(runs: Runs) -> Table:
    """The variants of each cell: samples, gain, and the paired difference to MPA."""
    columns = NAMES | {"variant": str, "seeds": float, "samples": Figure, "before": Estimate, "gain": Estimate}
    columns |= {"minus MPA's": Estimate, "n": float}
    table = Table("sweep", "Variants of the training, in points of accuracy", columns)
    of_cell = {}
    for group in runs.groups:
        of_cell.setdefault(group.cell, []).append(group)
    for groups in of_cell.values():
        mpa = {t.folder: t for group in groups if group.variant == MPA for t in group.seeds}
        table.rows += [_sweep_row(group, mpa) for group in groups]
    table.notes.append(
        "Over several seeds the mean of their differences; the interval is over the images with their questions."
    )
    return table


def _sweep_row(group: SeedGroup, mpa: dict[Path, Training]) -> dict:
    row, seeds = names(group.cell) | {"variant": group.title}, group.seeds
    row |= {"seeds": len(seeds), "n": seeds[0].after.summary["n"]}
    samples = [t.samples for t in seeds if t.samples is not None]
    row["samples"] = Figure(float(np.mean(samples)), digits=0) if samples else None
    if all(t.before for t in seeds):
        row["before"] = mean(seeds[0].before.scores)
        difference(row, "gain", *((t.before, t.after) for t in seeds))
    if group.variant != MPA and all(t.folder in mpa for t in seeds):
        difference(row, "minus MPA's", *((mpa[t.folder].after, t.after) for t in seeds))
    return row
