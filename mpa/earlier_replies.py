"""Replies of earlier calls, about other images or questions: a reply is taken over where the same request would be sent.

A request is known by the content of its image (not the path), its prompt, limits and sampling. A sampled reply also
depends on the seed and the request's key, which is the question_id (a file's path below the folder of images) and what
makes several requests of it, such as PA's try; so a renamed file's sampled replies are asked for anew, and its greedy
ones are taken over. When a stage ends, its journal is kept as <result>.replies.jsonl; --restart deletes it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mpa.records import digest

_SENT = ("prompt", "max_new_tokens", "temperature", "top_p", "stop", "follow_up", "answer")  # of a Request


@dataclass(frozen=True)
class Asked:
    """What a stage asks: `images` are {path: (bytes, content hash) or None}, `requests` those that it begins with."""

    images: dict[str, tuple[int, str] | None]
    requests: Sequence

    def identity(self, request) -> str | None:
        """A digest of all that decides the reply, beside the stage's settings; None for an image that cannot be read."""
        image = self.images.get(request.image_path)
        if image is None:
            return None
        drawn = (request.seed, request.key) if request.temperature else ()
        return digest(image[1], json.dumps([*(getattr(request, name) for name in _SENT), *drawn]))

    @cached_property
    def hashes(self) -> list[str]:
        """The images' hashes, shortened."""
        return sorted({image[1][:8] for image in self.images.values() if image})


def same_but_content(old, new: dict) -> bool:
    """Do these settings differ only in the images or questions?"""
    return isinstance(old, dict) and old | {"content": ""} == new | {"content": ""} and "content" in new


def _entries(path: Path) -> Iterator[tuple[int, bytes, dict]]:
    """(offset, line, entry) for each whole line of a journal or of kept replies."""
    at = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict):
                yield at, line, entry
            at += len(line)


def journal_header(path: Path) -> dict:
    """The first line of a journal or of kept replies; {} if there is none."""
    return next((entry for _, _, entry in _entries(path)), {}) if path.exists() else {}


def has_replies(path: Path) -> bool:
    return any("key" in entry for _, _, entry in _entries(path))


def _can_be_taken(entry: dict) -> bool:
    known = isinstance(entry.get("asked"), str) and isinstance(entry.get("key"), str)
    return known and ("error" not in entry or bool(entry.get("permanent")))


class EarlierReplies:
    """The replies in <result>.replies.jsonl, by request. Those of other settings count as none, and with `restart` all."""

    def __init__(self, result: Path, settings: dict, restart: bool = False):
        self.path, self.settings = Path(result).with_suffix(".replies.jsonl"), settings
        self.read(restart)

    def read(self, restart: bool = False) -> None:
        self._at: dict[str, int] = {}  # the offset of a reply, by its request
        self._with_key: dict[str, int] = {}  # of each reply, by its request and key: copies of an image keep their own
        self.images: list[str] | None = None  # of the latest call
        self.usable = not restart and same_but_content(journal_header(self.path).get("settings"), self.settings)
        for at, _, entry in _entries(self.path) if self.usable else ():
            if "settings" in entry:
                self.images = entry.get("images")
            elif _can_be_taken(entry):
                self._at.setdefault(entry["asked"], at)
                self._with_key.setdefault(f"{entry['asked']} {entry['key']}", at)

    def __len__(self) -> int:
        return len(self._at)

    def get(self, identity: str | None, key: str) -> dict | None:
        """The reply to this request, if there is one; of several the one with this key."""
        at = self._with_key.get(f"{identity} {key}", self._at.get(identity))
        if at is None:
            return None
        with open(self.path, "rb") as file:
            file.seek(at)
            return json.loads(file.readline())

    def takes(self, asked: Asked, journals: Sequence[Path] = ()) -> bool:
        """Is a reply to one of these requests here, or in these journals?"""
        found = (entry for journal in journals for _, _, entry in _entries(journal) if _can_be_taken(entry))
        replies = {*self._at, *(entry["asked"] for entry in found)}
        return any(asked.identity(request) in replies for request in asked.requests)

    def replace(self, asked: Asked, journals: Sequence[Path]) -> bool:
        """May these journals, about other images or questions, end here? If a reply of theirs can be taken over, or they have none."""
        same = all(same_but_content(journal_header(journal).get("settings"), self.settings) for journal in journals)
        return same and (self.takes(asked, journals) or not any(map(has_replies, journals)))

    def keep(self, journals: Sequence[Path]) -> None:
        """Add the replies of these journals, which stay. Nothing is added twice, so a call after a kill does the rest."""
        with open(self.path, "ab" if self.usable else "wb") as file:
            if self.usable:
                file.write(b"\n")  # after a line that a kill cut off
            for place, journal in enumerate(journals):
                for _, line, entry in _entries(journal):
                    new = _can_be_taken(entry) and f"{entry['asked']} {entry['key']}" not in self._with_key
                    if new or ("settings" in entry and place == 0):
                        file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.read()

    def told(self, hashes: list[str]) -> str:
        """ "1 image added, 1 gone", for the images of the latest call and these."""
        if self.images is None:
            return "other images or questions"
        added, gone = len(set(hashes) - set(self.images)), len(set(self.images) - set(hashes))
        if not (added or gone):
            return "the same images; their paths, or the questions, differ"
        return f"{added} image{'s' * (added != 1)} added, {gone} gone"
