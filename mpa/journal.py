"""Crash-safe progress of a stage: one line per finished reply, appended and flushed.

A stage that was killed, however hard, reads its journal and goes on where it stopped. The first line
holds the settings that decide the outcome; a journal of other settings is refused.
"""

import fcntl
import json
import os
import sqlite3
from itertools import accumulate
from pathlib import Path

from mpa.records import InputError, meta_path, read_json


def differences(old: dict, new: dict) -> str:
    """The settings that differ, as people read them: "limit was 10, is now 20"."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in keys)


def finished(result: Path, settings: dict, restart: bool) -> bool:
    """Is `result` there already, made with these settings? Raises InputError if made with others."""
    if restart or not result.exists():
        return False
    old = read_json(meta_path(result)).get("settings", {}) if meta_path(result).exists() else {}
    if old != settings:
        raise InputError(
            f"{result}: was made with other settings: {differences(old, settings)}. "
            "Keep it by choosing another --run or --out, or make it anew with --restart."
        )
    return True


def _text(key: str) -> bytes:
    """A key as SQLite takes it: a file name in it may be no Unicode."""
    return key.encode("utf-8", "surrogatepass")


class Journal:
    """Replies by key, kept on disk beside the result they belong to: `journal[key]`, `key in journal`.

    In memory there is only SQLite's cache of where each reply lies in the file. Raises InputError when the
    journal was begun with other settings, or another process is writing it.
    """

    def __init__(self, result: Path, settings: dict, restart: bool = False):
        self.path = Path(result).with_suffix(".journal.jsonl")
        self._places = sqlite3.connect("")  # a database of this process alone, on disk where it is large
        self._places.execute("CREATE TABLE places (key BLOB PRIMARY KEY, start INTEGER) WITHOUT ROWID")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when we die
        except OSError:
            self._file.close()
            raise InputError(f"{self.path}: another process is writing it; wait for it or stop it.") from None
        if restart:  # from here on there is nothing to fall back on, so that a kill cannot bring the old result back
            for old in (result, meta_path(result)):
                Path(old).unlink(missing_ok=True)
            self._file.truncate(0)
        self._lines = open(self.path, "rb")  # noqa: SIM115
        self._read(settings)

    def _read(self, settings: dict) -> None:
        whole = 0  # bytes up to the end of the last whole line
        for line in self._lines:
            if not line.endswith(b"\n"):
                break  # torn by a kill; the reply will be made again
            entry = json.loads(line)
            if whole == 0 and entry["settings"] != settings:
                self.close()
                raise InputError(
                    f"{self.path}: an unfinished run with other settings: {differences(entry['settings'], settings)}. "
                    "Go on with those, or begin anew with --restart."
                )
            if whole:
                self._keep([(entry["key"], whole)])
            whole += len(line)
        self._file.truncate(whole)
        if not whole:
            self._write([{"settings": settings}])

    def _keep(self, places: list[tuple[str, int]]) -> None:
        self._places.executemany("INSERT OR IGNORE INTO places VALUES (?, ?)", ((_text(key), at) for key, at in places))

    def _place(self, key: str) -> int | None:
        found = self._places.execute("SELECT start FROM places WHERE key = ?", (_text(key),)).fetchone()
        return found and found[0]

    def _write(self, entries: list[dict]) -> list[int]:
        """Append a line for each entry, all or none; where each begins."""
        lines = [(json.dumps(entry) + "\n").encode() for entry in entries]
        start = os.fstat(self._file.fileno()).st_size
        left = b"".join(lines)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:  # a full disk: leave no half line behind
            self._file.truncate(start)
            raise
        return [start + at for at in accumulate(map(len, lines[:-1]), initial=0)] if lines else []

    def append(self, replies: list[dict]) -> None:
        """Keep finished replies: dicts with a "key". A key that is there already stays as it was."""
        new = {}
        for reply in replies:
            if reply["key"] not in self:
                new.setdefault(reply["key"], reply)
        self._keep(list(zip(new, self._write(list(new.values())), strict=True)))

    def __contains__(self, key: str) -> bool:
        return self._place(key) is not None

    def __getitem__(self, key: str) -> dict:
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        self._lines.seek(place)
        return json.loads(self._lines.readline())

    def __len__(self) -> int:
        return self._places.execute("SELECT count(*) FROM places").fetchone()[0]

    def close(self, remove: bool = False) -> None:
        """Let go of the file; `remove` it once the result is written."""
        if remove:
            self.path.unlink(missing_ok=True)
        for held in (self._file, self._lines, self._places):
            held.close()
