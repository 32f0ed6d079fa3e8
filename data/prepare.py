"""Bring a data set's official download into the files that the stages read, and say what is missing or broken.

    python data/prepare.py textVQA --source ~/Downloads/TextVQA       # stVQA, chartVQA, okVQA, easyVQA
    python data/prepare.py okVQA --source ~/hf/OK-VQA --source-format hf
    python data/prepare.py check textVQA                              # open every picture once
    python data/prepare.py check images --image-root ~/Pictures

Reads  the download as it is, zipped or not, anywhere below --source (data/README.md says what to download),
       or a copy of a Hugging Face data set: parquet files with the pictures inside.
Writes the annotation files of the released MPA code under data/<Name>/. A folder that holds all pictures of a part
       is linked; else they are unpacked, or linked one by one (copied from another disk). What is there already
       stays; a file that would change is refused.
"""

import argparse
import contextlib
import os
import shutil
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sources
from layouts import PREPARATIONS, as_train_json, is_train_json, part_of, root_of, samples_of, split_of
from sources import Member, Source
from tqdm import tqdm

from mpa import checking, cli, records
from mpa.datasets import DATA, DATASETS, Sample, load_samples, locate, no_twice
from mpa.records import InputError


def write_files(files: dict[Path, object], overwrite: bool) -> None:
    """Write what is new. A file that would change is refused before any is written; white space is no change."""

    def content_of(document):
        return document.get("data", document) if isinstance(document, dict) else document

    there = {
        path: path.exists() and content_of(records.read_json(path)) == content_of(new) for path, new in files.items()
    }
    changed = [path for path in files if path.exists() and not there[path]]
    if changed and not overwrite:
        raise InputError(
            f"{changed[0]}: is there already and differs (of {len(changed)} files). The released code's own files are "
            "best kept; choose another --data folder, or --overwrite."
        )
    for path, content in files.items():
        if not there[path]:
            records.write_json(path, content)
        print(f"  {path}: {'is there already' if there[path] else 'written'}")


# --- pictures


