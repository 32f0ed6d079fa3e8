"""What run folders hold: evaluations, trained S-VLMs and parity sets, found by their meta files.

Model, dataset, settings and seed of a result are those of its meta file. Only the variant, that is what PL trained on, is
read from a name: PL_<lvlm>_<svlm>_<dataset>_<variant>, as scripts/demo.sh names them; without one it is `mpa`.
"""

import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from mpa.data import DATASETS
from mpa.files import records
from mpa.files.records import InputError
from mpa.method.presets import method_name
from mpa.runs.evaluations import Evaluation, read_meta
from mpa.runs.layout import Cell

_PARITY = re.compile(rf"PI_(.+)_train_\1_(.+?)_({'|'.join(map(re.escape, DATASETS))})(?:_(.+))?")
# Settings by which trainings are different experiments, not seeds of one: {name: (file, its name there)}.
TELLING = {
    "images": ("PA", "limit"),
    "sampled images": ("PA", "sample"),
    **{name: ("PA", name) for name in "temperature top_p keep_refusals questions_per_image".split()},
    **{name: ("PI", name) for name in "preset match hold_out anchors max_per_question max_per_answer".split()},
    **{name: ("PI", name) for name in "min_probability blind votes min_agreement".split()},
    **{name: ("PL", name) for name in "num_train_epochs max_steps learning_rate vision_lr merger_lr".split()},
    **{name: ("PL", name) for name in "lr_scheduler_type samples_per_step optim lora_enable lora_rank".split()},
    **{name: ("PL", name) for name in "freeze_vision_tower freeze_llm freeze_merger".split()},
    "test questions": ("Eval", "limit"),
    "sampled test questions": ("Eval", "sample"),
    **{name: ("Eval", name) for name in "max_new_tokens min_pixels max_pixels max_tiles".split()},
}


class ParitySet(NamedTuple):
    """A parity set's file, and its meta file's content."""

    file: Path
    meta: dict


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
        known = [("L-VLM", self.pa, self.pi.get("model_path_lvlm"))]
        known.append(("S-VLM", before, self.pl.get("settings", {}).get("model_id")))
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
        of = {"PA": self.pa, "PI": self.pi, "PL": self.pl, "Eval": self.after.meta}
        of = {stage: dict(meta.get("settings", {})) for stage, meta in of.items()}
        if of["PI"]:
            of["PI"].setdefault("anchors", "none")
        if pl := of["PL"]:
            parts = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
            device, accumulation, devices = (pl.get(part) or 1 for part in parts)
            pl["samples_per_step"] = device * accumulation * devices
        return {name: of[stage].get(there) for name, (stage, there) in TELLING.items() if of[stage]}


@dataclass
class Experiment:
    """The trainings of one cell, variant and settings, one for each seed. `label` tells it from others of the cell."""

    cell: Cell
    variant: str
    label: str
    seeds: list[Training]

    @property
    def name(self) -> str:
        """The variant; MPA with anchors is not called `mpa`."""
        method = self.seeds[0].method
        return method if self.variant == "mpa" and method != "MPA" else self.variant

    @property
    def title(self) -> str:
        return f"{self.name}, {self.label}" if self.label else self.name


