"""Human ratings of pseudo labels: which samples are rated, and the file that keeps every click.

The file (`mpa.runs.layout`) is in the run folder. It has one line for each click; the last one of a rater about an item
and an aspect counts, and null takes it back:

    {"rater": "Ada", "question_id": "17", "set": "before", "aspect": "correct", "value": true, "time": "2026-…"}

`set` is "after" for a sample of D_PI, and "before" for one of D_PA that PI did not keep. Raters do not see it. The meta file has
the settings of the selection and the sizes of both sets.
"""

import errno
import fcntl
import json
import os
import random
import threading
from collections import defaultdict
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from mpa.data.paths import locate
from mpa.files import disk_errors, records
from mpa.files.records import InputError
from mpa.runs.layout import Cell

ASPECTS = ("answerable", "correct", "human")
SETS = ("before", "after")


@dataclass(frozen=True)
class Item:
    """A sample to rate."""

    question_id: str
    image: str
    question: str
    answer: str
    set: str


def pools(
    pa_json: Path, train_json: Path, held_out: set[str], path_map: dict, image_root: str | None
) -> dict[str, list]:
    """{set: items}: D_PA without what PI kept, and D_PI; without held-out images, by the path that PI had.

    Questions and answers are those of the PA file in both sets, so that nothing in their form tells the sets apart.
    """
    annotations = [
        r
        for r in records.read_records(pa_json, "PA")
        if r["predicted_question"] and r["predicted_answer"] and not r.get("left_out")
    ]
    kept = {str(r["id"]): r["image"] for r in records.read_parity(train_json)}
    missing = kept.keys() - {str(r["question_id"]) for r in annotations}
    if missing:
        raise InputError(
            f"{train_json}: sample {min(missing)!r} is not in {pa_json}. Name the PA file of this parity set with --pa-json."
        )
    paths = locate([kept.get(str(r["question_id"]), r["image_path"]) for r in annotations], path_map, image_root)
    found = {name: [] for name in SETS}
    for r, path in zip(annotations, paths, strict=True):
        key = str(r["question_id"])
        if r["image_path"] in held_out:
            continue
        name = "after" if key in kept else "before"
        found[name].append(Item(key, path, r["predicted_question"], r["predicted_answer"], name))
    return found


def select(by_set: dict[str, list[Item]], samples: int, seed: int) -> list[Item]:
    """`samples` random items of each set, shuffled together. All raters see this order, so that those who stop early
    have rated the same items.
    """
    rng, chosen = random.Random(seed), []
    for items in by_set.values():
        chosen += rng.sample(items, min(samples, len(items)))
    rng.shuffle(chosen)
    return chosen


class Ratings:
    """The ratings of some items in their file. Every click is on the disk when `add` returns."""

    def __init__(
        self, file: Path, cell: Cell, items: list[Item], by_set: dict[str, list[Item]], samples: int, seed: int
    ):
        self.file, self.items, self.lock = file, items, threading.Lock()
        settings = {"samples": samples, "seed": seed}
        settings["content"] = records.digest(json.dumps([asdict(item) | {"image": ""} for item in items]))
        meta = {"settings": settings, **cell._asdict(), "sizes": {name: len(pool) for name, pool in by_set.items()}}
        self._check(settings)
        self.handle = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.handle)
            raise InputError(f"{file}: another rate.py serves these ratings; open its address, or stop it.") from None
        records.write_json(records.meta_path(file), meta | {"made_by": records.made_by()})
        self._drop_cut_line()
        self.values = latest(file)

    def _check(self, settings: dict) -> None:
        """Raise InputError if the file was begun with other settings."""
        meta_file = records.meta_path(self.file)
        if not (self.file.exists() and self.file.stat().st_size):
            return
        before = read_meta(self.file)["settings"] if meta_file.exists() else {}
        if differing := [name for name, value in settings.items() if before.get(name) != value]:
            raise InputError(
                f"{self.file}: was begun with another {', '.join(differing)}. Give the same settings, or move it away with its "
                "meta file."
            )

    def _drop_cut_line(self) -> None:
        """Remove a last line without an end: its click was never confirmed."""
        content = self.file.read_bytes()
        os.ftruncate(self.handle, content.rfind(b"\n") + 1)

    def add(self, rater: str, position: int, aspect: str, value: bool | None) -> None:
        """Append a click and write it to the disk. Raises OSError, and keeps nothing of it, if the disk is full."""
        item = self.items[position]
        line = {"rater": rater, "question_id": item.question_id, "set": item.set, "aspect": aspect, "value": value}
        line["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        content = (json.dumps(line) + "\n").encode()
        with self.lock, disk_errors.named(self.file):
            end = os.fstat(self.handle).st_size
            try:
                if os.write(self.handle, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self.handle)
            except OSError:
                os.ftruncate(self.handle, end)
                raise
            self.values[rater, item.question_id, item.set][aspect] = value

    def of(self, rater: str, position: int) -> dict[str, bool]:
        """A rater's values for an item by aspect."""
        item = self.items[position]
        found = self.values.get((rater, item.question_id, item.set), {})
        return {aspect: value for aspect, value in found.items() if value is not None}

    def unrated(self, rater: str) -> list[int]:
        """Positions of the items that a rater has not rated in all aspects."""
        return [position for position in range(len(self.items)) if len(self.of(rater, position)) < len(ASPECTS)]

    def close(self) -> None:
        os.close(self.handle)


def read_meta(file: Path) -> dict:
    """The meta file of a ratings file. Raises InputError if it is not one."""
    meta_file = records.meta_path(file)
    meta = records.read_json(meta_file)
    sizes = meta.get("sizes") if isinstance(meta, dict) else None
    names = all(isinstance(meta.get(name), str) for name in Cell._fields) if isinstance(sizes, dict) else False
    if not names or not isinstance(meta.get("settings"), dict) or not all(isinstance(sizes.get(s), int) for s in SETS):
        raise InputError(f"{meta_file}: not the meta file of ratings; move it away with {file.name}, and rate again.")
    return meta


def latest(file: Path) -> dict[tuple[str, str, str], dict[str, bool | None]]:
    """{(rater, question id, set): {aspect: the last value}}. Raises InputError for a line that is no click."""
    found = defaultdict(dict)
    if not file.stat().st_size:
        return found
    for number, line in enumerate(records.read_json(file), 1):
        texts = isinstance(line, dict) and all(isinstance(line.get(name), str) for name in ("rater", "question_id"))
        known = texts and line.get("set") in SETS and line.get("aspect") in ASPECTS
        if not known or not isinstance(line.get("value", 0), bool | None):
            raise InputError(f"{file}, line {number}: not a rating; remove the line.")
        found[line["rater"], line["question_id"], line["set"]][line["aspect"]] = line["value"]
    return found
