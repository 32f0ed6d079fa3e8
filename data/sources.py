"""Read a data set's download, official or a Hugging Face copy, into records of the released shape.

Both ways give {"train" | "val" | "test" | "all": records}; what the download lacks is left out. "all" is ST-VQA's train
part, whose split is ours.
"""

import hashlib
import json
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mpa.records import InputError


@dataclass(frozen=True)
class Member:
    """A file below the source, or one in an archive there (`archive` is its path)."""

    name: str
    archive: Path | None = None

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}" if self.archive else self.name


class Source:
    """The files below a folder, those inside its zip archives too, found by the end of their path."""

    def __init__(self, root: Path):
        if not root.exists():
            raise InputError(f"{root}: no such folder. Name that of the download with --source.")
        self.root, self.by_name, self.unopened = root, {}, []
        for path in sorted(_files(root)):
            self.by_name.setdefault(path.name, []).append(Member(str(path)))
            if path.suffix.lower() == ".zip":
                self._read_archive(path)
            elif {".tar", ".tgz", ".gz", ".7z", ".rar"} & {s.lower() for s in path.suffixes[-2:]}:
                self.unopened.append(path)

    def _read_archive(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError) as error:
            print(f"warning: {path}: no whole zip archive ({error}); passed over.", file=sys.stderr)
            self.unopened.append(path)
            return
        for name in names:
            self.by_name.setdefault(PurePosixPath(name).name, []).append(Member(name, path))

    def find(self, ending: str) -> Member | None:
        """The file whose path ends so, a plain one rather than one in an archive."""
        found = [m for m in self.by_name.get(PurePosixPath(ending).name, ()) if f"/{m.name}".endswith(f"/{ending}")]
        return min(found, key=lambda m: m.archive is not None, default=None)

    def json(self, ending: str, *fields: str):
        """What the JSON file whose path ends so holds, below `fields`; None where there is no such file."""
        member = self.find(ending)
        if member is None:
            return None
        try:
            if member.archive:
                with zipfile.ZipFile(member.archive) as archive:
                    content = archive.read(member.name)
            else:
                content = Path(member.name).read_bytes()
            document = json.loads(content.decode("utf-8-sig"))
        except (ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"{member}: cannot be read as JSON ({error}). Download it again.") from None
        for field in fields:
            if not isinstance(document, dict) or field not in document:
                raise InputError(f"{member}: no field {field!r} in it; is it the official file?")
            document = document[field]
        if not isinstance(document, list) or not all(isinstance(record, dict) for record in document):
            raise InputError(f"{member}: expected a list of records; is it the official file?")
        return document


def _files(root: Path) -> Iterator[Path]:
    """All files below a folder, links to folders followed once; or the one file that `root` is."""
    if root.is_file():
        yield root
        return
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [
            f for f in folders if (real := os.path.realpath(Path(folder, f))) not in seen and not seen.add(real)
        ]
        yield from (Path(folder, name) for name in files)


# --- official downloads


def textvqa(source: Source) -> dict[str, list[dict]]:
    found = {"train": source.json("TextVQA_0.5.1_train.json", "data")}
    return found | {"test": source.json("TextVQA_0.5.1_val.json", "data")}


def stvqa(source: Source) -> dict[str, list[dict]]:
    found = source.json("train_task_1.json", "data")
    return {"all": found and [{"file_path": f"{r.get('dataset')}/{r.get('file_name')}", **r} for r in found]}


def chartqa(source: Source) -> dict[str, list[dict]]:
    """The augmented questions of a part and then the human ones, as in the released files."""
    found = {}
    for part in ("train", "val", "test"):
        names = {kind: f"{part}/{part}_{kind}.json" for kind in ("augmented", "human")}
        by_kind = _both_or_none(source, {name: source.json(name) for name in names.values()})
        records = [{**r, "type": kind} for kind, name in names.items() for r in by_kind.get(name, ())]
        found[part] = [{**r, "question_id": i} for i, r in enumerate(records)]
    return found


def okvqa(source: Source) -> dict[str, list[dict]]:
    found = {}
    for part, name in (("train", "train2014"), ("test", "val2014")):
        asked, answered = f"OpenEnded_mscoco_{name}_questions.json", f"mscoco_{name}_annotations.json"
        both = {asked: source.json(asked, "questions"), answered: source.json(answered, "annotations")}
        if both := _both_or_none(source, both):
            answers = {a.get("question_id"): a.get("answers") for a in both[answered]}
            found[part] = [_okvqa_record(source, q, answers.get(q.get("question_id"))) for q in both[asked]]
    return found


