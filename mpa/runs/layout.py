"""The names of a run folder's results, made and parsed here alone, for Python and for bash.

    python -m mpa.runs.layout --run RUN --dataset textVQA --lvlm BIG --svlm SMALL levelled train       # a path on each line

A name only finds a file: what a file is about is in its meta file. Names are parsed where there is none.
"""

import argparse
import os
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import NamedTuple

from mpa.data import DATASETS
from mpa.files.records import RELEASED_ALIAS, InputError, run_folder, short_name

# What a run is about, where nobody says otherwise.
DATASET = "textVQA"
LVLM = "Qwen/Qwen2-VL-7B-Instruct"
SVLM = "Qwen/Qwen2-VL-2B-Instruct"
MPA = "mpa"  # the variant of a model that was trained on the parity set itself
_DATASET = "|".join(map(re.escape, DATASETS))
_UNLABELLED = {name for name, dataset in DATASETS.items() if not dataset.labelled}
ANY = "\0"  # a model's name in a file's name, for `models_of`
_NO_RESULT = (".meta.json", ".reasons.json")


class Cell(NamedTuple):
    """A dataset and a pair of models, by their short names. `svlm` is "" where only the L-VLM is known."""

    dataset: str
    lvlm: str
    svlm: str = ""


class RunFiles:
    """The files of one cell in a run folder, whether or not they are there."""

    def __init__(self, folder: Path, cell: Cell):
        self.folder, self.cell = Path(folder), cell

    def _file(self, stage: str, *parts: str, suffix: str = ".json") -> Path:
        return self.folder / f"{'_'.join((stage, *parts, self.cell.dataset))}{suffix}"

    @property
    def pa(self) -> Path:
        return self._file("PA", self.cell.lvlm)

    def answers(self, model: str) -> Path:
        """A model's answers to the L-VLM's questions."""
        return self._file("PI", self.cell.lvlm, model)

    @property
    def lvlm_answers(self) -> Path:
        return self.answers(self.cell.lvlm)

    @property
    def svlm_answers(self) -> Path:
        return self.answers(self.cell.svlm)

    def further(self, how: str) -> Path:
        """Further answers of the L-VLM, which a rule asks for: "votes", "blind"; and "given"."""
        return self.answers(how)

    @property
    def held_out(self) -> Path:
        return self.answers("heldout")

    @property
    def held_out_given(self) -> Path:
        """The held-out set of given questions; where it is there, it is asked instead."""
        return self.answers("heldout-given")

    @property
    def train(self) -> Path:
        return self._file("PI", self.cell.lvlm, "train", self.cell.lvlm, self.cell.svlm)

    def train_for(self, variant: str) -> Path:
        """The train set of another variant: of a baseline, or with anchors."""
        return self.train.with_name(f"{self.train.stem}_{variant}.json")

    def levelled(self, variant: str = MPA) -> Path:
        """The folder of a trained S-VLM."""
        ending = "" if variant == MPA else f"_{variant}"
        return self._file("PL", self.cell.lvlm, self.cell.svlm, suffix=ending)

    def evaluation(self, model: str, dataset: str | None = None) -> Path:
        """A model's answers to the test questions, of this or of another dataset."""
        return self.folder / f"Eval_{model}_{dataset or self.cell.dataset}.json"

    def guard_answers(self, model: str) -> Path:
        """A model's answers to the held-out questions. For unlabelled images these are the evaluation itself."""
        if self.cell.dataset in _UNLABELLED:
            return self.evaluation(model)
        return self._file("Heldout", self.cell.lvlm, model)

    @property
    def guard(self) -> Path:
        return self._file("guard", self.cell.lvlm, self.cell.svlm)

    @property
    def ratings(self) -> Path:
        return self._file("ratings", self.cell.lvlm, self.cell.svlm, suffix=".jsonl")

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    def there(self, file: Path) -> Path:
        """`file`; where it is not there, the released code's one in its place, which has an alias for the L-VLM's name."""
        alias = RELEASED_ALIAS.get(self.cell.lvlm)
        released = file.with_name(file.name.replace(f"_{self.cell.lvlm}_", f"_{alias}_", 1))
        return released if alias and not file.exists() and released.exists() else file

    def needed(self, file: Path, flag: str, stage: str) -> Path:
        """`there(file)`. Raises InputError if it is not: `stage` makes it, and `flag` names another."""
        if not (found := self.there(file)).exists():
            raise InputError(f"{file}: no such file. Run {stage} first, or name the file with {flag}.")
        return found


