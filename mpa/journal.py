"""Crash-safe progress of a stage: one line per finished reply, appended and flushed.

A stage that was killed, however hard, reads its journal and goes on where it stopped. The first line
holds the settings that decide the outcome; a journal of other settings is refused.
"""

import fcntl
import json
import os
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


class Journal:
    """Replies by key, kept on disk beside the result they belong to.

    Raises InputError when the journal was begun with other settings, or another process is writing it.
    """

    def __init__(self, result: Path, settings: dict, restart: bool = False):
        self.path = Path(result).with_suffix(".journal.jsonl")
        self.replies: dict[str, dict] = {}
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
        self._read(settings)

    def _read(self, settings: dict) -> None:
        whole = 0  # bytes up to the end of the last whole line
        with open(self.path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # torn by a kill; the reply will be made again
                entry = json.loads(line)
                if whole == 0 and entry["settings"] != settings:
                    self._file.close()
                    raise InputError(
                        f"{self.path}: an unfinished run with other settings: "
                        f"{differences(entry['settings'], settings)}. "
                        "Go on with those, or begin anew with --restart."
                    )
                if whole:
                    self.replies[entry["key"]] = entry
                whole += len(line)
        self._file.truncate(whole)
        if not whole:
            self._write([{"settings": settings}])

    def _write(self, entries: list[dict]) -> None:
        lines = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        start = os.fstat(self._file.fileno()).st_size
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
        except OSError:  # a full disk: leave no half line behind
            self._file.truncate(start)
            raise

    def append(self, replies: list[dict]) -> None:
        """Keep finished replies: dicts with a "key". A key that is there already stays as it was."""
        new = [reply for reply in replies if reply["key"] not in self.replies]
        self._write(new)
        self.replies.update((reply["key"], reply) for reply in new)

    def __contains__(self, key: str) -> bool:
        return key in self.replies

    def close(self, remove: bool = False) -> None:
        """Let go of the file; `remove` it once the result is written."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()
