"""Export the parity set in another trainer's format.

    python scripts/export.py results/RUN/PI_…_train_….json --to ms-swift
    python scripts/export.py results/RUN/PI_…_train_….json --to hf --out parity-set

Reads  a parity set, or any train JSON in that format (id, image, conversations).
Writes to the same folder, or to --out:
  llava      one JSON list with `image`, for LLaVA and Qwen2-VL-Finetune: the parity set's own format
  sharegpt   one JSON list with `images`, for LLaMA-Factory, and an entry in dataset_info.json
  ms-swift   JSON Lines of `messages` and `images`
  trl        a dataset folder of `prompt`, `completion` and embedded `images`: SFTTrainer's vision format
  hf         a dataset folder of `id`, embedded `image`, `question` and `answer`, with a dataset card
Load a folder with `datasets.load_dataset(folder)`. It contains copies of the images. Every file must decode as an
image; with --image-root it must also lie below that folder.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from mpa.data.paths import locate, missing_images
from mpa.files import outputs, records
from mpa.files.argument_types import path_map
from mpa.files.image_files import ImageError, open_image
from mpa.files.records import InputError
from mpa.runs.exports import (
    FORMS,
    data_card,
    free_for_folder,
    is_unicode,
    kind_of,
    registry_with,
    write_folder,
)
from mpa.stages import cli

FOLDERS = ("trl", "hf")


def read_samples(args) -> list[dict]:
    """The samples, checked against the format, with the current paths of their images."""
    samples, kept = records.read_records(args.train_json, "train"), []
    for i, sample in enumerate(samples):
        try:
            if not isinstance(sample["image"], str):
                raise ValueError("'image' should be the path of an image")
            if args.to in FOLDERS and ".." in Path(sample["image"]).parts:
                raise ValueError(f"its image path {sample['image']!r} contains '..'; use a path without it")
            FORMS[args.to](sample)
            kind_of(sample)
            if is_unicode(sample):
                kept.append(sample)
        except ValueError as error:
            raise InputError(f"{args.train_json}, record {i}: {error}.") from None
    if len(kept) < len(samples):
        print(f"warning: {len(samples) - len(kept)} samples left out: invalid Unicode in their text.", file=sys.stderr)
    if not kept:
        raise InputError(f"{args.train_json}: contains no samples.")
    paths = locate([sample["image"] for sample in kept], dict(args.path_map), args.image_root)
    return [sample | {"image": path} for sample, path in zip(kept, paths, strict=True)]


def check_images(paths: list[str], image_root: str | None) -> None:
    """Raise InputError for an image that is missing, outside the image root, or broken: the copies may be published."""
    if missing := missing_images(paths):
        raise InputError(f"{missing[0]}: no such image, nor {len(missing) - 1} others; the export needs all images.")
    if image_root:
        root = os.path.realpath(image_root)
        outside = [path for path in paths if os.path.commonpath([os.path.realpath(path), root]) != root]
        if outside:
            raise InputError(
                f"{outside[0]}: outside --image-root {image_root}, as are {len(outside) - 1} others; nothing was written."
            )
    broken = {}
    for path in tqdm(dict.fromkeys(paths), desc="opening images", unit="image", disable=None):
        try:
            open_image(path)
        except ImageError as error:
            broken[path] = error
    if broken:
        path, why = next(iter(broken.items()))
        raise InputError(f"{path}: {why}. {len(broken) - 1} other images cannot be used either. Remove these samples.")


def read_meta(train_json: Path) -> dict:
    """The parity set's validated meta file, {} if there is none."""
    file = records.meta_path(train_json)
    meta = records.read_json(file) if file.exists() else {}
    if not isinstance(meta, dict) or not all(isinstance(meta.get(part, {}), dict) for part in ("settings", "funnel")):
        raise InputError(f"{file}: not the meta file of a parity set; move it away to export without it.")
    return meta


