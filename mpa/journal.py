"""Crash-safe progress of a stage: one line per finished reply, appended and flushed.

A stage that was killed, however hard, reads its journal and goes on where it stopped. The first line
holds the settings that decide the outcome; a journal of other settings is refused.
"""

import fcntl
import glob
import json
import os
import sqlite3
import sys
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from mpa import distributed
from mpa.records import InputError, meta_path, read_json


def differences(old: dict, new: dict) -> str:
    """The settings that differ, as people read them: "limit was 10, is now 20"."""
    if not isinstance(old, dict):
        return "they cannot be read"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in keys)


def finished(result: Path, settings: dict, restart: bool) -> bool:
    """Is `result` there already, whole and made with these settings? Raises InputError if made with others.

    One with replies that failed for what may pass, or with nothing in it, is not whole: its journal goes on.
    """
    if restart or not result.exists():
        return False
    meta = read_json(meta_path(result)) if meta_path(result).exists() else {}
    if not isinstance(meta, dict):
        raise InputError(f"{meta_path(result)}: no meta file of a result. Make the result anew with --restart.")
    old = meta.get("settings", {})
    if old != settings:
        raise InputError(
            f"{result}: was made with other settings: {differences(old, settings)}. "
            "Keep it by choosing another --run or --out, or make it anew with --restart."
        )
    return not meta.get("unfinished")


def passing(reply: dict) -> bool:
    """Whether this is an error that may pass: a new call asks again."""
    return "error" in reply and not reply.get("permanent", False)


def follow_up_key(key: str) -> str:
    """Under which the journal keeps a follow-up that was asked in a later call than the reply that it follows."""
    return f"{key}#follow_up"


def _text(key: str) -> bytes:
    """A key as SQLite takes it: a file name in it may be no Unicode."""
    return key.encode("utf-8", "surrogatepass")


class Journal:
    """Replies by key, kept on disk beside the result they belong to: `journal[key]`, `key in journal`.

    In memory there is only SQLite's cache of where each reply lies. Of several processes (`mpa.distributed`) each
    writes a file of its own and reads all. An error that may pass counts in this call alone: the next one asks again.
    Raises InputError when a journal was begun with other settings, is damaged, or another process is writing it.
    """

    def __init__(self, result: Path, settings: dict, restart: bool = False):
        self.result, self.settings = Path(result), settings
        self.path = self.result.with_suffix(
            f".journal-{distributed.RANK}.jsonl" if distributed.RANK else ".journal.jsonl"
        )
        self._places = sqlite3.connect("")  # a database of this process alone, on disk where it is large
        self._places.execute("CREATE TABLE places (key BLOB PRIMARY KEY, file INTEGER, start INTEGER) WITHOUT ROWID")
        self._files: list[BinaryIO] = []  # to read from
        if restart and not distributed.FIRST:
            distributed.wait()  # until the first has cleared the place
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when we die
        except BlockingIOError:
            self._file.close()
            raise InputError(f"{self.path}: another process is writing it; wait for it or stop it.") from None
        except OSError as error:
            print(
                f"warning: {self.path}: cannot be locked on this file system ({error.strerror}). Make sure that no other "
                "process writes to this run.",
                file=sys.stderr,
            )
        if restart:  # from here on there is nothing to fall back on, so that a kill cannot bring the old result back
            for old in (self.result, meta_path(result), *self._others()) if distributed.FIRST else ():
                old.unlink(missing_ok=True)
            self._file.truncate(0)
            if distributed.FIRST:
                distributed.wait()
        whole = self._read(self.path, earlier=True)
        self._file.truncate(whole)  # a torn line; its reply will be made again
        if not whole:
            self._write([{"settings": settings}])
        self.read_others(earlier=True)

    def _others(self) -> list[Path]:
        """The files of the other processes, or those of a run that had more."""
        return sorted(set(self.path.parent.glob(f"{glob.escape(self.result.stem)}.journal*.jsonl")) - {self.path})

    def read_others(self, earlier: bool = False) -> None:
        """Take in what the other processes have finished by now; of an `earlier` call not what failed and may pass."""
        for file in self._files[1:]:
            file.close()
        del self._files[1:]
        for path in self._others():
            self._read(path, earlier)

    def _read(self, path: Path, earlier: bool) -> int:
        """Keep where the replies in a file are; the bytes up to the end of its last whole line."""
        self._files.append(open(path, "rb"))  # noqa: SIM115
        whole, number, places, failed = 0, len(self._files) - 1, [], []
        for index, line in enumerate(self._files[-1]):
            if not line.endswith(b"\n"):
                break  # torn by a kill
            try:
                entry = json.loads(line)
                settings = entry["settings"] if whole == 0 else None
                if whole and not (isinstance(entry["key"], str) and isinstance(entry.get("text", ""), str)):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                self.close()
                raise InputError(
                    f"{path}, line {index + 1}: no line of a journal: {line[:60]!r}. Take this line out to keep the replies in "
                    "the others, or begin anew with --restart."
                ) from None
            if whole == 0 and settings != self.settings:
                self.close()
                raise InputError(
                    f"{path}: an unfinished run with other settings: {differences(settings, self.settings)}. "
                    "Go on with those, or begin anew with --restart."
                )
            if whole:
                (failed if passing(entry) else places).append((entry["key"], whole))
            whole += len(line)
        self._keep(places, number)
        if not earlier:
            self._keep(failed, number)
        return whole

    def _keep(self, places: Iterable[tuple[str, int]], file: int = 0) -> None:
        rows = ((_text(key), file, at) for key, at in places)
        self._places.executemany("INSERT OR IGNORE INTO places VALUES (?, ?, ?)", rows)

    def _place(self, key: str) -> tuple[int, int] | None:
        return self._places.execute("SELECT file, start FROM places WHERE key = ?", (_text(key),)).fetchone()

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
        self._keep(zip(new, self._write(list(new.values())), strict=True))

    def __contains__(self, key: str) -> bool:
        return self._place(key) is not None

    def __getitem__(self, key: str) -> dict:
        reply = self._entry(key)
        if passing(reply.get("follow_up") or {}) and follow_up_key(key) in self:
            reply["follow_up"] = {**self._entry(follow_up_key(key)), "key": key}
        return reply

    def _entry(self, key: str) -> dict:
        place = self._place(key)
        if place is None:
            raise KeyError(key)
        file, start = place
        self._files[file].seek(start)
        return json.loads(self._files[file].readline())

    def __len__(self) -> int:
        return self._places.execute("SELECT count(*) FROM places").fetchone()[0]

    def close(self, remove: bool = False) -> None:
        """Let go of the files; `remove` them once the result is written."""
        for path in (self.path, *self._others()) if remove else ():
            path.unlink(missing_ok=True)
        for held in (self._file, *self._files, self._places):
            held.close()
