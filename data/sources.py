"""Read a dataset's download, official or a Hugging Face copy, as records in the released format.

Both return the parts that `mpa.data.protocol.Preparation` defines, without those that the download lacks.
"""

import hashlib
import json
import lzma
import os
import stat
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mpa.data import DATASETS
from mpa.data.protocol import CopiedRow
from mpa.files.packages import require
from mpa.files.records import InputError

# What zipfile raises for a member that is corrupt, encrypted, or in an unsupported compression (Deflate64).
UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)
MAX_JSON_BYTES = 2**31  # the largest annotation file of the four datasets has some 10**8 bytes
MAX_RATIO, ALWAYS_FINE = 100, 2**26  # compression ratio (JSON has 10 to 20); no limit below so many unpacked bytes


@dataclass(frozen=True)
class Member:
    """A regular file below the source, or in an archive there (`archive`). `size` is in bytes, unpacked."""

    name: str
    size: int
    archive: Path | None = None
    leads_out: bool = False  # a link to a file that is neither below the source nor in the link's folder

    def __str__(self) -> str:
        return f"{self.archive}: {self.name}" if self.archive else self.name


def check_ratio(archive: Path, unpacked: int, packed: int) -> None:
    """Raise InputError for a zip bomb, which would fill the disk or the memory. Photographs hardly compress."""
    if unpacked > ALWAYS_FINE and unpacked > MAX_RATIO * packed:
        raise InputError(
            f"{archive}: {packed / 1e6:.1f} MB would become {unpacked / 1e6:,.0f} MB when unpacked, so this is not the "
            "dataset. Nothing was unpacked; download it again."
        )


