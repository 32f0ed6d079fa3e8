"""How often the guard recommends a levelled model, or calls one worse, where PL has changed nothing.

    python benchmarks/guard.py                     # 2,000 guards for each setting, a minute
    python benchmarks/guard.py --guards 10000

Each simulated guard asks N questions. PL changes the answers to a share of them, and half of these changes repair an answer: in truth
no model is better or worse. With one levelled model, and with four that are judged by the same questions; each also without the
correction for their number. The last setting asks four questions about each image, whose answers change together; also as if these
questions were independent. A sensible guard errs in at most 2.5 % of the cases in each direction.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.analysis.guard import WORSE, Comparison, recommended

SETTINGS = [
    (100, 0.1, 1),
    (100, 0.3, 1),
    (400, 0.1, 1),
    (400, 0.3, 1),
    (400, 0.2, 4),
]  # questions, share that changes, per image
MODELS = 4


def guard(rng, n: int, share: float, per_image: int) -> dict[str, Comparison]:
    """The comparisons of MODELS levelled models that are no better than the S-VLM before."""
    changes = rng.choice([-1, 0, 1], (MODELS, n // per_image), p=[share / 2, 1 - share, share / 2]).repeat(
        per_image, axis=1
    )
    images = np.arange(n) // per_image
    return {
        f"variant-{i}": Comparison(
            n, n, int((gains > 0).sum()), int((gains < 0).sum()), 0, MODELS, part=(gains, images.tolist())
        )
        for i, gains in enumerate(changes)
    }


def measured(guards: int, n: int, share: float, per_image: int) -> dict[str, float]:
    """Shares of the guards, in percent."""
    rng, counts = (
        np.random.default_rng(0),
        dict.fromkeys(("one", "four", "four, uncorrected", "called worse", "as independent"), 0),
    )
    for _ in range(guards):
        found = guard(rng, n, share, per_image)
        single = {name: replace(one, candidates=1) for name, one in found.items()}
        first = next(iter(single.values()))
        counts["one"] += recommended({"mpa": first}) is not None
        counts["four"] += recommended(found) is not None
        counts["four, uncorrected"] += recommended(single) is not None
        counts["called worse"] += first.verdict == WORSE
        counts["as independent"] += recommended({"mpa": replace(first, part=None)}) is not None
    return {what: round(100 * count / guards, 2) for what, count in counts.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--guards", type=int, default=2000, help="simulated guards for each setting (default: %(default)s)")
    args = p.parse_args()
    figures = {}
    for n, share, per_image in SETTINGS:
        name = f"{n} questions, {share:.0%} change" + (f", {per_image} about an image" if per_image > 1 else "")
        figures[name] = measured(args.guards, n, share, per_image)
        print(
            f"{name}, of {args.guards:,} guards recommend: "
            + ", ".join(f"{what} {of} %" for what, of in figures[name].items())
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
