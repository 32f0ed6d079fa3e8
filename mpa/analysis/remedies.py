"""What `scripts/guard.sh` tries where a levelled S-VLM is worse, each remedy on top of the one before: a line for each.

    python -m mpa.analysis.remedies results/mine/PL_big_small_textVQA
    anchors LEARNING_RATE=1e-05 MERGER_LR=1e-05 VISION_LR=2e-06 EPOCHS=1.0
    …

The name ends that of the remedy's model folder; the rest are variables of PL.sh, made from those that the levelled model was trained with.
"""

import argparse
from pathlib import Path

from mpa.files.records import read_json
from mpa.method.presets import ANCHORED
from mpa.runs.layout import train_meta
from mpa.stages import cli

RATES = {"LEARNING_RATE": "learning_rate", "MERGER_LR": "merger_lr", "VISION_LR": "vision_lr"}


def remedies(settings: dict, anchored: bool) -> dict[str, dict[str, float]]:
    """{name: {variable: value}} in their order. `settings` are the trainer's; `anchored`: it had all anchors already."""
    rates, epochs = {name: settings[flag] for name, flag in RATES.items()}, settings["num_train_epochs"]
    third = {name: rate / 3 for name, rate in rates.items()}
    slow, short = third | {"EPOCHS": epochs}, third | {"EPOCHS": epochs / 2}
    if anchored:
        return {"slow": slow, "slow-short": short}
    return {"anchors": rates | {"EPOCHS": epochs}, "anchors-slow": slow, "anchors-slow-short": short}


def main() -> None:
    p = argparse.ArgumentParser(prog="mpa.analysis.remedies", description=__doc__)
    p.add_argument("levelled", type=Path, help="the folder of the levelled S-VLM")
    p.add_argument("--preset", help="that of the run")
    args = p.parse_args()
    settings = read_json(train_meta(args.levelled))["settings"]
    for name, variables in remedies(settings, args.preset == ANCHORED).items():
        print(name, *(f"{variable}={value}" for variable, value in variables.items()))


if __name__ == "__main__":
    cli.run(main)
