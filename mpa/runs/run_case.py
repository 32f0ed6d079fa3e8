"""The files of one cell of a run together: its samples by PI's verdict, evaluations, training log, and what labels say."""

import contextlib
from functools import cached_property
from pathlib import Path

from mpa.answers.matching import Match
from mpa.answers.normalise import normalise
from mpa.data.loading import train_labels
from mpa.files import records
from mpa.files.records import InputError
from mpa.method.verdict import NO_ANNOTATION
from mpa.runs.evaluations import Evaluation, read_meta
from mpa.runs.run_samples import RunSamples, Sample, task_of
from mpa.runs.runs import Cell, model_name


class Case:
    """The files of one cell of a run; those that are missing are None or empty."""

    def __init__(self, folder: Path, cell: Cell):
        self.folder, self.cell, self.task = folder, cell, task_of(cell)
        self.model = model_name(cell)
        self.run = RunSamples(folder, cell)

    @cached_property
    def kept(self) -> list[Sample]:
        return [s for s in self.run.samples if s.kept]

    @cached_property
    def annotated(self) -> list[Sample]:
        """The samples with a question and an answer."""
        return [s for s in self.run.samples if s.question and s.annotation and s.reason != NO_ANNOTATION]

    @cached_property
    def consistent(self) -> list[Sample]:
        """The samples on which the L-VLM agrees with itself."""
        return [s for s in self.run.samples if s.consistent]

    @cached_property
    def usable(self) -> list[Sample]:
        """Those that the L-VLM has answered."""
        return [s for s in self.run.samples if s.consistent is not None]

    @cached_property
    def used(self) -> dict:
        """The settings of PA, and over them of PI, so that no advice is what the run has done; {} without meta files."""
        found = {}
        for file in map(records.meta_path, (self.run.pa_json, self.run.train_json)):
            with contextlib.suppress(InputError):
                found |= read_meta(file)["settings"]
        return found

    @property
    def anchored(self) -> bool:
        return self.used.get("anchors", "none") != "none"

    def evaluation(self, model: str, dataset: str | None = None) -> Evaluation | None:
        path = self.folder / f"Eval_{model}_{dataset or self.cell.dataset}.json"
        return Evaluation.read(path) if path.exists() and records.meta_path(path).exists() else None

    @cached_property
    def history(self) -> list[dict]:
        """What the trainer logged, by step; [] if it has not trained or the file is of another kind."""
        path = self.folder / self.model / "trainer_state.json"
        content = records.read_json(path, finite=False) if path.exists() else {}  # transformers writes it
        history = content.get("log_history") if isinstance(content, dict) else None
        history = history if isinstance(history, list) else []
        return [e for e in history if isinstance(e, dict) and isinstance(e.get("step"), int | float)]

    @cached_property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.history if isinstance(entry.get("loss"), int | float)]


def _labelled(case: Case) -> dict[tuple[str, str], list[str]]:
    """{(image's file name, normalised question): answers} of the dataset's train questions, and of the PA file's."""
    labels = train_labels(case.cell.dataset)
    known = {(Path(s.image_path).name, normalise(s.question)): list(s.answers) for s in labels}
    for s in case.run.samples:
        if s.ground_truth_question and s.ground_truth:
            known[Path(s.image_path).name, normalise(s.ground_truth_question)] = s.ground_truth
    return known


def checked_against_labels(case: Case, samples: list[Sample]) -> list[tuple[Sample, bool]]:
    """(sample, whether its annotation is right) for those whose question a label of the same image answers."""
    known, match = _labelled(case), Match("tolerant")
    found = []
    for s in samples:
        answers = known.get((Path(s.image_path).name, normalise(s.question)))
        if answers:
            found.append((s, any(match(s.annotation, answer) for answer in answers)))
    return found
