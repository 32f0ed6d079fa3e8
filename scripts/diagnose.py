"""What looks wrong in a run, and what to try: `scripts/mpa.sh` ends with it.

    python scripts/diagnose.py results/mine
    python scripts/diagnose.py results/paper --short              # one line for each cell of an experiment
    python scripts/diagnose.py released/ --dataset okVQA --lvlm Qwen2-VL-7B-Instruct --svlm Qwen2-VL-2B-Instruct

Reads  the result files of PA, PI, PL and evaluate, as far as they are there. No model is loaded.
Prints for each pair of models and dataset the findings: a figure with its interval, what it means, and what to try.
       docs/diagnosis.md lists the signatures and their thresholds.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.analysis.diagnosis import diagnose, looked_at
from mpa.files.printable import printable
from mpa.runs.case import Case
from mpa.runs.folders import add_selection, of_selected, run_name
from mpa.stages import cli


def report(folder: Path, cell, short: bool) -> None:
    case = Case(folder, cell)
    title = f"{run_name(folder)}, {cell.dataset}, {cell.svlm or '(no S-VLM yet)'} from {cell.lvlm}"
    findings, figures = diagnose(case), looked_at(case)
    if short:
        counts = Counter(f"{finding.level}: {finding.name}" for finding in findings)
        print(printable(f"{title}: {'; '.join(counts) or 'nothing unusual'}"))
        return
    print("\nDiagnosis of " + printable(title), f"  {printable(figures)}.", sep="\n")
    if not findings:
        print("  Nothing unusual.")
    for finding in findings:
        print(
            printable(f"  {finding.level}: {finding.name}: {finding.figure}."),
            printable(f"    {finding.meaning} {finding.remedy}"),
            sep="\n",
        )


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection(p)
    p.add_argument("--short", action="store_true", help="one line for each cell")
    args = p.parse_args(argv)
    _, broken = of_selected(args, lambda folder, cell: report(folder, cell, args.short))
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
