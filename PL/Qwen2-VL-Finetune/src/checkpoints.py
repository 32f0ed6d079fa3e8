"""A training's files on disk: checkpoints with manifests, and the lock on the output folder.

A checkpoint's manifest (`model_files`) is written last. It lists each file's size and sha256: what was damaged since is not
loaded, nor a pickle that this trainer did not write, which could run code.
"""

import contextlib
import re
from pathlib import Path

from mpa.files import records
from mpa.files.records import InputError
from mpa.models import model_files
from mpa.models.model_files import MANIFEST, PICKLES

OPTIMIZER_FILES = ("optimizer.pt", "latest")  # torch's, DeepSpeed's


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint whose other files are complete; all of it is then on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    model_files.write_manifest(folder, files)


def fault(folder: Path) -> str:
    """Why training cannot resume from a checkpoint; "" if it can."""
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}: it is incomplete, or another program wrote it"
    if why := model_files.changed(folder):
        return why
    listed = read_json(folder / MANIFEST)
    for path in (path for path in folder.rglob("*") if path.is_file() and path.suffix in PICKLES):
        if str(path.relative_to(folder)) not in listed:
            return f"{path.relative_to(folder)} was not written by this trainer; it is a pickle, which could run code"
    if "trainer_state.json" not in listed or not any(name in listed for name in OPTIMIZER_FILES):
        return "it holds the model only (--save_only_model), not the state of optimizer and schedule"
    return ""


def last_complete(out: Path) -> tuple[Path | None, list[str]]:
    """The last complete checkpoint in `out`, or None; and for each later one a line that says what is wrong with it."""
    found = [path for path in out.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name)]
    refused = []
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        why = fault(path)
        if not why:
            return path, refused
        refused.append(f"{path}: {why}")
    return None, refused


def read_json(path: Path) -> dict:
    """Raises InputError if the file is truncated or holds no JSON object."""
    try:
        content = records.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}). Choose another --output_dir, or remove this file."
        ) from None
    return content


@contextlib.contextmanager
def locked(out: Path):
    """Create the output folder and lock it for this training; in the end it is removed if it is empty.

    Raises InputError if another training holds the lock.
    """
    with records.locked(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                out.rmdir()
