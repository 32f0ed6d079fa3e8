"""Run folders: which there are, and what is in one. Its files are listed once, and each meta file is read once.

What a result is about (dataset, models, variant) is in its meta file. The name of a file decides only where there is none: for
results of the released code, and of older versions.
"""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from mpa.data import DATASETS
from mpa.files.printable import printable
from mpa.files.records import InputError, meta_path, short_name
from mpa.runs.evaluations import read_meta
from mpa.runs.layout import (
    MPA,
    Cell,
    RunFiles,
    ending,
    is_result,
    may_be_levelled,
    may_be_train,
    models_of,
    parsed,
    train_meta,
)

T = TypeVar("T")


class ParitySet(NamedTuple):
    """A parity set's file, and its meta file's content. `ending` is that of one of another matcher, with anchors …"""

    file: Path
    cell: Cell
    ending: str
    meta: dict


class Levelled(NamedTuple):
    """A trained S-VLM: its cell, the variant, and the meta files of the trainer and of PI, {} for one that is not there."""

    cell: Cell
    variant: str
    pl: dict
    pi: dict


class RunFolder:
    """One folder. Broken meta files raise InputError where they are needed; `cells` goes by the names instead."""

    def __init__(self, path: Path):
        self.path, self.names = path, sorted(os.listdir(path))
        self._metas: dict[Path, dict] = {}

    def meta(self, file: Path) -> dict:
        """The meta file of a result, or the trainer's of a model's folder; {} if it is not there."""
        if file not in self._metas:
            beside = train_meta(file) if file.is_dir() else meta_path(file)
            self._metas[file] = read_meta(beside) if beside.exists() else {}
        return self._metas[file]

    def results(self, *stages: str) -> list[Path]:
        return [self.path / name for name in self.names if is_result(name, *stages)]

    @cached_property
    def parity(self) -> dict[str, ParitySet]:
        """The parity sets that have a meta file, by the stems of their names; also one whose file is still to be written."""
        stems = [name.removesuffix(".meta.json") for name in self.names if name.endswith(".meta.json")]
        metas = {stem: self.meta(self.path / f"{stem}.json") for stem in stems if may_be_train(f"{stem}.json")}
        found = {}
        for stem, meta in sorted(metas.items(), key=lambda pair: "model_path_svlm" not in pair[1]):
            cell = cell_of_train(stem, meta)
            if not cell and "match" in meta.get("settings", {}) and "model_path" not in meta:  # not of answers
                cell = self._cell_by_name(stem, found)
            if cell:
                rest = ending(stem, RunFiles(self.path, cell).train.stem)
                found[stem] = ParitySet(self.path / f"{stem}.json", cell, stem if rest is None else rest, meta)
        return found

    def _cell_by_name(self, stem: str, known: dict[str, ParitySet]) -> Cell | None:
        """The cell of a train file whose meta file does not say it: that of the known one from which it was made."""
        base = next((known[start] for start in _starts(stem) if start in known), None)
        return base.cell if base else next(filter(None, map(parsed, _starts(stem))), None)

    def train_files(self, dataset: str) -> list[Path]:
        """All train files of a dataset: parity sets and baselines."""
        found = []
        for file in filter(lambda file: may_be_train(file.name), self.results("PI")):
            of = self.parity.get(file.stem)
            cell = of.cell if of else None if self.meta(file) else self._cell_by_name(file.stem, self.parity)
            found += [file] if cell and cell.dataset == dataset else []
        return found

    def parity_set(self, cell: Cell) -> ParitySet | None:
        """The one of a cell from which MPA trains."""
        return next((one for one in self.parity.values() if one.cell == cell and not one.ending), None)

    @cached_property
    def cells(self) -> list[Cell]:
        """The datasets and pairs of models, also of unfinished runs. The S-VLM is "" where only the L-VLM has answered yet."""
        files = [file for file in self.results("PA", "PI") if not _holds_text(file)]
        metas = {}
        for file in files:
            with contextlib.suppress(InputError):  # what needs it says so
                metas[file] = self.meta(file)
        files = [file for file in files if "kind" not in metas.get(file, {})]
        told = {file: cell for file in files if (cell := _told(file, metas.get(file, {})))}
        by_name = [cell for file in self.results("PA") if file in files and (cell := parsed(file.stem))]
        lvlms = {cell._replace(svlm="") for cell in [*told.values(), *by_name]}
        own = [RunFiles(self.path, cell) for cell in lvlms]
        known = {*told, *(file for of in own for file in (of.held_out, of.held_out_given))}
        found = lvlms | set(told.values())
        for file in (file for file in files if file not in known):
            cell = _told(file, metas.get(file, {}), lvlms) or parsed(file.stem, lvlms)
            found |= {cell} if cell else set()
        whole = {cell[:2] for cell in found if cell.svlm}
        return sorted(cell for cell in found if cell.svlm or cell[:2] not in whole)

    def levelled(self, model: str, others: Iterable[Cell] = ()) -> Levelled | None:
        """Whose levelled S-VLM this model is; None if it is none. `others` are cells of other folders, for one without meta files."""
        pl = self.meta(self.path / model)
        if not pl and not may_be_levelled(model):
            return None
        base = pl.get("converted_from") or pl.get("settings", {}).get("model_id")
        svlm = base and short_name(base)
        file = Path(re.sub(r":[\d.]+$", "", str((pl.get("settings", {}).get("data_path") or [""])[0])))
        parity = self._trained_on(file)
        if parity:
            cell = parity.cell._replace(svlm=svlm or parity.cell.svlm)
        elif cell := self._cell_of(model, svlm, others) or self._cell_by_name(file.stem, self.parity):
            parity = self.parity_set(cell)
        else:
            return None
        variant = _variant(model, cell)
        return Levelled(cell, (model if variant is None else variant) or MPA, pl, parity.meta if parity else {})

    def _cell_of(self, model: str, svlm: str | None, others: Iterable[Cell]) -> Cell | None:
        """The cell of whose levelled S-VLM a name is, the longest if there are several."""
        for known in (self.cells, others):
            fitting = [cell for cell in known if svlm in (None, cell.svlm) and _variant(model, cell) is not None]
            if fitting:
                return max(fitting, key=lambda cell: len(RunFiles(Path(), cell).levelled().name))
        return None

    def _trained_on(self, file: Path) -> ParitySet | None:
        """The parity set that a train file is, or from which it was made: in this folder, or in that of the file."""
        there = file.parent if file.name and file.parent.is_dir() else self.path
        folders = [self] if os.path.samefile(there, self.path) else [self, RunFolder(there)]
        found = (folder.parity.get(stem) for stem in _starts(file.stem) for folder in folders)
        return next(filter(None, found), None)

    def variants(self, cell: Cell, template: Path) -> dict[str, str]:
        """{variant: model} of a cell's levelled S-VLMs, MPA's first, of which there is a file as `template`, see `models_of`."""
        found = {}
        for model in models_of(self.names, template):
            if (of := self.levelled(model)) and of.cell == cell:
                found[of.variant] = model
        return dict(sorted(found.items(), key=lambda pair: (pair[0] != MPA, pair[0])))


