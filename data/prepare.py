"""Convert a dataset's official download into the files that the stages read, and report what is missing or broken.

    python data/prepare.py textVQA --source ~/Downloads/TextVQA       # stVQA, chartVQA, okVQA, easyVQA
    python data/prepare.py okVQA --source ~/hf/OK-VQA --source-format hf
    python data/prepare.py check textVQA                              # open every image once
    python data/prepare.py check images --image-root ~/Pictures

Reads  the unchanged download, zipped or not, anywhere below --source (data/README.md says what to download),
       or a copy of a Hugging Face dataset: parquet files with embedded images.
Writes the annotation files of the released MPA code under data/<Name>/. A folder with all images of a part is
       linked; else the images are unpacked, or linked one by one (copied if on another disk). Existing files are
       kept; a file that would change is refused without --overwrite.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import placing
import sources
from layouts import as_train_json, is_train_json, part_of, samples_of, split_of
from sources import Source

from mpa.data import DATASETS, image_check
from mpa.data.loading import check_unique_ids, data_folder, labelled, load_samples
from mpa.data.paths import locate
from mpa.data.protocol import Sample
from mpa.files import records
from mpa.files.argument_types import number, path_map
from mpa.files.records import InputError
from mpa.method.presets import PRESETS
from mpa.models.families import MAX_PIXELS, MIN_PIXELS
from mpa.stages import cli

PREPARATIONS = {name: dataset.preparation for name, dataset in DATASETS.items() if dataset.preparation}


def check_files(files: dict[Path, object], overwrite: bool) -> set[Path]:
    """The files that exist with the same content, ignoring white space. Raises InputError if a file would change."""

    def content_of(document):
        return document.get("data", document) if isinstance(document, dict) else document

    unchanged = {p for p, new in files.items() if p.exists() and content_of(records.read_json(p)) == content_of(new)}
    changed = [path for path in files if path.exists() and path not in unchanged]
    if changed and not overwrite:
        raise InputError(
            f"{changed[0]}: already exists and differs ({len(changed)} files differ). To keep it, e.g. the released "
            "code's own file, choose another --data folder; else give --overwrite."
        )
    return unchanged


# --- commands


def report(dataset: str, official: tuple[int, int] | None, files: dict[str, tuple[int, int]]) -> None:
    """Compare (questions, images) found with the counts in the paper, its README and its released files."""
    expected = PREPARATIONS[dataset].expected
    found = {"official train": official, **files} if official and "official train" in expected else files
    differ = False
    print(f"\n  {'questions / images':<58}{'found':>16}{'released':>16}")
    for name, numbers in found.items():
        released = expected.get(name)
        same = released is None or all(n is None or n == m for n, m in zip(released, numbers, strict=True))
        note = "" if same else "   differs"
        differ = differ or not same
        print(f"  {name:<58}{_pair(numbers):>16}{_pair(released) if released else '–':>16}{note}")
    if differ:
        print("  differs: another version of the download, or a part of it. That is no error if you meant it.")


def _pair(numbers: tuple[int, int | None]) -> str:
    return " / ".join("?" if n is None else f"{n:,}" for n in numbers)


def count(samples: list[Sample]) -> tuple[int, int]:
    return len(samples), len({s.image_path for s in samples})


def labelled_only(part: str, samples: list[Sample]) -> list[int]:
    """The indices of the samples with an answer. The number of the others is printed."""
    kept = [i for i, sample in enumerate(samples) if labelled(sample.answers)]
    if len(kept) < len(samples):
        n = len(samples) - len(kept)
        print(f"  {n:,} questions of the {part} part have no answers and are skipped; {len(kept):,} have answers.")
    return kept


def prepare(args) -> None:
    dataset, steps, data = args.dataset, PREPARATIONS[args.dataset], args.data
    if steps.download and not args.source:
        raise InputError(f"--source is needed: the folder with {steps.download}.")
    source = copy = None
    if args.source_format == "hf":
        copy = sources.from_hf(args.source, dataset)
        parts = copy.records
    else:
        source = Source(args.source) if args.source else None
        parts = {part: items for part, items in steps.official(source).items() if items}
    samples = {}
    for part, items in parts.items():
        found = samples_of(dataset, part, items, data, f"{args.source or 'easy-vqa'}, {part} part")
        kept = labelled_only(part, found)
        parts[part], samples[part] = ([of[i] for i in kept] for of in (items, found))
        if copy:
            copy.rows[part], copy.sizes[part] = ([of[part][i] for i in kept] for of in (copy.rows, copy.sizes))
        check_unique_ids(samples[part], f"{args.source}, {part} part")
    parts, samples = ({part: items for part, items in of.items() if items} for of in (parts, samples))
    if not parts:
        unopened = f" Not opened: {', '.join(map(str, source.unopened))}." if source and source.unopened else ""
        raise InputError(f"{args.source}: no files of {dataset} found. Expected {steps.download}.{unopened}")
    for part in ("train", "test"):
        if part not in parts and "all" not in parts and steps.download:
            print(f"  The source has no {part} part: its files are not written.")

    files, counts = steps.files(parts, args.seed), {}
    for name, content in files.items():
        items = split_of(dataset, part_of(dataset, name)).records(content) if not is_train_json(name) else content
        of_file = samples_of(dataset, part_of(dataset, name), list(items), data, name)
        counts[name] = count(of_file)
        if is_train_json(name):
            files[name] = as_train_json(of_file, args.preset)
    files = {data / steps.folder / name: content for name, content in files.items()}
    unchanged = check_files(files, args.overwrite)
    roots = []
    if copy:
        roots = placing.of_copy(copy.sizes, dataset, samples, data)
    elif source and steps.download:
        roots = placing.of_download(source, dataset, samples, data)
    placing.check_target(data / steps.folder, data)
    placing.check(roots, data)

    there = unchanged == set(files) and all(root.complete for root in roots)
    with contextlib.nullcontext() if there else records.locked(data / steps.folder):
        for path, content in files.items():
            if path not in unchanged:
                records.write_json(path, content)
            print(f"  {path}: {'exists' if path in unchanged else 'written'}")
        if copy:
            lost = placing.place_copy(roots, copied_images(args.source, copy, samples))
        else:
            lost = placing.place_download(roots)
    official = samples.get("train", samples.get("all"))
    report(dataset, count(official) if official else None, counts)
    if lost:
        closed = source.unopened if source else ()
        unopened = f" Archives and other files that were not opened: {', '.join(map(str, closed))}." if closed else ""
        sys.exit(f"\n{lost:,} images are missing below {args.source}, or broken.{unopened} Add them and run again.")
    print(f"\nNext: python data/prepare.py check {dataset}")


def copied_images(source, copy, samples: dict[str, list[Sample]]) -> Iterator[tuple]:
    """(where it is, its new path, image) of each row of a Hugging Face copy that is a sample."""
    of_row = {
        row: sample.image_path for part in samples for row, sample in zip(copy.rows[part], samples[part], strict=True)
    }
    for i, (where, _, _, image) in enumerate(sources.hf_rows(source)):
        if i in of_row:
            yield where, of_row[i], image


def check(args) -> None:
    """Report on a dataset's images; exit with 1 if a run would lose samples."""
    dataset, lost, missing = args.dataset, 0, []
    if not DATASETS[dataset].labelled:
        groups = {"images": load_samples(dataset, "train", None, args.image_root, images=False)}
    else:
        groups = {}
        for split in (args.split,) if args.split else ("train", "test"):
            where = getattr(DATASETS[dataset], split)
            file = Path(args.annotations or args.data / where.annotations)
            if file.exists():
                root = args.image_root or args.data / where.images
                groups[file] = load_samples(dataset, split, file, root, args.path_map, images=False)
            else:
                missing.append(file)
        folder = args.data / PREPARATIONS[dataset].folder
        for file in sorted(folder.glob("*.json")) if not args.annotations else ():
            if is_train_json(file.name):
                found = records.read_records(file, "train")
                paths = locate([r["image"] for r in found], args.path_map, args.image_root)
                groups[file] = [Sample(r["id"], path) for r, path in zip(found, paths, strict=True)]
    for file, samples in groups.items():
        found = image_check.check(
            samples[: args.limit], args.workers, args.min_pixels, args.max_pixels, args.max_tiles, args.model_path
        )
        print("\n".join([f"{file}:", *found.lines()]))
        lost += found.lost
    for file in missing:
        print(f"{file}: no such file.")
    if lost or missing:
        sys.exit(f"{lost} samples would be lost and {len(missing)} files are missing; fix the problems listed above.")
    print("All images are usable.")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=(*PREPARATIONS, "check"), help="a dataset to prepare, or check")
    p.add_argument("dataset", nargs="?", choices=DATASETS, help="the dataset to check")
    p.add_argument("--data", type=Path, default=data_folder(), help="the data folder (default: $MPA_DATA, or data/)")
    p.add_argument("--source", type=Path, metavar="DIR", help="the download, or a zip archive of it")
    p.add_argument(
        "--source-format",
        choices=("official", "hf"),
        default="official",
        help="hf: a copy of a Hugging Face dataset (default: official)",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed of the splits (default: 0)")
    p.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="prompt in the train JSON (default: paper; released: the question alone)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace existing files that differ")
    c = p.add_argument_group("check")
    c.add_argument("--split", choices=("train", "test"), help="check only this split (default: both)")
    c.add_argument("--annotations", metavar="FILE", help="annotation file of --split (default: the dataset's)")
    c.add_argument("--image-root", metavar="DIR", help="image folder of --split (default: the dataset's)")
    c.add_argument("--path-map", type=path_map, action="append", default=[], metavar="OLD=NEW", help="moved images")
    c.add_argument("--limit", type=number(1), metavar="N", help="only the first N samples of each file")
    c.add_argument("--workers", type=number(1), default=os.cpu_count(), help="processes (default: one per core)")
    c.add_argument("--min-pixels", type=number(1), default=MIN_PIXELS, help="used to count visual tokens")
    c.add_argument("--max-pixels", type=number(1), default=MAX_PIXELS, help="used to count visual tokens")
    c.add_argument("--max-tiles", type=number(1), metavar="N", help="used to count visual tokens")
    c.add_argument("--model-path", metavar="MODEL", help="whose visual tokens to count (default: a Qwen2-VL's)")
    args = p.parse_args(argv)
    if (args.what == "check") != bool(args.dataset):
        p.error("check needs the name of a dataset; the other commands take none")
    if (args.annotations or args.image_root) and not args.split and args.dataset and DATASETS[args.dataset].labelled:
        p.error("--annotations and --image-root need --split")
    args.command, args.dataset, args.path_map = args.what, args.dataset or args.what, dict(args.path_map)
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    check(args) if args.command == "check" else prepare(args)


if __name__ == "__main__":
    cli.run(main, remedy="Choose another --data folder.")
