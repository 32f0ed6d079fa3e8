"""Bring a data set's official download into the files that the stages read, and say what is missing or broken.

    python data/prepare.py textVQA --source ~/Downloads/TextVQA       # stVQA, chartVQA, okVQA, easyVQA
    python data/prepare.py okVQA --source ~/hf/OK-VQA --source-format hf
    python data/prepare.py check textVQA                              # open every picture once
    python data/prepare.py check images --image-root ~/Pictures

Reads  the download as it is, zipped or not, anywhere below --source (data/README.md says what to download),
       or a copy of a Hugging Face data set: parquet files with the pictures inside.
Writes the annotation files of the released MPA code under data/<Name>/. Pictures in plain folders are linked,
       those in archives unpacked. What is there already stays; a file that would change is refused.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from mpa import checking, cli, records
from mpa.datasets import DATA, DATASETS, inside, load_samples, one_per_image
from mpa.metrics import most_common
from mpa.prompts import train_prompt
from mpa.records import InputError


@dataclass(frozen=True)
class Member:
    """A file below the source, or one in an archive there (`archive` is its path)."""

    name: str
    archive: Path | None = None

    def open(self):
        return zipfile.ZipFile(self.archive).open(self.name) if self.archive else open(self.name, "rb")


class Source:
    """The files below a folder, those inside its zip archives too, found by the end of their path."""

    def __init__(self, root: Path):
        if not root.exists():
            raise InputError(f"{root}: no such folder. Name that of the download with --source.")
        self.root, self.by_name = root, {}
        for folder, folders, files in [(root.parent, [], [root.name])] if root.is_file() else os.walk(root):
            folders.sort()
            for name in sorted(files):
                path = Path(folder, name)
                self.by_name.setdefault(name, []).append(Member(str(path)))
                if path.suffix == ".zip":
                    self._read_archive(path)

    def _read_archive(self, path: Path) -> None:
        try:
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{path}: no whole zip archive ({error}). Download it again.") from None
        for name in names:
            self.by_name.setdefault(PurePosixPath(name).name, []).append(Member(name, path))

    def find(self, ending: str) -> Member | None:
        """The file whose path ends so, a plain one rather than one in an archive."""
        found = [m for m in self.by_name.get(PurePosixPath(ending).name, ()) if f"/{m.name}".endswith(f"/{ending}")]
        return min(found, key=lambda m: m.archive is not None, default=None)

    def json(self, ending: str):
        """What the JSON file whose path ends so holds, or None where there is none."""
        member = self.find(ending)
        if member is None:
            return None
        try:
            with member.open() as file:
                return json.loads(file.read().decode("utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{member.archive or ''} {member.name}: not JSON ({error}). Download it again.") from None


# --- official downloads: {"train", "val", "test"} to records in the released shape; what is not there is left out


def official_textvqa(source: Source) -> dict[str, list[dict]]:
    found = {"train": source.json("TextVQA_0.5.1_train.json"), "test": source.json("TextVQA_0.5.1_val.json")}
    return {part: document["data"] for part, document in found.items() if document}


def official_stvqa(source: Source) -> dict[str, list[dict]]:
    document = source.json("train_task_1.json")
    if not document:
        return {}
    return {"all": [{"file_path": f"{r.get('dataset')}/{r.get('file_name')}", **r} for r in document["data"]]}


def official_chartqa(source: Source) -> dict[str, list[dict]]:
    found = {}
    for part in ("train", "val", "test"):
        by_kind = {kind: source.json(f"{part}/{part}_{kind}.json") for kind in ("augmented", "human")}
        if all(by_kind.values()):
            found[part] = [{**r, "type": kind} for kind, of_it in by_kind.items() for r in of_it]
            found[part] = [{**r, "question_id": i} for i, r in enumerate(found[part])]
    return found


def official_okvqa(source: Source) -> dict[str, list[dict]]:
    found = {}
    for part, name in (("train", "train2014"), ("test", "val2014")):
        questions = source.json(f"OpenEnded_mscoco_{name}_questions.json")
        annotations = source.json(f"mscoco_{name}_annotations.json")
        if not (questions and annotations):
            continue
        answered = {a["question_id"]: a["answers"] for a in annotations["annotations"]}
        found[part] = []
        for q in questions["questions"]:
            answers = answered[q["question_id"]]
            record = {name: q[name] for name in ("image_id", "question", "question_id")}
            record |= {"answers": [a["answer"] for a in answers], "raw_answers": [a["raw_answer"] for a in answers]}
            found[part].append(record)
    return found


# --- copies of Hugging Face data sets: the same, the pictures written on the way

HF_PARTS = {"train": "train", "validation": "val", "val": "val", "val2014": "test", "test": "test"}


def hf_rows(source: Path, dataset: str, data: Path) -> Iterator[tuple[str, dict, bytes]]:
    """(part, row without its picture, the picture's bytes) of all parquet files below `source`."""
    import pyarrow.parquet

    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{source}: no parquet files in it; --source-format hf reads a copy with data/*.parquet.")
    for path in files:
        part = HF_PARTS.get(path.name.split("-")[0].split(".")[0])
        if part is None:
            raise InputError(f"{path}: its name begins with no split's name ({', '.join(HF_PARTS)}).")
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path}: no whole parquet file ({error}). Download it again.") from None
        for batch in file.iter_batches(batch_size=32):
            for row in batch.to_pylist():
                image = row.pop("image", None)
                yield part, row, image["bytes"] if isinstance(image, dict) else image


def hf_record(dataset: str, part: str, index: int, row: dict, picture: bytes) -> tuple[dict, str]:
    """A row as a record in the released shape, and the picture's name below the image root.

    Copies name their columns as they like; a picture without a name gets one from its content.
    """
    question, answers = row.get("question", row.get("query")), row.get("answers", row.get("answer", row.get("label")))
    if question is None or not answers:
        raise KeyError("question or answers")
    by_content = hashlib.sha256(picture).hexdigest()[:16] + ".png"
    if dataset == "textVQA":
        record = {"question_id": row["question_id"], "image_id": row["image_id"], "question": question}
        return record | {"answers": answers}, f"{row['image_id']}.jpg"
    if dataset == "stVQA":
        name = row.get("file_path") or row.get("path") or by_content
        record = {"question_id": row.get("question_id", index), "file_path": name, "question": question}
        return record | {"answers": [answers] if isinstance(answers, str) else answers}, name
    if dataset == "chartVQA":
        name = row.get("imgname") or by_content
        kind = row.get("type", {0: "human", 1: "augmented"}.get(row.get("human_or_machine"), ""))
        label = answers if isinstance(answers, str) else answers[0]
        record = {"imgname": name, "query": question, "label": label, "type": kind.removesuffix("_test")}
        return record | {"question_id": index}, name
    question_id = int(row["question_id"])  # COCO's question ids are image ids with one more digit
    prefix = "COCO_train2014" if part == "train" else "COCO_val2014"
    record = {"image_id": question_id // 10, "question": question, "question_id": question_id, "answers": answers}
    return record, f"{prefix}_{question_id // 10:012d}.jpg"


def from_hf(source: Path, dataset: str, data: Path) -> dict[str, list[dict]]:
    found = {}
    rows = tqdm(hf_rows(source, dataset, data), desc="reading parquet", unit="question", disable=None)
    for index, (part, row, picture) in enumerate(rows):
        if dataset == "stVQA":
            part = "all"  # the split is ours
        elif dataset == "textVQA" and part == "test":
            continue  # has no answers
        elif dataset == "textVQA" and part == "val":
            part = "test"
        try:
            record, name = hf_record(dataset, part, index, row, picture)
        except (KeyError, TypeError, AttributeError) as error:
            columns = ", ".join(row)
            raise InputError(f"{source}, {part}, row {index}: no {error} for {dataset}; columns: {columns}.") from None
        write_picture(Path(inside(str(data / root_of(dataset, part)), name)), picture)
        found.setdefault(part, []).append(record)
    return found


def write_picture(path: Path, content: bytes) -> None:
    if path.exists() and path.stat().st_size == len(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


# --- what is written, from either source: {file: content}


def split_by_image(items: list, image_of: Callable, share: float, seed: int) -> tuple[list, list]:
    """(first, rest): all questions of an image on one side, `share` of the images on the first; in their order."""
    images = list(dict.fromkeys(map(image_of, items)))
    first = set(random.Random(seed).sample(images, int(share * len(images))))
    return [i for i in items if image_of(i) in first], [i for i in items if image_of(i) not in first]


def files_textvqa(parts: dict, seed: int) -> dict:
    files = {}
    if "train" in parts:
        unique = one_per_image(parts["train"], lambda r: r["image_id"])
        files["TextVQA_0.5.1_unique_train.json"] = {"data": unique}
        train, val = split_by_image(unique, lambda r: r["image_id"], 0.85, seed)
        files |= {"qwenTrainFormat_train.json": train, "qwenTrainFormat_eval.json": val}
    if "test" in parts:
        files["TextVQA_0.5.1_val.json"] = {"data": parts["test"]}
    return files


def files_stvqa(parts: dict, seed: int) -> dict:
    if "all" not in parts:
        return {}
    unique = one_per_image(parts["all"], lambda r: r["file_path"])
    rest, test = split_by_image(unique, lambda r: r["file_path"], 0.85, seed)
    train, val = split_by_image(rest, lambda r: r["file_path"], 0.85, seed)
    name = "train_task_1_onePerImage"
    return {
        f"{name}_train.json": {"data": rest},
        f"{name}_val.json": {"data": test},
        f"QwenTrainFormat_{name}_train.json": train,
        f"QwenTrainFormat_{name}_eval.json": val,
    }


def files_chartqa(parts: dict, seed: int) -> dict:
    files = {}
    for part, released in (("train", "train_onePerImage.json"), ("val", None), ("test", "test_combined.json")):
        if part not in parts:
            continue
        chosen = parts[part] if part == "test" else one_per_image(parts[part], lambda r: r["imgname"])
        numbered = [{**r, "question_id": i} for i, r in enumerate(chosen)]
        if released:
            files[released] = numbered
        if part != "test":  # the official val split serves as eval, as in the released files
            files[f"train_onePerImage_QwenFormat_{'eval' if part == 'val' else part}.json"] = numbered
    return files


def files_okvqa(parts: dict, seed: int) -> dict:
    files = {}
    if "train" in parts:
        by_image = {}
        for r in parts["train"]:
            by_image.setdefault(r["image_id"], []).append({k: v for k, v in r.items() if k != "image_id"})
        files["okvqa_train_unique_combine.json"] = [{"image_id": i, "qas": qas} for i, qas in by_image.items()]
        train, val = split_by_image(parts["train"], lambda r: r["image_id"], 0.85, seed)
        files |= {"okvqa_QwenFormat_train.json": train, "okvqa_QwenFormat_eval.json": val}
    if "test" in parts:
        files["okvqa_val_combine.json"] = parts["test"]
    return files


def files_easyvqa(parts: dict, seed: int) -> dict:
    train, val = split_by_image(parts["train"], lambda r: r[3], 0.85, seed)
    return {"easyvqa_QwenFormat_train.json": train, "easyvqa_QwenFormat_eval.json": val}


def official_easyvqa(source: Source) -> dict[str, list]:
    of_package = records.read_json(DATASETS["easyVQA"].train.annotations)
    return {"train": DATASETS["easyVQA"].train.records(of_package)}


@dataclass(frozen=True)
class Preparation:
    folder: str
    official: Callable
    files: Callable
    download: tuple[str, ...]  # what the official site has, for the message when nothing is found
    # {file: (questions, images)} as paper, README or released files have it
    expected: dict[str, tuple[int, int | None]]


PREPARATIONS = {
    "textVQA": Preparation(
        "TextVQA",
        official_textvqa,
        files_textvqa,
        ("TextVQA_0.5.1_{train,val}.json", "train_val_images.zip"),
        {
            "official train": (34602, 21953),
            "TextVQA_0.5.1_unique_train.json": (21953, 21953),
            "qwenTrainFormat_train.json": (18660, 18660),
            "qwenTrainFormat_eval.json": (3293, 3293),
            "TextVQA_0.5.1_val.json": (5000, 3166),
        },
    ),
    "stVQA": Preparation(
        "STVQA",
        official_stvqa,
        files_stvqa,
        ("train_task_1.json", "the folder of pictures: coco-text/ …"),
        {"official train": (26074, None), "QwenTrainFormat_train_task_1_onePerImage_eval.json": (2413, 2413)},
    ),
    "chartVQA": Preparation(
        "ChartVQA",
        official_chartqa,
        files_chartqa,
        ("train/, val/ and test/, each with *_human.json, *_augmented.json and png/",),
        {
            "official train": (28299, 18317),
            "train_onePerImage.json": (18317, 18317),
            "train_onePerImage_QwenFormat_train.json": (18317, 18317),
            "train_onePerImage_QwenFormat_eval.json": (1056, 1056),
            "test_combined.json": (2500, 1509),
        },
    ),
    "okVQA": Preparation(
        "OKVQA",
        official_okvqa,
        files_okvqa,
        (
            "OpenEnded_mscoco_{train,val}2014_questions.json",
            "mscoco_{train,val}2014_annotations.json",
            "train2014/ and val2014/ of COCO",
        ),
        {
            "official train": (9009, 8998),
            "okvqa_train_unique_combine.json": (9009, 8998),
            "okvqa_QwenFormat_train.json": (7659, 7648),
            "okvqa_QwenFormat_eval.json": (1350, 1350),
            "okvqa_val_combine.json": (5046, 5033),
        },
    ),
    "easyVQA": Preparation(
        "EasyVQA",
        official_easyvqa,
        files_easyvqa,
        (),
        {"easyvqa_QwenFormat_train.json": (3400, 3400), "easyvqa_QwenFormat_eval.json": (600, 600)},
    ),
}


def split_of(dataset: str, part: str):
    return getattr(DATASETS[dataset], "test" if part == "test" else "train")


def root_of(dataset: str, part: str) -> str:
    """The image root of a part, below the data folder. ChartQA's val part is no split of ours."""
    root = split_of(dataset, part).images
    return root.replace("/train/", "/val/") if (dataset, part) == ("chartVQA", "val") else root


def read(dataset: str, part: str, items: list) -> list[tuple]:
    """(id, image below its root, question, answers) of records in the released shape."""
    split = split_of(dataset, part)
    return [tuple(split.read(item))[:4] for item in items]


def as_train_json(dataset: str, part: str, items: list, data: Path, preset: str) -> list[dict]:
    root = os.path.abspath(data / root_of(dataset, part))
    return [
        records.train_record(i, os.path.join(root, image), train_prompt(question, preset), most_common(answers))
        for i, image, question, answers in read(dataset, part, items)
    ]


def part_of(dataset: str, file: str) -> str:
    if file in (Path(DATASETS[dataset].test.annotations).name,):
        return "test"
    return "val" if dataset == "chartVQA" and file.endswith("_eval.json") else "train"


def is_train_json(file: str) -> bool:
    return "format" in file.lower()


def place_pictures(source: Source, dataset: str, parts: dict, data: Path) -> None:
    """Link the image roots to the source's folders; unpack what is in archives."""
    by_root = {}
    for part, items in parts.items():
        of_root = by_root.setdefault(root_of(dataset, part), {})
        of_root.update((image, part) for _, image, _, _ in read(dataset, part, items))
    for root, images in by_root.items():
        target = data / root
        missing = {name: part for name, part in images.items() if not (target / name).exists()}
        members = ((name, find_picture(source, dataset, part, name)) for name, part in missing.items())
        name, member = next(((name, member) for name, member in members if member), (None, None))
        if member and member.archive:
            unpack(source, dataset, missing, target)
        elif member and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.path.abspath(member.name.removesuffix(name)))
        there = sum((target / name).exists() for name in images)
        print(f"  {target}: {there:,} of {len(images):,} pictures")
        if there < len(images):
            print(f"    the others are not below {source.root}, or the folder above lacks them.")


def find_picture(source: Source, dataset: str, part: str, name: str) -> Member | None:
    """A picture in the source; ChartQA's parts have pictures of the same names, so that the folder counts."""
    return source.find(f"{part}/png/{name}" if dataset == "chartVQA" else name)


def unpack(source: Source, dataset: str, images: dict[str, str], target: Path) -> None:
    archives = {}
    try:
        for name, part in tqdm(images.items(), desc=f"unpacking {target.name}", unit="picture", disable=None):
            member = find_picture(source, dataset, part, name)
            if member is None or member.archive is None:
                continue
            if member.archive not in archives:
                archives[member.archive] = zipfile.ZipFile(member.archive)
            try:
                write_picture(Path(inside(str(target), name)), archives[member.archive].read(member.name))
            except zipfile.BadZipFile as error:
                raise InputError(f"{member.archive}: {member.name}: {error}. Download it again.") from None
    finally:
        for archive in archives.values():
            archive.close()


# --- what a person types


def write_files(files: dict[Path, object], overwrite: bool) -> None:
    """Write what is new. A file that would change is refused before any is written."""
    texts = {path: json.dumps(content, indent=4, ensure_ascii=False) + "\n" for path, content in files.items()}
    same = {path: path.exists() and path.read_text(encoding="utf-8") == text for path, text in texts.items()}
    changed = [path for path in texts if path.exists() and not same[path]]
    if changed and not overwrite:
        raise InputError(
            f"{changed[0]}: is there already and differs (of {len(changed)} files). The released code's own files are "
            "best kept; choose another --data folder, or --overwrite."
        )
    for path, text in texts.items():
        if not same[path]:
            records.write_text(path, text)
        print(f"  {path}: {'is there already' if same[path] else 'written'}")


def count(dataset: str, file: str, content) -> tuple[int, int]:
    """(questions, images) of a file's content."""
    if is_train_json(file):
        return len(content), len({r["image"] for r in content})
    part = part_of(dataset, file)
    found = read(dataset, part, list(split_of(dataset, part).records(content)))
    return len(found), len({image for _, image, _, _ in found})


def report(dataset: str, parts: dict, files: dict[str, object]) -> None:
    """What was found beside what the paper, its README and its released files state."""
    expected = PREPARATIONS[dataset].expected
    official = [item for part, items in parts.items() if part in ("train", "all") for item in items]
    part = "train" if official else "test"
    found = {name: count(dataset, name, content) for name, content in files.items()}
    if official and "official train" in expected:
        rows = read(dataset, part, official)
        found = {"official train": (len(rows), len({image for _, image, _, _ in rows})), **found}
    print(f"\n  {'questions / images':<58}{'found':>16}{'released':>16}")
    for name, numbers in found.items():
        there = expected.get(name)
        same = there is None or all(n is None or n == m for n, m in zip(there, numbers, strict=True))
        mark = "" if same else "   differs"
        print(f"  {name:<58}{_pair(numbers):>16}{_pair(there) if there else '–':>16}{mark}")


def _pair(numbers: tuple[int, int | None]) -> str:
    return " / ".join("?" if n is None else f"{n:,}" for n in numbers)


def prepare(args) -> None:
    dataset, steps = args.dataset, PREPARATIONS[args.dataset]
    if dataset != "easyVQA" and not args.source:
        raise InputError(f"--source is needed: the folder with {', '.join(steps.download)}.")
    source = None
    if args.source_format == "hf":
        parts = from_hf(args.source, dataset, args.data)
    else:
        source = Source(args.source) if args.source else None
        parts = steps.official(source)
    if not parts:
        raise InputError(f"{args.source}: nothing of {dataset} in it. Expected {', '.join(steps.download)}.")
    for part in ("train", "test"):
        if part not in parts and "all" not in parts and dataset != "easyVQA":
            print(f"  no {part} part in the source: its files are not written.")
    files = steps.files(parts, args.seed)
    for name, content in files.items():
        if is_train_json(name):
            files[name] = as_train_json(dataset, part_of(dataset, name), content, args.data, args.preset)
    write_files({args.data / steps.folder / name: content for name, content in files.items()}, args.overwrite)
    if source and dataset != "easyVQA":
        place_pictures(source, dataset, parts, args.data)
    report(dataset, parts, files)
    print(f"\nNext: python data/prepare.py check {dataset}")


def check(args) -> int:
    """Print what is right and wrong with a data set; the number of samples that a run would lose."""
    lost = 0
    for split in ("train", "test"):
        if args.dataset == "images" and split == "test":
            continue
        where = getattr(DATASETS[args.dataset], split)
        annotations = getattr(args, f"{split}_annotations")
        if args.dataset != "images" and not Path(annotations or args.data / where.annotations).exists():
            print(f"{args.dataset}, {split}: {annotations or args.data / where.annotations}: no such file.")
            lost += 1
            continue
        root = args.image_root or args.data / where.images
        annotations = annotations or args.data / where.annotations
        samples = load_samples(args.dataset, split, annotations, root, pictures=False)[: args.limit]
        found = checking.check(samples, args.workers, args.min_pixels, args.max_pixels)
        print("\n".join([f"{args.dataset}, {split}:", *found.lines()]))
        lost += found.lost
    return lost


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
    c.add_argument("--image-root", metavar="DIR", help="folder of the pictures (default: the data set's)")
    c.add_argument("--train-annotations", metavar="FILE", help="(default: the data set's)")
    c.add_argument("--test-annotations", metavar="FILE", help="(default: the data set's)")
    c.add_argument("--limit", type=cli.number(1), metavar="N", help="only the first N samples of each part")
    c.add_argument("--workers", type=cli.number(1), default=os.cpu_count(), help="processes (default: a core each)")
    c.add_argument("--min-pixels", type=cli.number(1), default=cli.MIN_PIXELS, help="to count visual tokens with")
    c.add_argument("--max-pixels", type=cli.number(1), default=cli.MAX_PIXELS, help="to count visual tokens with")
    args = p.parse_args(argv)
    if (args.what == "check") != bool(args.dataset):
        p.error("check takes the name of a data set, and nothing else does")
    args.command, args.dataset = args.what, args.dataset or args.what
    return args


def main(argv=None) -> None:
    args = arguments(argv)
    if args.command != "check":
        prepare(args)
        return
    lost = check(args)
    if lost:
        sys.exit(f"{lost} samples would be lost; mend what is listed above, or go on without them.")
    print("All is well.")


if __name__ == "__main__":
    cli.run(main)
