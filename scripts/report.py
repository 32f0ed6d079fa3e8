"""One HTML page of what MPA did: samples, verdicts, results, coverage, training, diagnosis. It opens offline.

    python scripts/report.py results/mine                          # results/mine/report/index.html, with thumbnails
    python scripts/report.py results/mine --single-file            # results/mine/report.html, one file to mail
    python scripts/report.py results/paper                         # an experiment: a page for each cell, an index, a comparison
    python scripts/report.py results/a results/b --out both

Reads  the result files of PA, PI, PL and evaluate, as far as they are there. No model is loaded.
Writes the page and thumbnails of the images. Only images below the dataset's folders and --image-root are shown.
       `demo.sh`, `mpa.sh` and `reproduce.sh` end with it; REPORT=0 leaves it out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.files import outputs
from mpa.files.printable import as_size, printable
from mpa.files.records import InputError
from mpa.runs.folders import add_selection, of_selected
from mpa.runs.layout import Cell
from mpa.stages import cli


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection(p)
    p.add_argument("--image-root", metavar="DIR", help="images below this folder may be shown, too")
    p.add_argument("--single-file", action="store_true", help="one file, with the thumbnails in it")
    p.add_argument("--redact-paths", action="store_true", help="show no absolute paths")
    p.add_argument("--out", type=Path, metavar="PATH", help="the folder, or the single file (default: see above)")
    args = p.parse_args(argv)
    from mpa.analysis.report import page
    from mpa.analysis.report.content import CellContent

    if args.image_root and not Path(args.image_root).is_dir():
        raise InputError(f"{args.image_root}: no such folder; --image-root is a folder of images.")
    first = args.results[0]
    out = args.out or first / ("report.html" if args.single_file else "report")
    outputs.refuse_others(out if args.single_file else out / "index.html", "report", ours=page.ours)

    def content(folder: Path, cell: Cell) -> CellContent:
        found = CellContent(folder, cell)
        found.case.samples, found.case.judge  # noqa: B018 - without these nothing can be shown
        return found

    contents, broken = of_selected(args, content)
    if not contents:
        sys.exit(1)
    how = {"image_root": args.image_root, "redact": args.redact_paths, "broken": broken}
    if args.single_file:
        images = page.write(contents, out, first / ".thumbnails", single_file=True, **how)
    else:
        images = page.write_folder(contents, out, **how)
        out /= "index.html"
    pairs = "pair" if len(contents) == 1 else "pairs"
    told = f"{len(contents)} {pairs} of models and datasets, {len(images):,} images"
    if hidden := sum(not shown for shown in images.values()):
        told += f", {hidden:,} of them not shown; the page says why"
    print(f"Wrote {out} ({as_size(out.stat().st_size)}): {told}. Open it in a browser.")
    for one in contents:
        for why in one.differing:
            print(printable(f"warning: {one.title}: not compared: {why}"), file=sys.stderr)
        for why in one.broken:
            print(printable(f"error: {why}"), file=sys.stderr)
    if broken or any(one.broken for one in contents):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
