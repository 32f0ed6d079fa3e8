"""The paper's tables from result files, or the summary of one pair of models.

    python scripts/tables.py results                               # all runs below: the paper's tables, ours beside
    python scripts/tables.py results/paper-* --format latex --out tables.tex
    python scripts/tables.py results/small --table main --format csv --out main.csv
    python scripts/tables.py --dataset easyVQA --lvlm data/mini/teacher --svlm data/mini/student results/demo

Reads  the result and meta files of all run folders below RESULTS. Datasets, models, variants and seeds are those of the
       meta files. No model is loaded and nothing is scored anew.
Writes the tables to the terminal or --out. docs/tables.md explains them.

With --dataset it summarises one dataset and pair of models: the funnel, a few example images, the table and, of several
       run folders, mean and spread. It writes summary.json in each:
       {"rows": {row: {"accuracy", "n", "ci95", "train_samples"}}, "gain", "funnel", "seconds"}.
       Accuracies are from 0 to 1, by the dataset's main metric; for `images` they are agreement with the L-VLM.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.analysis.paper_tables import ablation_table, claims_table, main_table
from mpa.analysis.rating_table import ratings_table
from mpa.analysis.run_summary import summarise
from mpa.analysis.table_formats import FORMATS, Table
from mpa.data import DATASETS
from mpa.files import outputs, records
from mpa.runs.trainings import Runs
from mpa.stages import cli

TABLES = ("main", "ablation", "ratings", "claims")


def paper_tables(found: Runs, names: list[str], whole_matrix: bool) -> list[Table]:
    main = main_table(found, whole_matrix)
    make = {
        "main": lambda: main,
        "ablation": lambda: ablation_table(found),
        "ratings": lambda: ratings_table(found),
        "claims": lambda: claims_table(found, main),
    }
    return [make[name]() for name in names]


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="run folders, or folders that hold some")
    tables = p.add_argument_group("the paper's tables")
    tables.add_argument(
        "--format", choices=FORMATS, default="md", help="Markdown, LaTeX (booktabs) or CSV (default: md)"
    )
    tables.add_argument("--out", type=Path, metavar="FILE", help="write them to this file, not to the terminal")
    tables.add_argument("--table", nargs="+", choices=TABLES, default=TABLES, help="only these (default: all)")
    tables.add_argument("--whole-matrix", action="store_true", help="main table: also the paper's cells without a run")
    one = p.add_argument_group("the summary of one pair")
    one.add_argument("--dataset", choices=DATASETS, help="summarise this dataset")
    one.add_argument("--lvlm", help=f"the L-VLM of the runs (default: {cli.LVLM})")
    one.add_argument("--svlm", help=f"the S-VLM of the runs (default: {cli.SVLM})")
    args = p.parse_args(argv)
    if args.dataset:
        if args.out or args.whole_matrix or args.format != "md" or args.table != TABLES:
            p.error("--format, --out, --table and --whole-matrix are for the paper's tables: leave out --dataset")
        return summarise(args.results, args.dataset, args.lvlm or cli.LVLM, args.svlm or cli.SVLM)
    if args.lvlm or args.svlm:
        p.error("--lvlm and --svlm need --dataset; without it, the tables show all models that they find")
    if args.out:
        outputs.refuse_others(args.out, "tables")
    found = Runs(args.results)
    if not (found.evaluations or found.parity or found.ratings):
        raise records.InputError(
            f"{args.results[0]}: no result of a stage in these folders or below. Run a stage first."
        )
    text = "\n".join(map(FORMATS[args.format], paper_tables(found, args.table, args.whole_matrix)))
    if args.out:
        outputs.write(args.out, text, "tables")
        print(f"Wrote {args.out}.")
    else:
        print(text, end="")


if __name__ == "__main__":
    cli.run(main)