class Source:
    """The regular files below a folder and inside its zip archives, searched by the end of their path.

    `unopened` lists other files and the archives that were not opened.
    """

    def __init__(self, root: Path):
        if not root.exists():
            raise InputError(f"{root}: no such folder. Name the download's folder with --source.")
        self.root, self.by_name, self.unopened = root, {}, []
        real = os.path.realpath(root)
        for path in sorted(self._files()):
            try:
                status = os.stat(path)
            except OSError:
                continue  # a broken link
            if not stat.S_ISREG(status.st_mode):
                self.unopened.append(path)
                continue
            leads_out = path.is_symlink() and not any(
                os.path.realpath(path).startswith(f"{folder.rstrip('/')}/")
                for folder in (real, os.path.realpath(path.parent))
            )
            member = Member(str(path), status.st_size, leads_out=leads_out)
            self.by_name.setdefault(path.name, []).append(member)
            if path.suffix.lower() == ".zip":
                self._read_archive(path)
            elif {".tar", ".tgz", ".gz", ".7z", ".rar"} & {s.lower() for s in path.suffixes[-2:]}:
                self.unopened.append(path)

    def _files(self) -> Iterator[Path]:
        """All files below the root, following each link to a folder once. If the root is a file, that file."""
        if not self.root.is_dir():
            yield self.root
            return

        def closed(error: OSError) -> None:
            print(f"warning: {error.filename}: cannot be read ({error.strerror}); skipped.", file=sys.stderr)
            self.unopened.append(error.filename)

        seen = {os.path.realpath(self.root)}
        for folder, folders, files in os.walk(self.root, onerror=closed, followlinks=True):
            folders[:] = [
                f for f in folders if (real := os.path.realpath(Path(folder, f))) not in seen and not seen.add(real)
            ]
            yield from (Path(folder, name) for name in files)

    def _read_archive(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (*UNREADABLE, OSError, ValueError) as error:
            print(f"warning: {path}: not a complete zip archive ({error}); skipped.", file=sys.stderr)
            self.unopened.append(path)
            return
        for member in members:
            if not member.is_dir():
                found = Member(member.filename, member.file_size, path)
                self.by_name.setdefault(PurePosixPath(member.filename).name, []).append(found)

    def find(self, ending: str) -> Member | None:
        """The file whose path ends with `ending`. Prefers files outside archives, then the shortest path.

        Raises InputError if several such files have different sizes.
        """
        found = [m for m in self.by_name.get(PurePosixPath(ending).name, ()) if f"/{m.name}".endswith(f"/{ending}")]
        found = [m for m in found if not m.archive] or found
        nearest = min((m.name.count("/") for m in found), default=0)
        found = [m for m in found if m.name.count("/") == nearest]
        other = next((m for m in found if m.size != found[0].size), None)
        if other:
            raise InputError(
                f"{found[0]} and {other} are different files with the same name; name the folder of one with --source."
            )
        return found[0] if found else None

    def json(self, ending: str, *fields: str):
        """The records in the JSON file whose path ends with `ending`, below `fields`; None if there is no such file."""
        member = self.find(ending)
        if member is None:
            return None
        if member.size > MAX_JSON_BYTES:
            raise InputError(
                f"{member}: {member.size / 1e9:.1f} GB is too large for an annotation file. Download it again."
            )
        try:
            if member.archive:
                with zipfile.ZipFile(member.archive) as archive:
                    check_ratio(member.archive, member.size, archive.getinfo(member.name).compress_size)
                    content = archive.read(member.name)
            else:
                content = Path(member.name).read_bytes()
            document = json.loads(content.decode("utf-8-sig"))
        except (ValueError, OSError, *UNREADABLE) as error:
            raise InputError(f"{member}: cannot be read as JSON ({error}). Download it again.") from None
        for name in fields:
            if not isinstance(document, dict) or name not in document:
                raise InputError(f"{member}: has no field {name!r}; is it the official file?")
            document = document[name]
        if not isinstance(document, list) or not all(isinstance(record, dict) for record in document):
            raise InputError(f"{member}: expected a list of records; is it the official file?")
        return document

    def all_or_none(self, found: dict[str, list | None]) -> dict[str, list]:
        """`found` if all files exist, {} if none does. Raises InputError if only some do."""
        missing = [name for name, content in found.items() if content is None]
        if 0 < len(missing) < len(found):
            raise InputError(f"{self.root}: has {next(n for n in found if n not in missing)}, but not {missing[0]}.")
        return {} if missing else found


# --- copies of Hugging Face datasets

SPLITS = {"train": "train", "validation": "val", "val": "val", "val2014": "test", "test": "test"}


def hf_rows(source: Path) -> Iterator[tuple[str, str, dict, bytes]]:
    """(where, split, row without its image, image bytes) for each row of the parquet files below `source`."""
    require("--source-format hf", "export", "pyarrow")
    import pyarrow.parquet

    files = [path for path in (sorted(source.rglob("*.parquet")) if source.is_dir() else [source]) if path.is_file()]
    if not files:
        raise InputError(f"{source}: has no parquet files; --source-format hf reads a copy with data/*.parquet.")
    for path in files:
        # data/train-00000-of-00001.parquet, or default/train/0000.parquet
        named = [SPLITS.get(word) for word in (path.name.split("-")[0].split(".")[0], path.parent.name)]
        split = next(filter(None, named), None)
        if split is None:
            raise InputError(f"{path}: neither the file nor its folder has the name of a split ({', '.join(SPLITS)}).")
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
                check_ratio(path, sum(groups), os.path.getsize(path))
                for batch in file.iter_batches(batch_size=4):
                    for row in batch.to_pylist():
                        image = row.pop("image", None)
                        content = image.get("bytes") if isinstance(image, dict) else image
                        where = f"{path}, row {number}"
                        if not isinstance(content, bytes):
                            raise InputError(f"{where}: has no image; columns: {', '.join(row)}.")
                        yield where, split, row, content
                        number += 1
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: not a complete parquet file ({error}). Download it again.") from None


def _answers_of(row: dict) -> list | None:
    """The first answer column with an answer; None if all are empty, as in an unlabelled test split."""
    for name in ("answers", "answer", "label"):
        answers = row.get(name)
        answers = answers if isinstance(answers, list) else [answers]
        texts = [a.get("answer") if isinstance(a, dict) else a for a in answers]
        if any(text is not None and str(text).strip() for text in texts):
            return answers
    return None


def copied_row(index: int, row: dict, image: bytes) -> CopiedRow | None:
    """A row with its common columns parsed; None if it has no answers. Column names differ between copies."""
    question = row["question"] if "question" in row else row["query"]
    answers = _answers_of(row)
    if answers is None:
        return None
    raw_answers = None
    if all(isinstance(a, dict) for a in answers):  # as in the official OK-VQA
        raw_answers = [a["raw_answer"] for a in answers] if "raw_answer" in answers[0] else None
        answers = [a["answer"] for a in answers]
    return CopiedRow(index, row, question, answers, raw_answers, hashlib.sha256(image).hexdigest()[:16] + ".png")


@dataclass
class Copy:
    """The records of a Hugging Face copy by part, with each record's row number and image size in bytes."""

    records: dict[str, list[dict]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)


def from_hf(source: Path, dataset: str) -> Copy:
    """The records of a copy, without images. Questions without answers are skipped and counted."""
    preparation = DATASETS[dataset].preparation
    found, without_answers, splits = Copy(), Counter(), {}
    for index, (where, split, row, image) in enumerate(hf_rows(source)):
        part = preparation.copy_parts.get(split, split)
        try:
            copied = copied_row(index, row, image)
            record = copied and preparation.from_copy(copied)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: no {error} for {dataset}; columns: {', '.join(row)}.") from None
        if record is None:
            without_answers[part] += 1
            continue
        if part == "test" and splits.setdefault(part, split) != split:
            raise InputError(
                f"{source}: has both a test and a validation split with answers; copy only the one to evaluate on."
            )
        found.records.setdefault(part, []).append(record)
        found.rows.setdefault(part, []).append(index)
        found.sizes.setdefault(part, []).append(len(image))
    for part, n in without_answers.items():
        kept = len(found.records.get(part, ()))
        print(f"  {n:,} questions of the {part} part have no answers and are skipped; {kept:,} have answers.")
    return found
