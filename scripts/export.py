"""The parity set in the form that another trainer reads.

    python scripts/export.py results/RUN/PI_…_train_….json --to ms-swift
    python scripts/export.py results/RUN/PI_…_train_….json --to hf --out parity-set

Reads  a parity set, or any train JSON of that form (id, image, conversations).
Writes beside it, or to --out:
  llava      one JSON list with `image`, as LLaVA and Qwen2-VL-Finetune read it: the parity set's own form
  sharegpt   one JSON list with `images`, as LLaMA-Factory reads it, and its entry in dataset_info.json
  ms-swift   JSON lines of `messages` and `images`
  trl        a dataset folder of `prompt`, `completion` and `images`, the images inside: SFTTrainer's vision form
  hf         a dataset folder of `id`, `image`, `question` and `answer`, the images inside, with a data card
The folders load with `datasets.load_dataset(folder)`. They hold copies of the images: only what decodes as one, and
with --image-root only what lies below it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from mpa import cli, records
from mpa.datasets.paths import locate, missing_images
from mpa.exports import (
    FORMS,
    data_card,
    free_for_folder,
    is_unicode,
    registry_with,
    write_folder,
)
from mpa.image_files import ImageError, open_image
from mpa.records import InputError

FOLDERS = ("trl", "hf")


def read_samples(args) -> list[dict]:
    """The samples, each one that the form can hold, with where its image lies now."""
    samples, kept = records.read_records(args.train_json, "train"), []
    for i, sample in enumerate(samples):
        try:
            if not isinstance(sample["image"], str):
                raise ValueError("'image' should be the path of an image")
            if args.to in FOLDERS and ".." in Path(sample["image"]).parts:
                raise ValueError(f"its image {sample['image']!r} leads up and out of its folder; name it without '..'")
            FORMS[args.to](sample)
            if is_unicode(sample):
                kept.append(sample)
        except ValueError as error:
            raise InputError(f"{args.train_json}, record {i}: {error}.") from None
    if len(kept) < len(samples):
        print(f"warning: {len(samples) - len(kept)} samples left out: their text is no Unicode.", file=sys.stderr)
    if not kept:
        raise InputError(f"{args.train_json}: no samples in it.")
    paths = locate([sample["image"] for sample in kept], dict(args.path_map), args.image_root)
    return [sample | {"image": path} for sample, path in zip(kept, paths, strict=True)]


def check_images(paths: list[str], image_root: str | None) -> None:
    """Raise InputError for one that is not there, not below the image root, or no image: what is copied is published."""
    if missing := missing_images(paths):
        raise InputError(f"{missing[0]}: no such image, nor {len(missing) - 1} others; a folder holds them all.")
    if image_root:
        root = os.path.realpath(image_root)
        outside = [path for path in paths if os.path.commonpath([os.path.realpath(path), root]) != root]
        if outside:
            raise InputError(
                f"{outside[0]}: lies outside --image-root {image_root}, as do {len(outside) - 1} others; nothing written."
            )
    broken = {}
    for path in tqdm(dict.fromkeys(paths), desc="opening images", unit="image", disable=None):
        try:
            open_image(path)
        except ImageError as error:
            broken[path] = error
    if broken:
        path, why = next(iter(broken.items()))
        raise InputError(
            f"{path}: {why}; nor can {len(broken) - 1} others be used. A folder holds images and nothing else; take "
            "these samples out."
        )


def of_run(train_json: Path) -> dict:
    """The parity set's meta file, {} where it has none; its parts are objects."""
    meta = records.meta_path(train_json)
    made = records.read_json(meta) if meta.exists() else {}
    if not isinstance(made, dict) or not all(isinstance(made.get(part, {}), dict) for part in ("settings", "funnel")):
        raise InputError(f"{meta}: not the meta file of a parity set; take it away to export without what it says.")
    return made


def how_to_train(to: str, out: Path, made: dict) -> str:
    """What the trainer must be told to see what is evaluated, token by token: its template, and the images' pixels."""
    pixels = [made.get("settings", {}).get(name) for name in ("min_pixels", "max_pixels")]
    least, most = (n or default for n, default in zip(pixels, (cli.MIN_PIXELS, cli.MAX_PIXELS), strict=True))
    return {
        # Its own resizing gives other sizes than the processor's, so that it must leave the images as they are.
        "sharegpt": f"LLaMA-Factory, for a Qwen2-VL: --dataset_dir {out.parent} --dataset {out.stem} --template qwen2_vl "
        f"--image_min_pixels 1 --image_max_pixels 1000000000, and in the model's preprocessor_config.json shortest_edge "
        f"{least} and longest_edge {most}.",
        "ms-swift": f"ms-swift, for a Qwen2-VL: MIN_PIXELS={least} MAX_PIXELS={most} swift sft --template qwen2_vl "
        f"--model_type qwen2_vl --dataset {out}",
        "trl": "TRL, for a Qwen2-VL: SFTTrainer(processing_class=AutoProcessor.from_pretrained(S_VLM, "
        f"min_pixels={least}, max_pixels={most}), …)",
    }[to]


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("train_json", type=Path, help="the parity set")
    p.add_argument("--to", choices=FORMS, default="llava", help="(default: llava)")
    p.add_argument(
        "--out", type=Path, help="file or folder to write (default: beside the parity set; a folder has the run's name)"
    )
    p.add_argument(
        "--image-root",
        metavar="DIR",
        help="look for the images below this folder; hf and trl take none from elsewhere",
    )
    p.add_argument("--path-map", type=cli.path_map, action="append", default=[], metavar="OLD=NEW", help="moved images")
    args = p.parse_args(argv)
    samples, made = read_samples(args), of_run(args.train_json)
    stem, run = args.train_json.stem, args.train_json.resolve().parent.name
    default = f"{stem}_{run}_{args.to}" if args.to in FOLDERS else f"{stem}_{args.to}.json"
    out = args.out or args.train_json.with_name(default + ("l" if args.to == "ms-swift" else ""))
    if out.resolve() == args.train_json.resolve():
        raise InputError(f"{out}: is what is read; name another file with --out.")
    if args.to not in FOLDERS and (out.is_dir() or out.name == "dataset_info.json"):
        raise InputError(f"{out}: cannot hold the samples; name a file with --out.")
    if args.to in FOLDERS:
        free_for_folder(out)
        check_images([s["image"] for s in samples], args.image_root)
        write_folder(out, samples, FORMS[args.to], lambda file: data_card(args.train_json, made, len(samples), file))
    else:
        missing_images([s["image"] for s in samples])
        rows = [FORMS[args.to](s) for s in samples]
        if args.to == "ms-swift":
            records.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        elif args.to == "sharegpt":
            registry = registry_with(out)
            records.write_json(out, rows)
            records.write_json(os.path.realpath(out.with_name("dataset_info.json")), registry)
        else:
            records.write_json(out, rows)
    print(f"{len(samples)} samples, wrote {out}.")
    if args.to in FOLDERS:
        folders = {os.path.dirname(os.path.abspath(s["image"])) for s in samples}
        print(f"The images in it are copies, from below {os.path.commonpath(folders)}.")
    if args.to in ("sharegpt", "ms-swift", "trl"):
        print(how_to_train(args.to, out, made))


if __name__ == "__main__":
    cli.run(main)