def write_picture(path: Path, content: bytes) -> None:
    if path.exists() and path.stat().st_size == len(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def link_picture(path: Path, source: str) -> None:
    """The same file under another name; a copy where it lies on another disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)


def find_picture(source: Source, dataset: str, part: str, name: str) -> Member | None:
    """A picture in the source; ChartQA's parts have pictures of the same names, so that the folder counts."""
    return source.find(f"{part}/png/{name}" if dataset == "chartVQA" else name)


def one_folder(members: dict[str, Member | None]) -> Path | None:
    """The plain folder that holds all of these pictures, none of them behind a link; or None."""
    folders = {m and not m.archive and m.name.removesuffix(f"/{name}") for name, m in members.items()}
    folder = folders.pop() if len(folders) == 1 else None
    if not folder:
        return None
    real = os.path.realpath(folder)
    straight = all(
        os.path.realpath(m.name) == os.path.join(real, os.path.normpath(name)) for name, m in members.items()
    )
    return Path(real) if straight else None


def place_pictures(source: Source, dataset: str, parts: dict[str, list[Sample]], data: Path) -> int:
    """Bring the pictures to the image roots; how many are nowhere to be found."""
    by_root, lost = {}, 0
    for part, samples in parts.items():
        root = root_of(dataset, part, data)
        by_root.setdefault(root, {}).update((os.path.relpath(s.image_path, root), part) for s in samples)
    for root, wanted in by_root.items():
        members = {name: find_picture(source, dataset, part, name) for name, part in wanted.items()}
        complete = root.is_symlink() and all((root / name).exists() for name in wanted)
        if not complete and not (root.is_dir() and not root.is_symlink()) and (folder := one_folder(members)):
            root.parent.mkdir(parents=True, exist_ok=True)
            root.unlink(missing_ok=True)  # a link to where they are no more
            root.symlink_to(folder)
        elif not complete:
            if root.is_symlink():
                root.unlink()  # never write into the download
            place_one_by_one(root, members)
        there = sum((root / name).exists() for name in wanted)
        lost += len(wanted) - there
        print(f"  {root}: {there:,} of {len(wanted):,} pictures")
    return lost


def place_one_by_one(root: Path, members: dict[str, Member | None]) -> None:
    with contextlib.ExitStack() as stack:
        archives = {m.archive for m in members.values() if m and m.archive}
        archives = {path: stack.enter_context(zipfile.ZipFile(path)) for path in archives}
        for name, member in tqdm(members.items(), desc=f"pictures of {root.name}", unit="picture", disable=None):
            path = root / name
            if member is None:
                continue
            if member.archive is None:
                if not path.exists() or path.stat().st_size != os.stat(member.name).st_size:
                    link_picture(path, member.name)
                continue
            archive = archives[member.archive]
            if path.exists() and path.stat().st_size == archive.getinfo(member.name).file_size:
                continue
            try:
                write_picture(path, archive.read(member.name))
            except zipfile.BadZipFile as error:
                raise InputError(f"{member}: {error}. Download it again.") from None


# --- what a person types


def report(dataset: str, official: tuple[int, int] | None, files: dict[str, tuple[int, int]]) -> None:
    """What was found beside what the paper, its README and its released files state: (questions, images)."""
    expected = PREPARATIONS[dataset].expected
    found = {"official train": official, **files} if official and "official train" in expected else files
    print(f"\n  {'questions / images':<58}{'found':>16}{'released':>16}")
    for name, numbers in found.items():
        there = expected.get(name)
        same = there is None or all(n is None or n == m for n, m in zip(there, numbers, strict=True))
        print(f"  {name:<58}{_pair(numbers):>16}{_pair(there) if there else '–':>16}{'' if same else '   differs'}")


def _pair(numbers: tuple[int, int | None]) -> str:
    return " / ".join("?" if n is None else f"{n:,}" for n in numbers)


def count(samples: list[Sample]) -> tuple[int, int]:
    return len(samples), len({s.image_path for s in samples})


def prepare(args) -> None:
    dataset, steps, data = args.dataset, PREPARATIONS[args.dataset], args.data
    if dataset != "easyVQA" and not args.source:
        raise InputError(f"--source is needed: the folder with {steps.download}.")
    source = None
    if args.source_format == "hf":

        def keep_picture(where: str, part: str, record: dict, picture: bytes) -> None:
            (sample,) = samples_of(dataset, part, [record], data, where)
            write_picture(Path(sample.image_path), picture)

        parts = sources.from_hf(args.source, dataset, keep_picture)
    else:
        source = Source(args.source) if args.source else None
        parts = {part: items for part, items in steps.official(source).items() if items}
    if not parts:
        unopened = f" Not opened: {', '.join(map(str, source.unopened))}." if source and source.unopened else ""
        raise InputError(f"{args.source}: nothing of {dataset} in it. Expected {steps.download}.{unopened}")
    for part in ("train", "test"):
        if part not in parts and "all" not in parts and dataset != "easyVQA":
            print(f"  no {part} part in the source: its files are not written.")
    samples = {}
    for part, items in parts.items():
        samples[part] = samples_of(dataset, part, items, data, f"{args.source or 'easy-vqa'}, {part} part")
        no_twice(samples[part], f"{args.source}, {part} part")

    files, counts = steps.files(parts, args.seed), {}
    for name, content in files.items():
        items = split_of(dataset, part_of(dataset, name)).records(content) if not is_train_json(name) else content
        of_file = samples_of(dataset, part_of(dataset, name), list(items), data, name)
        counts[name] = count(of_file)
        if is_train_json(name):
            files[name] = as_train_json(of_file, args.preset)
    write_files({data / steps.folder / name: content for name, content in files.items()}, args.overwrite)
    lost = place_pictures(source, dataset, samples, data) if source and dataset != "easyVQA" else 0
    official = samples.get("train", samples.get("all"))
    report(dataset, count(official) if official else None, counts)
    if lost:
        unopened = f" Archives that were not opened: {', '.join(map(str, source.unopened))}." if source.unopened else ""
        sys.exit(f"\n{lost:,} pictures are not below {args.source}.{unopened} Add them and call again.")
    print(f"\nNext: python data/prepare.py check {dataset}")


def check(args) -> None:
    """Print what is right and wrong with a data set; exit with 1 where a run would lose samples."""
    dataset, lost, missing = args.dataset, 0, []
    if dataset == "images":
        groups = {"images": load_samples("images", "train", None, args.image_root, pictures=False)}
    else:
        groups = {}
        for split in (args.split,) if args.split else ("train", "test"):
            where = getattr(DATASETS[dataset], split)
            file = Path(args.annotations or args.data / where.annotations)
            if file.exists():
                root = args.image_root or args.data / where.images
                groups[file] = load_samples(dataset, split, file, root, args.path_map, pictures=False)
            else:
                missing.append(file)
        folder = args.data / PREPARATIONS[dataset].folder
        for file in sorted(folder.glob("*.json")) if not args.annotations else ():
            if is_train_json(file.name):
                found = records.read_records(file, "train")
                paths = locate([r["image"] for r in found], args.path_map, args.image_root)
                groups[file] = [Sample(r["id"], path) for r, path in zip(found, paths, strict=True)]
    for file, samples in groups.items():
        found = checking.check(samples[: args.limit], args.workers, args.min_pixels, args.max_pixels)
        print("\n".join([f"{file}:", *found.lines()]))
        lost += found.lost
    for file in missing:
        print(f"{file}: no such file.")
    if lost or missing:
        sys.exit(f"{lost} samples would be lost and {len(missing)} files are missing; mend what is listed above.")
    print("All is well.")


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=(*PREPARATIONS, "check"), help="a data set to prepare, or check")
    p.add_argument("dataset", nargs="?", choices=DATASETS, help="what to check")
    p.add_argument("--data", type=Path, default=DATA, help="the data folder (default: $MPA_DATA, or data/)")
    p.add_argument("--source", type=Path, metavar="DIR", help="the download, or a zip archive of it")
    p.add_argument("--source-format", choices=("official", "hf"), default="official", help="(default: official)")
    p.add_argument("--seed", type=int, default=0, help="of the splits (default: 0)")
    p.add_argument(
        "--preset",
        choices=cli.PRESETS,
        default="paper",
        help="prompt in the train JSON (default: paper; released: bare)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that are there already and differ")
    c = p.add_argument_group("check")
    c.add_argument("--split", choices=("train", "test"), help="check this one only (default: both)")
    c.add_argument("--annotations", metavar="FILE", help="of --split (default: the data set's)")
    c.add_argument("--image-root", metavar="DIR", help="folder of the pictures of --split (default: the data set's)")
    c.add_argument(
        "--path-map", type=cli.path_map, action="append", default=[], metavar="OLD=NEW", help="moved pictures"
    )
    c.add_argument("--limit", type=cli.number(1), metavar="N", help="only the first N samples of each file")
    c.add_argument("--workers", type=cli.number(1), default=os.cpu_count(), help="processes (default: a core each)")
    c.add_argument("--min-pixels", type=cli.number(1), default=cli.MIN_PIXELS, help="to count visual tokens with")
    c.add_argument("--max-pixels", type=cli.number(1), default=cli.MAX_PIXELS, help="to count visual tokens with")
    args = p.parse_args(argv)
    if (args.what == "check") != bool(args.dataset):
        p.error("check takes the name of a data set, and nothing else does")
    if (args.annotations or args.image_root) and not args.split and args.dataset != "images":
        p.error("--annotations and --image-root are of one --split")
    args.command, args.dataset, args.path_map = args.what, args.dataset or args.what, dict(args.path_map)
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    check(args) if args.command == "check" else prepare(args)


if __name__ == "__main__":
    cli.run(main, remedy="Choose another --data folder.")
