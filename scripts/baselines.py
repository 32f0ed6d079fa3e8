"""The baselines of MPA (paper, table 6): other train sets from the same images, as train JSON.

    python scripts/baselines.py --pa-json results/RUN/PA_….json --train-json results/RUN/PI_…_train_….json --seed 0

Reads  the PA file, the parity set, and its meta file (preset and held-out images).
Writes for each baseline <train-json's name>_<baseline>.json, in the folder of the train JSON:
  all_pseudo     every pseudo label, without PI
  random_pseudo  as many pseudo labels as MPA selects, at random
  human          the human question and answer of every image
  human_n        as many human labels as MPA selects, at random
  rejected       the pseudo labels that PI did not select
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa.data.paths import locate
from mpa.files import log_file, outputs, records
from mpa.files.argument_types import path_map
from mpa.method import holdout
from mpa.method.prompts import train_prompt
from mpa.stages import cli

BASELINES = ("all_pseudo", "random_pseudo", "human_n", "human", "rejected")


def train_sets(annotations: list[dict], parity: list[dict], seed: int, preset: str = "paper") -> dict[str, list[dict]]:
    """{baseline: train records}. The human baselines are empty if the images have no labels."""
    n, selected = len(parity), {str(r["id"]) for r in parity}

    def as_records(who: str) -> list[dict]:
        return [
            records.train_record(
                r["question_id"], r["image_path"], train_prompt(r[f"{who}_question"], preset), r[f"{who}_answer"]
            )
            for r in annotations
            if r[f"{who}_question"] and r[f"{who}_answer"]
        ]

    pseudo, human = as_records("predicted"), as_records("ground_truth")
    rng = random.Random(seed)
    return {
        "all_pseudo": pseudo,
        "random_pseudo": rng.sample(pseudo, min(n, len(pseudo))),
        "human_n": rng.sample(human, min(n, len(human))),
        "human": human,
        "rejected": [r for r in pseudo if str(r["id"]) not in selected],
    }


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pa-json", type=Path, required=True, help="the annotations of the L-VLM")
    p.add_argument("--train-json", type=Path, required=True, help="the parity set")
    p.add_argument("--image-root", metavar="DIR", help="folder of the images, as for PI")
    p.add_argument(
        "--path-map",
        type=path_map,
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="moved images, as for PI",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = p.parse_args(argv)
    parity = records.read_parity(args.train_json)
    meta = records.read_json(records.meta_path(args.train_json))
    annotations, threshold = records.read_records(args.pa_json, "PA"), holdout.threshold_of(args.train_json)
    current_paths = {str(r["id"]): r["image"] for r in parity}  # as PI found the images
    paths = locate([r["image_path"] for r in annotations], dict(args.path_map), args.image_root)
    annotations = [
        r | {"image_path": current_paths.get(str(r["question_id"]), path)}
        for r, path in zip(annotations, paths, strict=True)
    ]
    if threshold:
        hash_by_path = holdout.hashes(r["image_path"] for r in annotations)
        hash_by_path |= {r["image_path"]: r["image_hash"] for r in annotations if r.get("image_hash")}
        annotations = [r for r in annotations if not holdout.is_held_out(hash_by_path[r["image_path"]], threshold)]
    found = train_sets(annotations, parity, args.seed, meta["settings"]["preset"])
    out = {name: args.train_json.with_name(f"{args.train_json.stem}_{name}.json") for name in found}
    for file in out.values():
        outputs.refuse_others(file, "baseline", outputs.inputs_of(args), ours=lambda path: True)  # none has a meta file
    log_file.open_log(args.train_json.parent / "log.txt")
    with records.locked(out["all_pseudo"], wait=True):  # all of one seed
        for name, samples in found.items():
            records.write_json(out[name], samples)
            print(f"{name}: wrote {len(samples)} samples to {out[name]}")


if __name__ == "__main__":
    cli.run(main)
