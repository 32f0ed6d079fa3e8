"""Crash-safe progress of a stage: one line per finished reply, appended and flushed.

A stage that was killed reads its journal and continues where it stopped. The first line holds the settings that
determine the result; a journal with other settings is refused.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from mpa.files import distributed
from mpa.files.earlier_replies import (
    Asked,
    EarlierReplies,
    beside_content,
    journal_header,
    journals_of,
    same_but_content,
)
from mpa.files.records import InputError, dumps, loads, meta_path, read_json, take_lock


def differences(old: dict, new: dict) -> str:
    """The settings that differ, as readable text: "limit was 10, is now 20"."""
    if not isinstance(old, dict):
        return "they cannot be read"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if keys == ["content"]:
        return f"content was {old.get('content')!r}, is now {new.get('content')!r}: the images or their paths, the questions or the prompt"
    return "; ".join(f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in keys)


def finished(result: Path, settings: dict, restart: bool, taken_over=lambda: False) -> bool:
    """Does a complete `result` with these settings exist? Raises InputError if it has other settings.

    Of `settings` without the "content", which may not be known yet, only those beside it are compared.
    A result is incomplete if it is empty or some of its replies failed with a temporary error. Its journal is kept.
    One about other images or questions is made anew where `taken_over()`: where replies of it can be.
    """
    if restart or not result.exists():
        return False
    meta = read_json(meta_path(result)) if meta_path(result).exists() else {}
    if not isinstance(meta, dict):
        raise InputError(f"{meta_path(result)}: not the meta file of a result. Start again with --restart.")
    old = _comparable(meta.get("settings", {}), settings)
    if same_but_content(old, settings) and old != settings and taken_over():
        return False
    if old != settings:
        raise InputError(
            f"{result}: was made with other settings: {differences(old, settings)}. "
            "Choose another --run or --out to keep it, or --restart to replace it."
        )
    return not meta.get("unfinished")


def _comparable(old, new: dict):
    return old if "content" in new or not isinstance(old, dict) else beside_content(old)


def refuse_other_settings(result: Path, settings: dict, restart: bool, asked: Asked | None = None) -> None:
    """Raise InputError if an unfinished run of `result` has other settings, as `Journal` does; nothing is opened for writing."""
    others = {}
    for path in () if restart else journals_of(result):
        with open(path, "rb") as file:
            line = file.readline()
        try:
            old = json.loads(line)["settings"] if line.endswith(b"\n") else settings
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # damaged: `Journal` names the line
        if (old := _comparable(old, settings)) != settings:
            others[path] = old
    if others and not (asked and EarlierReplies(result, settings).replace(asked, list(others))):
        _refuse_other(*next(iter(others.items())), settings)


def _refuse_other(path: Path, old, settings: dict) -> None:
    if old != settings:
        raise InputError(
            f"{path}: an unfinished run with other settings: {differences(old, settings)}. "
            "Use the same settings, or start again with --restart."
        )


def is_temporary(reply: dict) -> bool:
    """Is this reply a temporary error? The next call asks again."""
    return "error" in reply and not reply.get("permanent", False)


def follow_up_key(key: str) -> str:
    """The journal's key for a follow-up that was asked in a later call than its first reply."""
    return f"{key}#follow_up"