@dataclass
class Runs:
    """All that was found."""

    evaluations: list[Evaluation] = field(default_factory=list)
    parity: dict[tuple[Path, Cell, str], ParitySet] = field(default_factory=dict)  # by folder, cell and variant
    ratings: list[Path] = field(default_factory=list)

    @cached_property
    def trainings(self) -> list[Training]:
        return list(filter(None, map(self._training, self.evaluations)))

    @cached_property
    def cells(self) -> list[Cell]:
        return sorted({cell for _, cell, _ in self.parity} | {t.cell for t in self.trainings})

    @cached_property
    def experiments(self) -> list[Experiment]:
        """The trainings by cell, variant, and those settings that differ between trainings of one cell and variant.

        Two that differ in no setting, not even the seed, are told apart by their folders.
        """
        by_variant, found = defaultdict(list), []
        for training in self.trainings:
            by_variant[training.cell, training.variant].append(training)
        for (cell, variant), trainings in by_variant.items():
            by_label = defaultdict(list)
            settings = [models | t.settings for models, t in zip(_told_apart(trainings), trainings, strict=True)]
            telling = ("L-VLM", "S-VLM", *TELLING)
            values = {name: {str(of[name]) for of in settings if name in of} for name in telling}
            differing = [name for name in telling if len(values[name]) > 1]
            for t, of in zip(trainings, settings, strict=True):
                by_label[", ".join(f"{name} {of.get(name)}" for name in differing)].append(t)
            for label, seeds in by_label.items():
                if len({t.seed for t in seeds}) == len(seeds):
                    found.append(Experiment(cell, variant, label, sorted(seeds, key=lambda t: t.seed)))
                    continue
                for t in seeds:
                    folder = os.path.relpath(t.after.path.parent)
                    found.append(Experiment(cell, variant, f"{label}, {folder}" if label else folder, [t]))
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

    @cached_property
    def _prefixes(self) -> dict[str, Cell]:
        return {model_name(cell): cell for _, cell, _ in self.parity}

    def _training(self, after: Evaluation) -> Training | None:
        """The training whose model was evaluated; None for a base model, and for a test on another dataset."""
        if not after.model.startswith("PL_"):
            return None
        folder = after.path.parent
        pl = _meta_if_there(folder / after.model / "train_meta.json")
        train_json = Path(re.sub(r":[\d.]+$", "", str((pl.get("settings", {}).get("data_path") or [""])[0])))
        cell = self._cell(after.model, train_json)
        if cell is None:
            print(f"warning: {after.path}: left out; no parity set says which models it is of.", file=sys.stderr)
        if cell is None or cell.dataset != after.dataset:
            return None
        variant = after.model.removeprefix(model_name(cell)).removeprefix("_") or "mpa"
        pi = self._parity_set(cell, folder, train_json)
        pa = _meta_if_there(folder / f"PA_{cell.lvlm}_{cell.dataset}.meta.json")
        before = self.evaluation(cell.dataset, cell.svlm, folder, after.content)
        training = Training(cell, variant, after, None, pl, pi, pa)
        if before and before.path.parent != folder and _other_model(training, before):
            before = None
        return replace(training, before=before)

    def _parity_set(self, cell: Cell, folder: Path, train_json: Path) -> dict:
        """The meta file of the parity set from which a train file is: in this folder, or in that of the train file.

        A train file's name may go on after the dataset with a parity set's own ending, such as a matcher, and a baseline's.
        """
        match = _PARITY.fullmatch(train_json.stem)
        ending = match[4] if match and match[4] else ""
        while True:
            for place in (folder, train_json.parent.resolve()):
                if found := self.parity.get((place, cell, ending or "mpa")):
                    return found.meta
            if not ending:
                return {}
            ending = ending.rpartition("_")[0]

    def _cell(self, model: str, train_json: Path) -> Cell | None:
        """The cell whose names a trained model's name begins with, the longest; else that of its train file."""
        while model and model not in self._prefixes:
            model = model.rpartition("_")[0]
        match = _PARITY.fullmatch(train_json.stem)
        return self._prefixes.get(model) or (Cell(match[3], match[1], match[2]) if match else None)


def _told_apart(trainings: list[Training]) -> list[dict[str, str]]:
    """For each training what tells its models from others with the same short names: their digests if all are known, else their paths."""
    told = [{} for _ in trainings]
    for who in ("L-VLM", "S-VLM"):
        known = [t.models.get(who) for t in trainings]
        by_digest = all(model is None or model[1] for model in known)
        for of, model in zip(told, known, strict=True):
            if model:
                of[who] = records.short_name(model[0]) + model[1] if by_digest else model[0]
    return told


def _other_model(training: Training, before: Evaluation) -> bool:
    """Is an evaluation in another folder that of another model than the one that was trained, with its short name?"""
    of_before = replace(training, before=before).models["S-VLM"][0]
    return training.models.get("S-VLM", (of_before,))[0] != of_before


def model_name(cell: Cell) -> str:
    """The name of the folder of MPA's model."""
    return f"PL_{cell.lvlm}_{cell.svlm}_{cell.dataset}"


def find(folders: list[Path]) -> Runs:
    """All results in these folders and below. Raises InputError for a missing folder and for a broken meta file."""
    runs, seen = Runs(), set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Give run folders, or a folder that holds some.")
        for place, subfolders, files in os.walk(folder):
            real = Path(os.path.realpath(place))
            subfolders[:] = [] if real in seen else sorted(n for n in subfolders if not n.startswith("."))
            for name in () if real in seen else sorted(files):
                _take(runs, real, name)
            seen.add(real)
    return runs


def _take(runs: Runs, folder: Path, name: str) -> None:
    """Add one file of a run folder."""
    if name.startswith("ratings_") and name.endswith(".jsonl"):
        runs.ratings.append(folder / name)
    if not name.endswith(".meta.json"):
        return
    stem = name.removesuffix(".meta.json")
    if name.startswith("Eval_") and (folder / f"{stem}.json").exists():
        runs.evaluations.append(Evaluation.read(folder / f"{stem}.json"))
    elif name.startswith("PI_") and (match := _PARITY.fullmatch(stem)):
        if "kind" in (records.read_json(folder / name) or ()):  # an export of it
            return
        meta = read_meta(folder / name)
        lvlm, svlm = (meta.get(f"model_path_{who}", match[i]) for i, who in ((1, "lvlm"), (2, "svlm")))
        cell = Cell(match[3], records.short_name(lvlm), records.short_name(svlm))
        runs.parity[folder, cell, match[4] or "mpa"] = ParitySet(folder / f"{stem}.json", meta)


def _meta_if_there(file: Path) -> dict:
    return read_meta(file) if file.exists() else {}
