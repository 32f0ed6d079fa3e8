"""Which run folders there are, and which datasets and models each holds, by their result files: also of unfinished runs."""

import argparse
import os
import re
from pathlib import Path

from mpa.data import DATASETS
from mpa.files.records import RELEASED_ALIAS, InputError, short_name
from mpa.runs.runs import Cell

_DATASET = "|".join(map(re.escape, DATASETS))
_TRAIN = re.compile(rf"PI_(.+)_train_(.+)_({_DATASET})")
_ANSWERS = re.compile(rf"PI_(.+)_({_DATASET})")
_PA = re.compile(rf"PA_(.+)_({_DATASET})")


def _results(folder: Path, names: list[str]) -> list[str]:
    """Those names of JSON files that may be results of PA, PI and evaluate, also damaged ones; a text or a command is none."""

    def holds_text(name: str) -> bool:
        try:
            with open(folder / name, encoding="utf-8-sig", errors="replace") as file:
                return file.read(64).lstrip()[:1].isalpha()
        except OSError:  # reading it as a result says why
            return False

    stages = [n for n in names if n.startswith(("PA_", "PI_", "Eval_")) and n.endswith(".json")]
    return [n for n in stages if not n.endswith(".meta.json") and not holds_text(n)]


def run_folders(folders: list[Path]) -> list[Path]:
    """The folders with a result of PA or PI, here and below. Raises InputError for a missing folder."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Give run folders, or a folder that holds some.")
        for place, below, files in os.walk(folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            if any(not name.startswith("Eval_") for name in _results(Path(place), files)):
                found.append(Path(place))
    return found


def run_name(folder: Path) -> str:
    """A run's name for people: of an experiment's run also the experiment's."""
    parent = folder.resolve().parent.name
    return folder.name if parent == "results" else f"{parent}/{folder.name}"


def cells_in(folder: Path) -> list[Cell]:
    """The datasets and pairs of models in a run folder. The S-VLM is "" where only the L-VLM has answered yet."""
    stems = sorted(name.removesuffix(".json") for name in _results(folder, os.listdir(folder)))
    alias = {short: name for name, short in RELEASED_ALIAS.items()}
    cells = set()
    for m in filter(None, map(_TRAIN.fullmatch, stems)):
        lvlm = alias.get(m[1], m[1])
        if m[2].startswith(f"{lvlm}_"):
            cells.add(Cell(m[3], lvlm, m[2].removeprefix(f"{lvlm}_")))
    annotated = [m.groups() for m in filter(None, map(_PA.fullmatch, stems))]
    for written, dataset in annotated:
        lvlm = alias.get(written, written)
        answered = [
            m[1] for m in filter(None, map(_ANSWERS.fullmatch, stems)) if m[2] == dataset and "_train_" not in m[1]
        ]
        # A name that begins with a longer L-VLM's is that one's file.
        longer = [name for name, _ in annotated if name.startswith(f"{written}_")]
        own = [name for name in answered if not name.startswith(tuple(f"{other}_" for other in longer))]
        others = [name.removeprefix(f"{written}_") for name in own if name.startswith(f"{written}_")]
        cells |= {
            Cell(dataset, lvlm, svlm)
            for svlm in others
            if svlm not in (lvlm, written, "heldout", "heldout-given", "blind", "votes", "given")
            and not svlm.startswith("scored-")
        }
        if not any(cell[:2] == (dataset, lvlm) for cell in cells):
            cells.add(Cell(dataset, lvlm, ""))
    return sorted(cells)


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
        (folder, cell)
        for folder in run_folders(args.results)
        for cell in cells_in(folder)
        if all(w in (None, part) for w, part in zip(wanted, cell, strict=True))
    ]
    if not found:
        raise InputError(f"{args.results[0]}: no annotations of such models in it or below. Run PA.sh first.")
    return found
