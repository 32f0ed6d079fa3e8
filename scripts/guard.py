"""The guard: is the levelled S-VLM worse than the one it came from? Needs no labels.

    python scripts/guard.py results/mine                          # all levelled models of the run
    python scripts/guard.py results/okvqa --dataset okVQA --variant anchors
    bash scripts/guard.sh -h                                      # asks the models first, and tries remedies

Reads  both models' answers to the run's held-out questions, on which the L-VLM agrees with itself (PI's --hold-out): the files
       that `scripts/evaluate.py --held-out` writes. For the dataset `images` these are the evaluation. No model is loaded.
Prints for each levelled model its gain with a 95 % interval, paired by question, and a verdict: better, worse, not told apart, or no
       verdict, where too many questions have no usable reply.
Writes results/RUN/guard_<lvlm>_<svlm>_<dataset>.json: the same figures, and which model to use.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.analysis.guard import NONE, WORSE, Comparison, Guard, conclusion, recommended
from mpa.data import DATASETS
from mpa.files import records
from mpa.files.records import InputError
from mpa.runs.folders import add_selection, selected
from mpa.stages import cli


def compared(guard: Guard, variants: list[str]) -> dict[str, Comparison]:
    """The comparisons that are possible; the others are told. Raises InputError if none is."""
    found, failed = {}, []
    for variant in variants:
        try:
            found[variant] = guard.compare(variant)
        except InputError as error:
            failed.append(error)
    if not found:
        raise failed[0]
    for error in failed:
        print(f"warning: not compared: {error}", file=sys.stderr)
    return found


def line(name: str, one: Comparison) -> str:
    """A levelled model's figures and verdict; of one without a verdict only how many questions it is about."""
    counts = f"n = {one.n}"
    if one.images < one.n:
        counts += f" about {one.images} images"
    if one.unusable:
        counts += f", {one.unusable} without a usable reply not counted"
    if one.verdict == NONE:
        return f"  {name}: {one.verdict} ({counts})"
    low, high = (f"{100 * bound:+.1f}" for bound in one.interval)
    before, after = (f"{100 * k / one.n:.1f}" for k in (one.right_before, one.right_before + one.fixed - one.broken))
    return (
        f"  {name}: {before} → {after} %, {100 * one.gain:+.1f} points (95 % interval {low} to {high}, "
        f"{counts}; {one.fixed} fixed, {one.broken} broken): {one.verdict}"
    )


def report(guard: Guard, variants: list[str]) -> None:
    cell, files, found = guard.cell, guard.files, compared(guard, variants)
    print(
        f"\nGuard of {files.folder.name}, {cell.dataset}, {cell.svlm} from {cell.lvlm}: agreement with the L-VLM on {guard.questions}"
    )
    print("\n".join(line(guard.model(name).name, one) for name, one in found.items()))
    for note in dict.fromkeys(note for one in found.values() for note in one.notes):
        print(f"  {note}")
    told = [name for name, one in found.items() if one.verdict != NONE]
    highest = max(told, key=lambda name: found[name].gain, default=next(iter(found)))
    for name in dict.fromkeys((next(iter(found)), highest)):
        named = f"{guard.model(name).name}: " if len(found) > 1 else ""
        print("\n".join(f"  {named}{said}" for said in conclusion(found[name], guard.share)))
    best = recommended(found)
    print(
        f"  Use {guard.model(best) if best else f'the original S-VLM, {cell.svlm}: no levelled one was found better'}."
    )
    if [one.verdict for one in found.values()] == [WORSE]:
        print("  To try remedies: REMEDY=1 bash scripts/guard.sh, with the variables of the run.")
    models = {name: one.as_json() for name, one in found.items()}
    recommends = best and guard.model(best).name
    records.write_json(files.guard, {"questions": guard.questions, "models": models, "recommended": recommends})
    next_command = (
        f" Next: MODEL={guard.model(best)} bash evaluate.sh" if best and DATASETS[cell.dataset].labelled else ""
    )
    print(f"Wrote {files.guard}.{next_command}")


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_selection(p)
    p.add_argument(
        "--variant", nargs="+", metavar="NAME", help="only these: mpa, anchors … (default: all that were asked)"
    )
    p.add_argument("--verdict", action="store_true", help="print only the verdict on --variant, and write nothing")
    args = p.parse_args(argv)
    guards = [Guard(folder, cell) for folder, cell in selected(args) if cell.svlm]
    asked = [guard for guard in guards if args.variant or guard.variants]
    if not asked:
        raise InputError(
            f"{args.results[0]}: no levelled S-VLM was asked held-out questions. Run scripts/guard.sh; for a labelled dataset PI "
            "needs --hold-out 0.15."
        )
    for guard in asked:
        if args.verdict:
            print(*(guard.compare(variant).verdict for variant in args.variant or ["mpa"]), sep="\n")
        else:
            report(guard, args.variant or list(guard.variants))


if __name__ == "__main__":
    cli.run(main)
