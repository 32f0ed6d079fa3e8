"""The batches that a run has at a server, one file each in results/RUN/batches/: what a killed call submitted is found again.

A file is written before each step that the server sees: its lines before anything is sent, then `file` (uploaded) with `posted`
(about to be submitted), then `id` (submitted). It goes when the replies are in the journal. Its money is set aside in
`spending.json` under its `owner`, until the batch is charged.
"""

import contextlib
import json
import secrets
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from mpa.engines import Request
from mpa.files import atomic
from mpa.files.image_files import ImageError, content_hash
from mpa.files.records import InputError, digest, read_json, write_json


class Line(NamedTuple):
    """A request of a batch: what was set aside for it (see `costs.Reservation`), and the parameters that were sent."""

    amount: float
    prompt_tokens: float
    least: float
    sent: dict


@dataclass
class Submitted:
    """A batch, and its file's `path`. `lines` are by custom id. `stage` is that of the budget."""

    path: Path
    stage: str
    server: str
    lines: dict[str, Line] = field(default_factory=dict)
    file: str = ""
    posted: float = 0.0  # 0: it was never submitted
    id: str = ""

    @property
    def token(self) -> str:
        """By which the batch is found among the server's."""
        return self.path.stem

    @property
    def owner(self) -> str:
        return f"batch/{self.token}"  # no host has a "/" in its name

    @property
    def amount(self) -> float:
        return sum(line.amount for line in self.lines.values())

    def write(self) -> None:
        write_json(self.path, {name: value for name, value in asdict(self).items() if name != "path"})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def folder(ledger: Path) -> Path:
    return ledger.with_name("batches")


def new(ledger: Path, stage: str, server: str) -> Submitted:
    """A batch without lines, and without a file yet."""
    return Submitted(folder(ledger) / f"{secrets.token_hex(8)}.json", stage, server)


def of(ledger: Path, stage: str, server: str) -> list[Submitted]:
    """The batches of a stage, the oldest first. Raises InputError for a damaged file."""
    found = [_read(path) for path in sorted(folder(ledger).glob("*.json"))]
    return sorted((b for b in found if (b.stage, b.server) == (stage, server)), key=lambda batch: batch.posted)


def _read(path: Path) -> Submitted:
    try:
        batch = Submitted(path, **read_json(path))
        batch.lines = {name: Line(*line) for name, line in batch.lines.items()}
        return batch
    except (TypeError, AttributeError):
        raise InputError(
            f"{path}: not the file of a batch. Look for its batch at the server (metadata: {path.stem}); delete the file to "
            "forget it. Its replies may have to be paid."
        ) from None


def custom_id(request: Request, settings: tuple) -> str:
    """A request's name in a batch: a digest of all that decides the reply. Raises ImageError."""
    asked = {name: value for name, value in asdict(request).items() if name not in ("image_path", "stop", "follow_up")}
    return digest(content_hash(request.image_path), json.dumps([asked, *settings]))


def by_custom_id(requests: Iterable[Request], settings: tuple) -> dict[str, Request]:
    """The requests whose image can be read."""
    found = {}
    for request in requests:
        try:
            found[custom_id(request, settings)] = request
        except ImageError:
            continue  # said where it is asked
    return found


def refuse_asked(batches: list[Submitted], requests: Iterable[Request], done: Container[str], settings: tuple) -> None:
    """Raise InputError where one of the batches holds one of these requests: asked on its own, it would be paid twice."""
    batches = [batch for batch in batches if batch.posted]
    asked = by_custom_id((r for r in requests if r.key not in done), settings) if batches else {}
    for batch in batches:
        if n := len(asked.keys() & batch.lines.keys()):
            raise InputError(
                f"{batch.path}: {n} of these requests are in a batch at {batch.server} ({batch.id or batch.token}), and would be "
                "paid twice. Go on with --batch and without --dry-run, which reads their replies, or what there is of them after you have cancelled it."
            )


def clean(ledger: Path) -> None:
    """Remove what killed processes have left, and the folder if nothing is in it."""
    atomic.remove_left(folder(ledger))
    for lock in folder(ledger).glob(".*.json.lock"):
        if not lock.with_name(lock.name[1 : -len(".lock")]).exists():
            lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder(ledger).rmdir()
