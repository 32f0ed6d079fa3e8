"""One HTML page of what MPA did: samples, verdicts, results, coverage, training, diagnosis. It opens offline.

    python scripts/report.py results/mine                          # results/mine/report/index.html, with thumbnails beside
    python scripts/report.py results/mine --single-file            # results/mine/report.html, one file to mail
    python scripts/report.py results/paper                         # a whole experiment: all its runs, with a comparison
    python scripts/report.py results/a results/b --out both/index.html

Reads  the result files of PA, PI, PL and evaluate, as far as they are there. No model is loaded.
Writes the page and thumbnails of the images. Only images below the dataset's folders and --image-root are shown.
       `demo.sh`, `mpa.sh` and `reproduce.sh` end with it; REPORT=0 leaves it out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import cli, records
from mpa.datasets import DATASETS
from mpa.records import InputError
from mpa.run_folders import cells_in, run_folders


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="run folders, or folders that hold some")
    p.add_argument("--dataset", choices=DATASETS, help="only this dataset")
    p.add_argument("--lvlm", help="only this L-VLM (a path or a short name)")
    p.add_argument("--svlm", help="only this S-VLM")
    p.add_argument("--image-root", metavar="DIR", help="images below this folder may be shown, too")
    p.add_argument("--single-file", action="store_true", help="one file, with the thumbnails in it")
    p.add_argument("--redact-paths", action="store_true", help="show no absolute paths")
    p.add_argument("--out", type=Path, metavar="FILE", help="the page (default: see above)")
    args = p.parse_args(argv)
    from mpa.report import page
    from mpa.report.content import CellContent

    wanted = [args.dataset, *(model and records.short_name(model) for model in (args.lvlm, args.svlm))]
    contents = [
        CellContent(folder, cell)
        for folder in run_folders(args.results)
        for cell in cells_in(folder)
        if all(w in (None, part) for w, part in zip(wanted, cell, strict=True))
    ]
    if not contents:
        raise InputError(f"{args.results[0]}: no annotations of such models in it or below. Run PA.sh first.")
    first = args.results[0]
    out = args.out or (first / "report.html" if args.single_file else first / "report/index.html")
    thumbs = (first / ".thumbnails") if args.single_file else out.parent / "thumbnails"
    page.write(contents, out, thumbs, args.image_root, args.single_file, args.redact_paths)
    print(
        f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB): {len(contents)} pairs of models and datasets. Open it in a browser."
    )


if __name__ == "__main__":
    cli.run(main)
