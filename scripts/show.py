"""Samples of a run in the terminal, with the image where the terminal can show one.

    python scripts/show.py results/mine                       # 5 random parity samples
    python scripts/show.py results/mine --rejected -n 10      # what PI rejected, and why
    python scripts/show.py results/mine --broken              # test questions that the S-VLM answered right only before PL

Reads  the result files of PA, PI and evaluate. No model is loaded. Images: in terminals with true colour (COLORTERM), as
       coloured half blocks; --no-images leaves them out.
"""

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.files.argument_types import number
from mpa.files.image_files import ImageError, open_image
from mpa.files.printable import printable
from mpa.files.records import InputError
from mpa.runs.case import Case
from mpa.runs.comparable import changes
from mpa.runs.folders import add_selection, of_selected, run_name
from mpa.runs.layout import Cell
from mpa.stages import cli

COLUMNS = 40  # width of an image in the terminal, in characters


def picture(path: str):
    """The image as lines of coloured half blocks, two pixels each. Raises ImageError."""
    from PIL import Image
    from rich.text import Text

    image = open_image(path)
    height = max(2, round(image.height * COLUMNS / image.width / 2) * 2)
    pixels = image.resize((COLUMNS, min(height, 3 * COLUMNS)), Image.Resampling.BILINEAR)
    drawn = Text()
    for y in range(0, pixels.height - 1, 2):
        for x in range(pixels.width):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*pixels.getpixel((x, row))) for row in (y, y + 1))
            drawn.append("▀", style=f"{upper} on {lower}")
        drawn.append("\n")
    return drawn


def rows_of(sample, what: str) -> list[tuple[str, str | None]]:
    """What is shown of an annotated sample, or of a test question."""
    if what in ("kept", "rejected"):
        rows = [("question", sample.question), ("annotation", sample.annotation), ("L-VLM", sample.lvlm_answer)]
        verdict = sample.reason + (f": {sample.detail}" if sample.detail else "")
        return [*rows, ("S-VLM", sample.svlm_answer), ("verdict", verdict)]
    rows = [("question", sample.question), ("right answer", ", ".join(dict.fromkeys(sample.answers)))]
    return [*rows, ("S-VLM before", sample.before), ("S-VLM after", sample.after), ("change", sample.kind)]


def chosen(case: Case, what: str) -> list:
    """The annotated samples that PI kept or rejected, or the test questions that changed."""
    if what in ("kept", "rejected"):
        return [s for s in case.samples if (s.kept if what == "kept" else s.rejected)]
    before, after = case.evaluation(case.cell.svlm), case.evaluation(case.model)
    if not (before and after):
        raise InputError(
            f"{case.folder}: no evaluations before and after PL of {case.cell.svlm}. Run evaluate.sh first."
        )
    return [c for c in changes(before, after) if c.kind == what]


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection(p)
    kinds = p.add_mutually_exclusive_group()
    for kind, text in (
        ("kept", "the parity set (default)"),
        ("rejected", "annotations that PI rejected"),
        ("fixed", "test questions that the S-VLM answers right only after PL"),
        ("broken", "test questions that it answered right only before"),
    ):
        kinds.add_argument(f"--{kind}", dest="what", action="store_const", const=kind, help=text)
    p.add_argument("-n", type=number(1), default=5, help="samples of each pair of models (default: 5)")
    p.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    p.add_argument("--no-images", action="store_true", help="only text")
    args = p.parse_args(argv)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, what = Console(highlight=False), args.what or "kept"
    images = not args.no_images and console.is_terminal and os.environ.get("COLORTERM") in ("truecolor", "24bit")

    def show(folder: Path, cell: Cell) -> None:
        found = chosen(Case(folder, cell), what)
        picked = random.Random(args.seed).sample(found, min(args.n, len(found)))
        title = (
            f"{run_name(folder)}, {cell.dataset}, {cell.svlm} from {cell.lvlm}: {len(picked)} of {len(found)} {what}"
        )
        console.print("\n" + printable(title), markup=False)
        for sample in picked:
            table = Table(show_header=False)
            table.add_column(no_wrap=True)
            table.add_column(overflow="fold")
            for name, text in [("image", sample.image_path), *rows_of(sample, what)]:
                table.add_row(name, Text(printable(text)))
            if images:
                try:
                    console.print(picture(sample.image_path))
                except ImageError as error:
                    console.print(f"(no image: {error})", markup=False)
            console.print(table)

    _, broken = of_selected(args, show)
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
