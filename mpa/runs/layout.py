"""The names of a run folder's files, made and read here alone, for Python and for bash.

    python -m mpa.runs.layout --run RUN --dataset textVQA --lvlm BIG --svlm SMALL levelled train       # a path on each line

A name only finds a file. What a file is about is in its meta file.
"""

import argparse
import os
from datetime import date
from pathlib import Path
from typing import NamedTuple

from mpa.files.records import InputError, run_folder, short_name

# What a run is about, where nobody says otherwise.
DATASET = "textVQA"
LVLM = "Qwen/Qwen2-VL-7B-Instruct"
SVLM = "Qwen/Qwen2-VL-2B-Instruct"
MPA = "mpa"  # the variant of a model that was trained on the parity set itself


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
        """Further answers that a rule asks for: "votes", "blind", "given", "scored-SVLM"."""
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

    def evaluation(self, model: str) -> Path:
        return self._file("Eval", model)

    def guard_answers(self, model: str) -> Path:
        """A model's answers to the held-out questions of a labelled dataset."""
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


def reasons_path(train: Path) -> Path:
    """The reason of each sample, beside the train file for which PI has judged it."""
    return train.with_name(f"{train.stem}.reasons.json")


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