def how_to_train(to: str, out: Path, meta: dict) -> str:
    """The trainer's settings (template, pixel limits) that make it train on exactly the evaluated tokens."""
    known = [meta.get(name, meta.get("settings", {}).get(name)) for name in ("min_pixels", "max_pixels")]
    min_pixels, max_pixels = known if all(known) else ("MIN", "MAX")
    line = {
        # Its own resizing differs from the processor's, so it must not resize the images.
        "sharegpt": f"LLaMA-Factory, for a Qwen2-VL: --dataset_dir {out.parent} --dataset {out.stem} --template qwen2_vl "
        f"--image_min_pixels 1 --image_max_pixels 1000000000, and in the model's preprocessor_config.json shortest_edge "
        f"{min_pixels} and longest_edge {max_pixels}.",
        "ms-swift": f"ms-swift, for a Qwen2-VL: MIN_PIXELS={min_pixels} MAX_PIXELS={max_pixels} swift sft --template qwen2_vl "
        f"--model_type qwen2_vl --dataset {out}",
        "trl": "TRL, for a Qwen2-VL: SFTTrainer(processing_class=AutoProcessor.from_pretrained(S_VLM, "
        f"min_pixels={min_pixels}, max_pixels={max_pixels}), …)",
    }[to]
    if all(known):
        return line
    return (
        f"{line}\nMIN and MAX are the --min-pixels and --max-pixels with which PI.sh asked the S-VLM. The parity set's meta file does "
        "not say them: an older version wrote it, or there is none."
    )


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("train_json", type=Path, help="the parity set")
    p.add_argument("--to", choices=FORMS, default="llava", help="the format (default: llava)")
    p.add_argument("--out", type=Path, help="file or folder to write (default: in the parity set's folder)")
    p.add_argument(
        "--image-root",
        metavar="DIR",
        help="search the images below this folder; hf and trl refuse images from elsewhere",
    )
    p.add_argument("--path-map", type=path_map, action="append", default=[], metavar="OLD=NEW", help="moved images")
    args = p.parse_args(argv)
    samples, meta = read_samples(args), read_meta(args.train_json)
    stem, run = args.train_json.stem, args.train_json.resolve().parent.name
    default = f"{stem}_{run}_{args.to}" if args.to in FOLDERS else f"{stem}_{args.to}.json"
    out = args.out or args.train_json.with_name(default + ("l" if args.to == "ms-swift" else ""))
    if args.to not in FOLDERS and (out.is_dir() or out.name == "dataset_info.json"):
        raise InputError(f"{out}: cannot be the output file; choose another file with --out.")
    if args.to not in FOLDERS:
        ours = {} if args.out else {"ours": lambda path: True}  # the name says so
        outputs.refuse_others(out, f"export {args.to}", [args.train_json], **ours)
    if args.to in FOLDERS:
        free_for_folder(out)
        check_images([s["image"] for s in samples], args.image_root)
        write_folder(out, samples, FORMS[args.to], lambda file: data_card(args.train_json, meta, len(samples), file))
    else:
        missing_images([s["image"] for s in samples])
        rows = [FORMS[args.to](s) for s in samples]
        text = records.as_json(rows, out)
        if args.to == "ms-swift":
            text = "".join(records.dumps(row, out, ensure_ascii=False) + "\n" for row in rows)
        if args.to == "sharegpt":
            registered = Path(os.path.realpath(out.with_name("dataset_info.json")))
            with records.locked(registered, wait=True):
                registry = registry_with(out)
                outputs.write(out, text, f"export {args.to}")
                records.write_json(registered, registry)
        else:
            outputs.write(out, text, f"export {args.to}")
    print(f"Wrote {len(samples)} samples to {out}.")
    if args.to in FOLDERS:
        folders = {os.path.dirname(os.path.abspath(s["image"])) for s in samples}
        print(f"It contains copies of the images below {os.path.commonpath(folders)}.")
    if n := sum(map(bool, map(kind_of, samples))):
        print(f"{n} samples have a `kind`, which is in the export; a trainer does not need it.")
    left = Counter(name for sample in samples for name in sample.keys() - {"id", "image", "conversations", "kind"})
    if left and args.to != "llava":
        print(
            f"Fields that this format does not keep: {', '.join(f'{name} ({n} samples)' for name, n in sorted(left.items()))}."
        )
    if args.to in ("sharegpt", "ms-swift", "trl"):
        print(how_to_train(args.to, out, meta))


if __name__ == "__main__":
    cli.run(main)