def train_meta(model: Path) -> Path:
    """What the trainer says of the model in this folder. It is written last: where it is there, the training is complete."""
    return model / "train_meta.json"


def reasons_path(train: Path) -> Path:
    """The reason of each sample, beside the train file for which PI has judged it."""
    return train.with_name(f"{train.stem}.reasons.json")


def ending(name: str, start: str) -> str | None:
    """What comes after `start` and a `_` in a name, "" if nothing does. None for a name that does not begin so."""
    return "" if name == start else name.removeprefix(f"{start}_") if name.startswith(f"{start}_") else None


def models_of(names: Iterable[str], template: Path) -> list[str]:
    """The models of which a file is among `names`. `template` is such a file of the model ANY."""
    start, end = template.name.split(ANY)
    fitting = (n for n in names if n.startswith(start) and n.endswith(end) and len(n) > len(start + end))
    return [n[len(start) : -len(end)] for n in fitting]


def is_result(name: str, *stages: str) -> bool:
    """Is this the name of a result of one of these stages: "PA", "PI", "Eval"?"""
    begins = name.startswith(tuple(f"{stage}_" for stage in stages))
    return begins and name.endswith(".json") and not name.endswith(_NO_RESULT)


def is_ratings(name: str) -> bool:
    return name.startswith("ratings_") and name.endswith(".jsonl")


def may_be_levelled(name: str) -> bool:
    """Can this be the name of a trained S-VLM's folder, by what PL.sh calls it?"""
    return name.startswith("PL_")


def may_be_train(name: str) -> bool:
    """Can this be the name of a train file, or of answers of an oddly named model?"""
    return is_result(name, "PI") and "_train_" in name


def _is_no_model(name: str) -> bool:
    """Does this stand in the place of an S-VLM's name, in a file of the L-VLM's further answers or of held-out questions?"""
    from mpa.method import rules  # not above: bash asks this module for names, and waits

    asked = {rule.asks for rule in rules.RULES}
    return name in {"heldout", "heldout-given", "given", *asked} or name.startswith("scored-")  # of earlier versions


def parsed(stem: str, lvlms: Iterable[Cell] = ()) -> Cell | None:
    """What the name of a result of PA or PI says, for one without a meta file; None if nothing.

    Names may hold any `_`. An S-VLM's answers are told by the L-VLMs of the folder.
    """
    for name, alias in RELEASED_ALIAS.items():
        stem = re.sub(rf"^(PA|PI)_{alias}_", rf"\1_{name}_", stem)
    if found := re.fullmatch(rf"PA_(.+)_({_DATASET})", stem):
        return Cell(found[2], found[1])
    if found := re.fullmatch(rf"PI_(.+)_train_\1_(.+)_({_DATASET})", stem):
        return Cell(found[3], found[1], found[2])
    for cell in sorted(lvlms, key=lambda cell: len(cell.lvlm), reverse=True):
        for model in models_of([f"{stem}.json"], RunFiles(Path(), cell).answers(ANY)):
            return cell._replace(svlm="" if model == cell.lvlm or _is_no_model(model) else model)
    return None


def default_run() -> str:
    """The name of the run: $RUN, or today's date."""
    return os.environ.get("RUN") or date.today().isoformat()


def main() -> None:
    known = [name for name, value in vars(RunFiles).items() if isinstance(value, property)]
    p = argparse.ArgumentParser(prog="mpa.runs.layout", description=__doc__)
    p.add_argument("--run", default=default_run(), help="a run's name, or the path of its folder")
    for name, default in (("dataset", DATASET), ("lvlm", LVLM), ("svlm", SVLM)):
        p.add_argument(f"--{name}", default=default, help="default: %(default)s")
    p.add_argument(
        "names", nargs="+", metavar="NAME", help=f"dataset, lvlm, svlm, folder, levelled[:VARIANT], {', '.join(known)}"
    )
    args = p.parse_args()
    try:
        files = RunFiles(run_folder(args.run), Cell(args.dataset, short_name(args.lvlm), short_name(args.svlm)))
    except InputError as error:
        p.exit(2, f"error: {error}\n")
    said = {name: getattr(args, name) for name in ("dataset", "lvlm", "svlm")} | {"folder": files.folder}
    said |= {name: getattr(files, name) for name in known}
    for name in args.names:
        kind, _, variant = name.partition(":")
        if variant or kind == "levelled":
            said[name] = {"levelled": files.levelled, "train": files.train_for}[kind](variant or MPA)
        text = str(said[name])
        print(f"./{text}" if text.startswith("-") else text)  # which no command takes for a flag


if __name__ == "__main__":
    main()
