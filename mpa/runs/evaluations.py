"""Evaluations as tables read them: the means from the meta file, each question's score from the Eval file. Nothing is scored
anew.
"""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mpa.data import DATASETS
from mpa.files import records
from mpa.files.records import InputError
from mpa.method.presets import PRESETS
from mpa.models.identity import adapted, identity
from mpa.models.model_files import files_of
from mpa.runs import scoring


@dataclass
class Evaluation:
    """An Eval file: its path and its meta file's content, {} if it has none. `scored_as` is the dataset whose metrics count, if not
    its own.
    """

    path: Path
    meta: dict
    scored_as: str | None = None

    @classmethod
    def of(cls, path: Path, found: list[dict], scored_as: str, preset: str, meta: dict | None = None) -> "Evaluation":
        """Records that were read already, and are scored anew by the metrics of the dataset `scored_as`."""
        settings = dict((meta or {}).get("settings", {}))
        settings.pop("content", None)  # the records may have got other answers
        one = cls(path, {"model_path": "", **(meta or {}), "settings": {"preset": preset, **settings}}, scored_as)
        one.records, one.scores = found, np.array(scoring.values(found, scoring.metric_names(scored_as, preset)[0]))
        return one

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Read the meta file of an Eval file. Raises InputError if it is broken or without scores."""
        file = records.meta_path(path)
        found = cls(path, read_meta(file))
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
        return scoring.metric_names(self.scored_as or self.dataset, self.meta["settings"]["preset"])[0]

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

        The file's text is searched: parsing its JSON takes several times as long. JSON escapes the quotes and line ends in a
        text, so no answer can look like the start of a field. A file with another layout is parsed. Raises InputError if the
        scores do not add up to the meta file's.
        """
        found = re.findall(rb'"scores": \{\n {12}"%b": ([\d.e-]+)' % self.metric.encode(), self._text())
        if len(found) != self.summary["n"]:
            found = [(r.get("scores") or {}).get(self.metric, float("nan")) for r in self.records]
        scores = np.array(found, dtype=float)
        if len(scores) != self.summary["n"] or not abs(scores.sum() / len(scores) - self.summary["score"]) < 1e-6:
            raise InputError(
                f"{self.path}: its records' scores do not add up to its meta file's; evaluate again, with --restart."
            )
        return scores

    @cached_property
    def usable(self) -> np.ndarray:
        """Whether each question has a usable reply [n]; see `scoring.unusable`. Of all, if the meta file counts no other."""
        counts = self.meta.get("counts")
        counted = isinstance(counts, dict) and counts.keys() >= {"left_out", "finish_reason"}
        if "records" not in self.__dict__ and counted and not (counts["left_out"] or counts["finish_reason"]):
            return np.ones(len(self.scores), dtype=bool)
        return np.array([not scoring.unusable(r) for r in self.records], dtype=bool)

    @cached_property
    def images(self) -> tuple[list | None, list]:
        """(each question's image by its content, by its path) [n]; the first is None for a file that does not say it.

        A question without an image is its own.
        """
        if "records" not in self.__dict__:
            found = re.findall(rb'\n {8}"image_(hash|path)": (".*")', self._text())
            hashes, paths = ([image for name, image in found if name == one] for one in (b"hash", b"path"))
            if len(paths) == len(self.scores):
                return (hashes if len(hashes) == len(paths) else None), paths
        # As the file's text has them, so that both ways give the same.
        hashes = [r.get("image_hash") for r in self.records]
        paths = [r["image_path"] or f"question {r['question_id']}" for r in self.records]
        return _in_json(hashes) if all(hashes) else None, _in_json(paths)

    def _text(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); evaluate again.") from None

    @property
    def lost(self) -> str:
        """How many of the n replies are errors, or cut, in words; "" if none is."""
        return "" if self.usable.all() else scoring.lost(self.records)

    @cached_property
    def retrained(self) -> bool:
        """Are the model's weights here, and other ones than those that answered?

        `settings["model"]` has the digest of the files that answered (`mpa.models.identity`).
        """
        digest = re.search(r"@(\w+)$", str(self.meta["settings"].get("model")))
        folder = next((f for f in (self.path.parent / self.model, Path(self.meta["model_path"])) if f.is_dir()), None)
        if not digest or not folder or not self.model or not any(f.suffix == ".safetensors" for f in files_of(folder)):
            return False
        with contextlib.suppress(InputError, OSError):  # it cannot be loaded either
            base = adapted(str(folder))
            gone = base and not Path(base).is_dir() and (os.path.isabs(base) or base.count("/") != 1)
            return not gone and not identity(str(folder)).endswith(digest[0])
        return False


def read_meta(file: Path) -> dict:
    """The content of a meta file or a train_meta.json. Raises InputError if it has no settings, or counts that are none.

    That of another command's result, such as an export, has a `kind` and may have no settings.
    """
    meta = records.read_json(file)
    if not isinstance(meta, dict) or not isinstance(meta.get("settings", {} if "kind" in meta else None), dict):
        raise InputError(f"{file}: not a stage's meta file; run the stage again, or move it away.")
    funnel = meta.get("funnel") or {}
    counts = {name: meta.get(name) for name in ("seconds", "samples", "steps", "n", "unfinished")}
    counts |= funnel if isinstance(funnel, dict) else {"funnel": str(funnel)}
    for name, value in counts.items():
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise InputError(
                f"{file}: {name!r} should be a number: {str(value)[:80]}. Run the stage again, or move it away."
            )
    return meta


def _in_json(texts: list[str]) -> list[bytes]:
    return [json.dumps(text, ensure_ascii=False).encode("utf-8", "backslashreplace") for text in texts]
