"""The trained S-VLMs in run folders, each with its evaluations before and after; and those that differ only by the seed."""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mpa.files.records import meta_path, short_name
from mpa.method import rules
from mpa.method.presets import method_name
from mpa.runs.evaluations import Evaluation
from mpa.runs.folders import ParitySet, find
from mpa.runs.layout import MPA, Cell, RunFiles, is_ratings, may_be_levelled


def _as_they_are(names: str) -> dict[str, str]:
    return {name: name for name in names.split()}


# Settings by which trainings are different experiments, not seeds of one: {stage: {name in its meta file: name here}}.
TELLING = {
    "PA": {"limit": "images", "sample": "sampled images"}
    | _as_they_are("temperature top_p keep_refusals questions_per_image"),
    "PI": _as_they_are(" ".join(["preset match hold_out", *rules.names()])),
    "PL": _as_they_are(
        "num_train_epochs max_steps learning_rate vision_lr merger_lr lr_scheduler_type samples_per_step optim lora_enable "
        "lora_rank freeze_vision_tower freeze_llm freeze_merger"
    ),
    "Eval": {"limit": "test questions", "sample": "sampled test questions"}
    | _as_they_are("max_new_tokens min_pixels max_pixels max_tiles"),
}


@dataclass
class Training:
    """A trained and evaluated S-VLM. `pl`, `pi` and `pa` are its stages' meta files, {} for one that is not there."""

    cell: Cell
    variant: str
    after: Evaluation
    before: Evaluation | None
    pl: dict
    pi: dict
    pa: dict

    @property
    def folder(self) -> Path:
        return self.after.path.parent

    @property
    def seed(self) -> int:
        return self.pl.get("settings", self.after.meta["settings"]).get("seed", 0)

    @property
    def samples(self) -> int | None:
        return self.pl.get("samples")

    @property
    def parity_samples(self) -> int | None:
        """Without the anchors that were trained on beside them."""
        return self.samples and self.samples - (self.pi.get("funnel") or {}).get("anchors", 0)

    @property
    def method(self) -> str:
        """MPA, or another name if PI added anchors."""
        return method_name(self.pi.get("settings", {}).get("anchors"))

    @cached_property
    def models(self) -> dict[str, tuple[str, str]]:
        """{"L-VLM", "S-VLM": (path, digest of its files, "" if no meta file has it)}, those that are known."""
        before = self.before.meta if self.before else {}
        of_trainer = self.pl.get("converted_from") or self.pl.get("settings", {}).get("model_id")
        known = [("L-VLM", self.pa, self.pi.get("model_path_lvlm")), ("S-VLM", before, of_trainer)]
        found = {}
        for who, meta, stored in known:
            path = meta.get("model_path") or stored
            digest = re.search(r"@[0-9a-f]{16}$", str(meta.get("settings", {}).get("model")))
            if path:
                found[who] = (os.path.realpath(path) if os.path.isdir(path) else path, digest[0] if digest else "")
        return found

    @cached_property
    def settings(self) -> dict:
        """The settings of TELLING, those of stages whose meta file is there."""
        metas = {"PA": self.pa, "PI": self.pi, "PL": self.pl, "Eval": self.after.meta}
        of = {stage: dict(meta.get("settings", {})) for stage, meta in metas.items()}
        if of["PI"]:
            of["PI"].setdefault("anchors", "none")
        if pl := of["PL"]:
            parts = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
            device, accumulation, devices = (pl.get(part) or 1 for part in parts)
            pl["samples_per_step"] = device * accumulation * devices
        return {
            here: of[stage].get(there) for stage, names in TELLING.items() if of[stage] for there, here in names.items()
        }


@dataclass
class SeedGroup:
    """The trainings of one cell, variant and settings, one for each seed. `label` tells it from others of the cell."""

    cell: Cell
    variant: str
    label: str
    seeds: list[Training]

    @property
    def name(self) -> str:
        """The variant; MPA with anchors is not called `mpa`."""
        method = self.seeds[0].method
        return method if self.variant == MPA and method != "MPA" else self.variant

    @property
    def title(self) -> str:
        return f"{self.name}, {self.label}" if self.label else self.name