def _okvqa_record(source: Source, question: dict, answers) -> dict:
    """`answers` are stemmed in the official file, too, and so in the released ones; `raw_answers` are not."""
    try:
        record = {name: question[name] for name in ("image_id", "question", "question_id")}
        return record | {"answers": [a["answer"] for a in answers], "raw_answers": [a["raw_answer"] for a in answers]}
    except (KeyError, TypeError) as error:
        which = question.get("question_id")
        raise InputError(
            f"{source.root}: OK-VQA question {which}: no annotation with answers and raw answers for it ({error})."
        ) from None


def _both_or_none(source: Source, found: dict[str, list | None]) -> dict[str, list]:
    missing = [name for name, content in found.items() if content is None]
    if 0 < len(missing) < len(found):
        raise InputError(
            f"{source.root}: {missing[0]} is not in it, but {next(n for n in found if n not in missing)} is."
        )
    return {} if missing else found


# --- copies of Hugging Face data sets

SPLITS = {"train": "train", "validation": "val", "val": "val", "val2014": "test", "test": "test"}


def hf_rows(source: Path) -> Iterator[tuple[str, str, dict, bytes]]:
    """(where, part, row without its picture, the picture's bytes) of all parquet files below `source`."""
    import pyarrow.parquet

    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise InputError(f"{source}: no parquet files in it; --source-format hf reads a copy with data/*.parquet.")
    for path in files:
        # data/train-00000-of-00001.parquet, or default/train/0000.parquet
        named = [SPLITS.get(word) for word in (path.name.split("-")[0].split(".")[0], path.parent.name)]
        part = next(filter(None, named), None)
        if part is None:
            raise InputError(f"{path}: neither it nor its folder is named after a split ({', '.join(SPLITS)}).")
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: no whole parquet file ({error}). Download it again.") from None
        number = 0
        for batch in file.iter_batches(batch_size=32):
            for row in batch.to_pylist():
                image = row.pop("image", None)
                picture = image.get("bytes") if isinstance(image, dict) else image
                where = f"{path}, row {number}"
                if not isinstance(picture, bytes):
                    raise InputError(f"{where}: no picture in it; columns: {', '.join(row)}.")
                yield where, part, row, picture
                number += 1


def hf_record(dataset: str, index: int, row: dict, picture: bytes) -> dict | None:
    """A row as a record in the released shape, None where it has no answers; copies name their columns as they like.

    A picture without a name gets one from its content.
    """
    question = row["question"] if "question" in row else row["query"]
    answers = next((row[name] for name in ("answers", "answer", "label") if row.get(name)), None)
    if answers is None:
        return None
    answers = [answers] if isinstance(answers, str) else answers
    more = {}
    if all(isinstance(a, dict) for a in answers):  # as the official OK-VQA has them
        more = {"raw_answers": [a["raw_answer"] for a in answers]} if "raw_answer" in answers[0] else {}
        answers = [a["answer"] for a in answers]
    by_content = hashlib.sha256(picture).hexdigest()[:16] + ".png"
    question_id = row.get("question_id", index)
    if dataset == "textVQA":
        return {"question_id": question_id, "image_id": row["image_id"], "question": question, "answers": answers}
    if dataset == "stVQA":
        name = row.get("file_path") or row.get("path") or by_content
        return {"question_id": question_id, "file_path": name, "question": question, "answers": answers}
    if dataset == "chartVQA":
        name = row.get("imgname") or by_content
        kind = row.get("type", {0: "human", 1: "augmented"}.get(row.get("human_or_machine"), ""))
        kind = kind.removesuffix("_test")
        return {"question_id": index, "imgname": name, "query": question, "label": answers[0], "type": kind}
    question_id = int(row["question_id"])  # COCO's question ids are image ids with one more digit
    image_id = row.get("image_id", question_id // 10)
    return {"image_id": image_id, "question": question, "question_id": question_id, "answers": answers, **more}


def from_hf(source: Path, dataset: str, keep_picture) -> dict[str, list[dict]]:
    """The records of a copy; `keep_picture(where, part, record, picture)` is called for each."""
    found, without_answers = {}, Counter()
    for index, (where, part, row, picture) in enumerate(hf_rows(source)):
        if dataset == "stVQA":
            part = "all"
        elif dataset in ("textVQA", "okVQA") and part == "val":
            part = "test"  # which serves as the test part; the official test part of TextVQA has no answers
        try:
            record = hf_record(dataset, index, row, picture)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: no {error} for {dataset}; columns: {', '.join(row)}.") from None
        if record is None:
            without_answers[part] += 1
            continue
        keep_picture(where, part, record, picture)
        found.setdefault(part, []).append(record)
    for part, n in without_answers.items():
        print(f"  {n} questions of the {part} part have no answers, and are passed over.")
    return found