def cell_of_train(stem: str, meta: dict) -> Cell | None:
    """The cell of a train file by its meta file; None if that does not say the models. Older ones do not say the dataset."""
    if not {"model_path_lvlm", "model_path_svlm"} <= meta.keys():
        return None
    models = [short_name(meta[f"model_path_{who}"]) for who in ("lvlm", "svlm")]
    cells = [Cell(dataset, *models) for dataset in DATASETS]
    fitting = (c for c in cells if ending(stem, RunFiles(Path(), c).train.stem) is not None)
    return Cell(meta["dataset"], *models) if meta.get("dataset") in DATASETS else next(fitting, None)


def _starts(stem: str) -> list[str]:
    """The name, and what is left of it without its last parts."""
    parts = stem.split("_")
    return ["_".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _variant(model: str, cell: Cell) -> str | None:
    return ending(model, RunFiles(Path(), cell).levelled().name)


def _told(file: Path, meta: dict, lvlms: Iterable[Cell] = ()) -> Cell | None:
    """What the meta file of a result of PA or PI says. With older answers, their name tells which of the L-VLMs asked."""
    settings, path = meta.get("settings", {}), meta.get("model_path")
    if not path or settings.get("dataset") not in DATASETS:
        return cell_of_train(file.stem, meta)
    model, asked = short_name(path), meta.get("model_path_lvlm") or (is_result(file.name, "PA") and path)
    known = [Cell(settings["dataset"], short_name(asked))] if asked else lvlms
    fitting = (c for c in known if asked or RunFiles(file.parent, c).answers(model) == file)
    cell = next(fitting, None)
    return cell and cell._replace(svlm="" if model == cell.lvlm or settings.get("scored") else model)


def _holds_text(file: Path) -> bool:
    """Is it a text or a command, whatever its name? A damaged result is none."""
    try:
        with open(file, encoding="utf-8-sig", errors="replace") as opened:
            return opened.read(64).lstrip()[:1].isalpha()
    except OSError:  # reading it as a result says why
        return False


def find(folders: Iterable[Path]) -> list[RunFolder]:
    """These folders and all below them, each once. Raises InputError for a missing folder."""
    found, seen = [], set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Give run folders, or a folder that holds some.")
        for place, below, _ in os.walk(folder):
            real = os.path.realpath(place)
            below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
            if real not in seen:
                seen.add(real)
                found.append(RunFolder(Path(place)))
    return found


def run_name(folder: Path) -> str:
    """A run's name for people: of an experiment's run also the experiment's."""
    parent = folder.resolve().parent.name
    return folder.name if parent == "results" else f"{parent}/{folder.name}"


def add_selection(parser: argparse.ArgumentParser) -> None:
    """RESULTS, and the flags that select some of the datasets and models in them."""
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULTS", help="run folders, or folders that hold some"
    )
    parser.add_argument("--dataset", choices=DATASETS, help="only this dataset")
    parser.add_argument("--lvlm", help="only this L-VLM (a path or a short name)")
    parser.add_argument("--svlm", help="only this S-VLM")


def selected(args) -> list[tuple[Path, Cell]]:
    """The run folders and cells that the flags of `add_selection` select. Raises InputError if there are none."""
    wanted = (args.dataset, args.lvlm and short_name(args.lvlm), args.svlm and short_name(args.svlm))
    found = [
        (folder.path, cell)
        for folder in find(args.results)
        for cell in folder.cells
        if all(w in (None, part) for w, part in zip(wanted, cell, strict=True))
    ]
    if not found:
        raise InputError(f"{args.results[0]}: no annotations of such models in it or below. Run PA.sh first.")
    return found


def of_selected(args, make: Callable[[Path, Cell], T]) -> tuple[list[T], list[str]]:
    """(what `make` gives for each of `selected`, why it gives nothing for others). That is also told, as the others may be whole."""
    made, broken = [], []
    for folder, cell in selected(args):
        try:
            made.append(make(folder, cell))
        except InputError as error:
            print(printable(f"error: {error}"), file=sys.stderr)
            broken.append(str(error))
    return made, broken