class Runs:
    """All that is in these folders and below. Raises InputError for a missing folder and for a broken meta file."""

    def __init__(self, folders: Iterable[Path]):
        self.folders = {folder.path: folder for folder in find(folders)}
        found = self.folders.values()
        evaluated = [file for folder in found for file in folder.results("Eval") if meta_path(file).exists()]
        self.evaluations = list(map(Evaluation.read, evaluated))
        self.parity = [one for folder in found for one in folder.parity.values()]
        self.ratings = [folder.path / name for folder in found for name in folder.names if is_ratings(name)]

    @cached_property
    def trainings(self) -> list[Training]:
        return list(filter(None, map(self._training, self.evaluations)))

    @property
    def of_mpa(self) -> list[ParitySet]:
        """The parity sets from which MPA trains, of no other matcher, without anchors added later …"""
        return [one for one in self.parity if not one.ending]

    @cached_property
    def cells(self) -> list[Cell]:
        return sorted({one.cell for one in (*self.parity, *self.trainings)})

    @cached_property
    def groups(self) -> list[SeedGroup]:
        """The trainings by cell, variant, and those settings that differ between trainings of one cell and variant.

        Two that differ in no setting, not even the seed, are told apart by their folders.
        """
        by_variant, found = defaultdict(list), []
        for training in self.trainings:
            by_variant[training.cell, training.variant].append(training)
        for (cell, variant), trainings in by_variant.items():
            by_label = defaultdict(list)
            settings = [models | t.settings for models, t in zip(_told_apart(trainings), trainings, strict=True)]
            telling = ("L-VLM", "S-VLM", *(name for names in TELLING.values() for name in names.values()))
            values = {name: {str(of[name]) for of in settings if name in of} for name in telling}
            differing = [name for name in telling if len(values[name]) > 1]
            for t, of in zip(trainings, settings, strict=True):
                by_label[", ".join(f"{name} {of.get(name)}" for name in differing)].append(t)
            for label, seeds in by_label.items():
                if len({t.seed for t in seeds}) == len(seeds):
                    found.append(SeedGroup(cell, variant, label, sorted(seeds, key=lambda t: t.seed)))
                    continue
                for t in seeds:
                    folder = os.path.relpath(t.folder)
                    found.append(SeedGroup(cell, variant, f"{label}, {folder}" if label else folder, [t]))
        return sorted(found, key=lambda one: (one.cell, one.variant, one.label))

    def evaluation(self, dataset: str, model: str, folder: Path | None = None, content: str | None = None):
        """The evaluation of a model in `folder`; else one in another folder, of the same questions (`content`).

        None if there is none, or if those in other folders are of several models with one name, or of several sets of
        questions.
        """
        named = self._by_name.get((dataset, model), [])
        own = [found for found in named if found.path.parent == folder]
        others = [found for found in named if content in (None, found.content)]
        alike = len({(found.meta["settings"]["model"], found.content) for found in others}) == 1
        return own[0] if own else others[0] if alike else None

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], list[Evaluation]]:
        found = defaultdict(list)
        for evaluation in self.evaluations:
            found[evaluation.dataset, evaluation.model].append(evaluation)
        return found

    def _training(self, after: Evaluation) -> Training | None:
        """The training whose model was evaluated; None for a base model, and for a test on another dataset."""
        folder = self.folders[after.path.parent]
        levelled = folder.levelled(after.model, [one.cell for one in self.parity])
        if levelled is None:
            if may_be_levelled(after.model) and after.model not in {one.cell.svlm for one in self.parity}:
                print(f"warning: {after.path}: left out; no parity set says which models it is of.", file=sys.stderr)
            return None
        cell = levelled.cell
        if cell.dataset != after.dataset:
            return None
        before = self.evaluation(cell.dataset, cell.svlm, folder.path, after.content)
        pa = folder.meta(RunFiles(folder.path, cell).pa)
        training = Training(cell, levelled.variant, after, None, levelled.pl, levelled.pi, pa)
        if before and before.path.parent != folder.path and _other_model(training, before):
            before = None
        return replace(training, before=before)


def _told_apart(trainings: list[Training]) -> list[dict[str, str]]:
    """For each training what tells its models from others with the same short names: their digests if all are known, else their paths."""
    told = [{} for _ in trainings]
    for who in ("L-VLM", "S-VLM"):
        known = [t.models.get(who) for t in trainings]
        by_digest = all(model is None or model[1] for model in known)
        for of, model in zip(told, known, strict=True):
            if model:
                of[who] = short_name(model[0]) + model[1] if by_digest else model[0]
    return told


def _other_model(training: Training, before: Evaluation) -> bool:
    """Is an evaluation in another folder that of another model than the one that was trained, with its short name?"""
    of_before = replace(training, before=before).models["S-VLM"][0]
    return training.models.get("S-VLM", (of_before,))[0] != of_before
