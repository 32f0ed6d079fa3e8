"""Evaluations as tables read them: the means from the meta file, each question's score from the Eval file. Nothing is scored
anew.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mpa import records, scoring
from mpa.datasets import DATASETS
from mpa.presets import PRESETS
from mpa.records import InputError


@dataclass
class Evaluation:
    """An Eval file: its path and its meta file's content."""

    path: Path
    meta: dict

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Read the meta file of an Eval file. Raises InputError if it is broken or without scores."""
        found, file = cls(path, read_meta(records.meta_path(path))), records.meta_path(path)
        settings = found.meta["settings"]
        known = settings.get("dataset") in DATASETS and settings.get("preset") in PRESETS
        if not known or not all(isinstance(settings.get(name), str) for name in ("model", "content")):
            raise InputError(f"{file}: not the meta file of an evaluation; evaluate again, or move it away.")
        try:
            valid = isinstance(found.meta["model_path"], str) and len(found.summary["ci95"]) == 2
            valid = valid and all(isinstance(found.summary[name], int | float) for name in ("score", "n"))
        except (KeyError, TypeError):
            valid = False
        if not valid:
            raise InputError(f"{file}: has no score by {found.metric!r}; evaluate again, with --restart.")
        return found

    @property
    def dataset(self) -> str:
        return self.meta["settings"]["dataset"]

    @property
    def content(self) -> str:
        """The digest of all requests: equal for two evaluations of the same questions, prompts and images."""
        return self.meta["settings"]["content"]

    @property
    def model(self) -> str:
        """The model's short name."""
        return records.short_name(self.meta["model_path"])

    @cached_property
    def metric(self) -> str:
        """The headline metric of the dataset and the preset."""
        return scoring.metric_names(self.dataset, self.meta["settings"]["preset"])[0]

    @property
    def summary(self) -> dict:
        """{"score", "ci95", "n"} by the headline metric, as the meta file holds it."""
        return self.meta["scores"][self.metric]

    @cached_property
    def records(self) -> list[dict]:
        return records.read_records(self.path, "Eval")

    @cached_property
    def scores(self) -> np.ndarray:
        """Each question's score by the headline metric [n], from 0 to 1, as the records hold it.

        The file's text is searched: parsing its JSON takes ten times as long. JSON escapes the quotes and line ends in
        a text, so no answer can look like the start of `scores`. A file with another layout is parsed. Raises InputError
        if the scores do not add up to the meta file's.
        """
        try:
            text = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); evaluate again.") from None
        found = re.findall(rb'"scores": \{\n {12}"%b": ([\d.e-]+)' % self.metric.encode(), text)
        if len(found) != self.summary["n"]:
            found = [r.get("scores", {}).get(self.metric, float("nan")) for r in self.records]
        scores = np.array(found, dtype=float)
        if len(scores) != self.summary["n"] or not abs(scores.sum() / len(scores) - self.summary["score"]) < 1e-6:
            raise InputError(
                f"{self.path}: its records' scores do not add up to its meta file's; evaluate again, with --restart."
            )
        return scores


def read_meta(file: Path) -> dict:
    """The content of a meta file or a train_meta.json. Raises InputError if it has no settings."""
    meta = records.read_json(file)
    if not isinstance(meta, dict) or not isinstance(meta.get("settings"), dict):
        raise InputError(f"{file}: not a stage's meta file; run the stage again, or move it away.")
    return meta


def gains(before: Evaluation, after: Evaluation) -> np.ndarray:
    """after - before [n] for each question that both were asked. Raises InputError where an id means two questions."""
    if before.content == after.content:  # the same questions in the same order
        return after.scores - before.scores
    places = [{str(r["question_id"]): i for i, r in enumerate(e.records)} for e in (before, after)]
    pairs = scoring.same_questions(before.records, after.records)
    was, now = ([places[i][str(pair[i]["question_id"])] for pair in pairs] for i in (0, 1))
    return after.scores[now] - before.scores[was]
