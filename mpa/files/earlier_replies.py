"""Replies of earlier calls, about other images or questions: a reply is taken over where the same request would be sent.

A request is known by the content of its image (not the path), its prompt, limits and sampling. A sampled reply also
depends on the seed and the request's key, which is the question_id (a file's path below the folder of images) and what
makes several requests of it, such as PA's try; so a renamed file's sampled replies are asked for anew, and its greedy
ones are taken over. When a stage ends, its journal is kept as <result>.replies.jsonl; --restart deletes it.
"""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mpa.files.records import digest

# Settings that say which requests are made, and nothing of their replies.
WHICH_ARE_ASKED = ("content", "answer_all")
_SENT = ("prompt", "max_new_tokens", "temperature", "top_p", "stop", "follow_up")  # of a Request


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
        return digest(image[1], json.dumps([*(getattr(request, name) for name in _SENT), None, *drawn]))

    @cached_property
    def hashes(self) -> list[str]:
        """The images' hashes, shortened."""
        return sorted({image[1][:8] for image in self.images.values() if image})


def same_but_content(old, new: dict) -> bool:
    """Do these settings differ only in what is asked: images, questions, --answer-all?"""
    return isinstance(old, dict) and "content" in new and beside_content(old) == beside_content(new)


def beside_content(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name not in WHICH_ARE_ASKED}


def journals_of(result: Path) -> list[Path]:
    """The journals of a result: of each process that wrote one."""
    return sorted(result.parent.glob(f"{glob.escape(result.stem)}.journal*.jsonl"))


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


def _is_reply(entry: dict) -> bool:
    """Not the settings, and no temporary error."""
    return isinstance(entry.get("key"), str) and ("error" not in entry or bool(entry.get("permanent")))


def _can_be_taken(entry: dict) -> bool:
    return isinstance(entry.get("asked"), str) and _is_reply(entry)


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

    def replace(self, asked: Asked, journals: Sequence[Path]) -> bool:
        """May what these journals and the kept replies are about, other images or questions, be asked no more?

        If one of the replies can be taken over, or the journals have none.
        """
        if not all(
            same_but_content(journal_header(journal).get("settings", self.settings), self.settings)
            for journal in journals
        ):
            return False
        found = [entry for journal in journals for _, _, entry in _entries(journal) if _is_reply(entry)]
        replies = {*self._at, *(entry["asked"] for entry in found if _can_be_taken(entry))}
        return bool(journals and not found) or any(asked.identity(request) in replies for request in asked.requests)

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