class Journal:
    """Replies by key, stored on disk next to their result: `journal[key]`, `key in journal`.

    Replies stay on disk; memory holds their positions, some 140 bytes a reply. In a distributed run (`mpa.files.distributed`) each process
    writes its own file and reads all files. Temporary errors are kept during this call only: the next call asks again.
    `asked`: replies of earlier calls are taken over (`mpa.files.earlier_replies`). `late`: nothing is written, and with `restart`
    nothing removed, before the first reply; the model may not load. Raises InputError if a journal has other settings, is
    damaged, or is being written by another process.
    """

    def __init__(
        self, result: Path, settings: dict, restart: bool = False, asked: Asked | None = None, late: bool = False
    ):
        self.result, self.settings, self.asked = Path(result), settings, asked
        self.path = self.result.with_suffix(
            f".journal-{distributed.RANK}.jsonl" if distributed.RANK else ".journal.jsonl"
        )
        self._positions: dict[str, tuple[int, int]] = {}  # of each reply: number of its file, first byte
        self._files: list[BinaryIO] = []  # open for reading
        self._identities: dict[str, str | None] = {}  # of the requests, by key
        self.taken_over = 0
        if (restart or asked) and not distributed.FIRST:
            distributed.wait()  # until rank 0 has removed the old files, or kept their replies
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        take_lock(self._file, self.path)  # the kernel releases it when the process dies
        self.earlier = EarlierReplies(self.result, settings, restart) if asked else None
        self._waits = "restart" if restart and late and distributed.WORLD == 1 else ""  # for the first reply
        if self._waits:
            self._files.append(open(self.path, "rb"))  # noqa: SIM115
            return
        if restart:
            self._restart()
        elif asked and distributed.FIRST:
            self._keep_earlier()
        if (restart or asked) and distributed.FIRST:
            distributed.wait()
        complete = self._read(self.path, earlier=True)
        if complete < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(complete)  # remove a partial last line; its reply will be generated again
        self._waits = "" if complete else "settings"
        if not late:
            self._begin()
        self.read_others(earlier=True)

    def _restart(self) -> None:
        """Remove the old result now, so that it cannot reappear after a kill."""
        kept = self.result.with_suffix(".replies.jsonl")
        for old in (self.result, meta_path(self.result), kept, *self._others()) if distributed.FIRST else ():
            old.unlink(missing_ok=True)
        self._file.truncate(0)

    def _begin(self) -> None:
        """Do what waited for the first reply."""
        if self._waits == "restart":
            self._restart()
        if self._waits:
            self._write([{"settings": self.settings} | ({"images": self.asked.hashes} if self.asked else {})])
        self._waits = ""

    def _keep_earlier(self) -> None:
        """Keep the replies of an unfinished run about other images or questions, if one of them can be taken over."""
        files = [self.path, *self._others()]
        old = [file for file in files if journal_header(file).get("settings") not in (None, self.settings)]
        if old and self.earlier.replace(self.asked, old):
            self.earlier.keep(old)
            for file in old:
                self._file.truncate(0) if file == self.path else file.unlink()

    def keep(self) -> None:
        """Keep the replies for later calls about other images, before the result is written and the journal removed."""
        if self.asked:
            self.earlier.keep([self.path, *self._others()])

    def _others(self) -> list[Path]:
        """The files of the other processes, including those of an earlier call with more processes."""
        return [path for path in journals_of(self.result) if path != self.path]

    def read_others(self, earlier: bool = False) -> None:
        """Read the other processes' files again. `earlier`: ignore temporary errors, which an earlier call wrote."""
        for file in self._files[1:]:
            file.close()
        del self._files[1:]
        for path in self._others():
            self._read(path, earlier)

    def _read(self, path: Path, earlier: bool) -> int:
        """Index the replies in a file. Returns the length in bytes of its complete lines."""
        self._files.append(open(path, "rb"))  # noqa: SIM115
        end, number, failed = 0, len(self._files) - 1, {}
        for index, line in enumerate(self._files[-1]):
            if not line.endswith(b"\n"):
                break  # cut off by a kill
            try:
                entry = loads(line)
                settings = entry["settings"] if end == 0 else None
                if end and not (isinstance(entry["key"], str) and isinstance(entry.get("text", ""), str)):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                self.close()
                raise InputError(
                    f"{path}, line {index + 1}: not a line of a journal: {line[:60]!r}. Delete this line to keep the "
                    "other replies, or start again with --restart."
                ) from None
            if end == 0 and settings != self.settings:
                self.close()
                _refuse_other(path, settings, self.settings)
            if end:
                (failed if is_temporary(entry) else self._positions).setdefault(entry["key"], (number, end))
            end += len(line)
        if not earlier:
            self._positions = failed | self._positions
        return end

    def _write(self, entries: list[dict]) -> list[int]:
        """Append one line per entry, all or none. Returns the offset of each line."""
        lines = [(dumps(entry, self.path) + "\n").encode() for entry in entries]
        start = os.fstat(self._file.fileno()).st_size
        unwritten = b"".join(lines)
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:  # e.g. a full disk: leave no partial line
            error.filename = str(self.path)
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise
        return [start + at for at in accumulate(map(len, lines[:-1]), initial=0)] if lines else []

    def append(self, replies: list[dict]) -> None:
        """Store finished replies: dicts with a "key". The first reply of a key is kept."""
        self._begin()
        new = {}
        for reply in replies:
            if reply["key"] not in self:
                asked = self._identities.get(reply["key"])
                new.setdefault(reply["key"], reply | ({"asked": asked} if asked else {}))
        self._positions |= {key: (0, start) for key, start in zip(new, self._write(list(new.values())), strict=True)}

    def take_over(self, requests: Sequence) -> None:
        """Take the replies to these requests from earlier calls, where they are there. To be called before they are asked."""
        if not self.asked:
            return
        self._identities |= {request.key: self.asked.identity(request) for request in requests}
        for request in requests:
            known = request.key in self
            reply = None if known else self.earlier.get(self._identities[request.key], request.key)
            if reply:
                follow_up = reply.get("follow_up")
                about = {"key": request.key} | ({"follow_up": follow_up | {"key": request.key}} if follow_up else {})
                self.append([reply | about])
                self.taken_over += 1

    def __contains__(self, key: str) -> bool:
        return key in self._positions

    def __getitem__(self, key: str) -> dict:
        reply = self._entry(key)
        if is_temporary(reply.get("follow_up") or {}) and follow_up_key(key) in self:
            reply["follow_up"] = {**self._entry(follow_up_key(key)), "key": key}
        return reply

    def _entry(self, key: str) -> dict:
        file, start = self._positions[key]
        self._files[file].seek(start)
        entry = json.loads(self._files[file].readline())
        entry.pop("asked", None)
        return entry

    def __len__(self) -> int:
        return len(self._positions)

    def abandon(self) -> None:
        """Close the files after an error; an empty one was made by this call and goes."""
        if not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self, remove: bool = False) -> None:
        """Close the files; with `remove`, delete them, since the result has been written."""
        for path in (self.path, *self._others()) if remove else ():
            path.unlink(missing_ok=True)
        for file in (self._file, *self._files):
            file.close()
