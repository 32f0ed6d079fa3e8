"""What lies on disk of a training: whole checkpoints, told by a manifest, and the lock on a folder.

A checkpoint's manifest is written last. It holds the size of every file, and the hash of every pickle: torch and DeepSpeed
would run what is in one when they load it, so that only what this trainer wrote here is loaded.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from data import DataError

MANIFEST = "manifest.json"
PICKLES = {".pt", ".pth", ".bin", ".pkl"}
OPTIMIZER = ("optimizer.pt", "latest")  # torch's, DeepSpeed's


def write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    manifest = {}
    for path in files:
        manifest[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, **_hash(path)}
    write_json(folder / MANIFEST, manifest)


def _hash(path: Path) -> dict:
    if path.suffix not in PICKLES:
        return {}
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fault(folder: Path) -> str:
    """Why a training cannot go on from a checkpoint; "" where it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed = {name: dict(entry) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not finished, or written by something else"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} cannot be read"
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} is cut off or was changed: {path.stat().st_size} bytes, not {entry.get('bytes')}"
        if _hash(path) != {key: value for key, value in entry.items() if key == "sha256"}:
            return f"{name} was changed since it was written, and is a pickle, which could run code"
    others = (path for path in folder.rglob("*") if path.is_file() and path.suffix in PICKLES)
    for path in others:
        if str(path.relative_to(folder)) not in listed:
            return f"{path.relative_to(folder)} was not written by this trainer, and is a pickle, which could run code"
    if "trainer_state.json" not in listed or not any(name in listed for name in OPTIMIZER):
        return "it holds the model only (--save_only_model), not the state of optimizer and schedule"
    return ""


def last_whole(out: Path) -> tuple[Path | None, list[str]]:
    """(the last checkpoint in `out` to go on from, or None; why later ones will not do, a line each)."""
    found = [path for path in out.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]
    refused = []
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        why = fault(path)
        if not why:
            return path, refused
        refused.append(f"{path}: {why}")
    return None, refused


def write_json(path: Path, content) -> None:
    """Whole or not at all: beside `path`, then renamed."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(aside, path)


def read_json(path: Path) -> dict:
    """Raises DataError for a file that is cut off or no JSON object."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Choose another --output_dir, or remove this file."
        ) from None
    return content


@contextlib.contextmanager
def locked(out: Path):
    """The output folder is this training's alone, as long as it runs. Raises DataError where another training has it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when we die
        except BlockingIOError:
            raise DataError(
                f"{out}: another training is writing it. Choose another --output_dir, or wait for it."
            ) from None
        except OSError as error:
            print(f"warning: {out}: cannot be locked on this file system ({error.strerror}).", file=sys.stderr)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                out.rmdir()  # where nothing was written
