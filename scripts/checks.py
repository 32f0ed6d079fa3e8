"""Checks from result files: samples, coverage, calibration, two L-VLMs, a worse L-VLM, transfer, variants, the guard.

    python scripts/checks.py inspect results/mine                 # 50 kept and 50 rejected samples, and PI's verdicts
    python scripts/checks.py coverage results/mine                # D_PI by answer and question type, accuracy by type
    python scripts/checks.py calibration results/mine             # the probabilities of answers, and how many are right
    python scripts/checks.py overlap results/small                # the parity sets of two L-VLMs for one S-VLM
    python scripts/checks.py degraded results/small-sweep         # variants with `corrupt`
    python scripts/checks.py transfer results/small-transfer      # experiments with `transfer: true`
    python scripts/checks.py sweep results/small                  # all variants beside MPA
    python scripts/checks.py guard results/no-harm                # experiments with PI's --hold-out: the guard beside the test

Reads  the result files of the stages. No model is loaded and nothing is scored anew.
Prints tables with n and 95 % intervals. experiments/README.md says which experiment files make them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.analysis import calibration, check_tables
from mpa.analysis.guard_accuracy import guard_table
from mpa.analysis.table_formats import FORMATS, Table
from mpa.files import outputs
from mpa.files.argument_types import number
from mpa.files.records import InputError
from mpa.runs.case import Case
from mpa.runs.folders import add_selection, of_selected
from mpa.runs.trainings import Runs
from mpa.stages import cli

OF_ALL = {
    "overlap": check_tables.overlap_table,
    "degraded": check_tables.degraded_table,
    "transfer": check_tables.transfer_table,
    "sweep": check_tables.sweep_table,
    "guard": guard_table,
}


def of_case(args, case: Case) -> list[Table]:
    if args.check == "coverage":
        return [check_tables.coverage_table(case, of) for of in ("answer", "question")]
    if args.check == "calibration":
        return [check_tables.calibration_table(case.cell, calibration.of_case(case))]
    if not case.samples:
        return []
    return [check_tables.reasons_table(case), check_tables.inspection_table(case, args.n, args.seed)]


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("check", choices=("inspect", "coverage", "calibration", *OF_ALL), help="which check")
    add_selection(p)
    p.add_argument("-n", type=number(1), default=50, help="inspect: samples of each kind (default: 50)")
    p.add_argument("--seed", type=int, default=0, help="inspect: random seed (default: 0)")
    p.add_argument("--format", choices=FORMATS, default="md", help="Markdown, LaTeX or CSV (default: md)")
    p.add_argument("--out", type=Path, metavar="FILE", help="write to this file, not to the terminal")
    args = p.parse_args(argv)
    if args.check in OF_ALL and (args.dataset or args.lvlm or args.svlm):
        p.error(
            f"--dataset, --lvlm and --svlm are for inspect, coverage and calibration; {args.check} shows all that it finds"
        )
    if args.out:
        outputs.refuse_others(args.out, "checks")
    if args.check in OF_ALL:
        tables, broken = [OF_ALL[args.check](Runs(args.results))], []
    else:
        of_cells, broken = of_selected(args, lambda *place: of_case(args, Case(*place)))
        tables = [table for tables in of_cells for table in tables]
    if broken and not tables:
        sys.exit(1)
    if not any(table.rows for table in tables):
        raise InputError(f"{args.results[0]}: nothing for {args.check} in it or below. Run the stages first.")
    text = "\n".join(map(FORMATS[args.format], tables))
    if args.out:
        outputs.write(args.out, text, "checks")
        print(f"Wrote {args.out}.")
    else:
        print(text, end="")
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
