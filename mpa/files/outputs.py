"""Which files a command may write: new ones, and results of its own. What another command made, or a person, stays.

Each result has a meta file, and its `kind` says what it is. Results of the stages have none: they are known by their records' fields.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mpa.files import records
from mpa.files.records import FIELDS, InputError, meta_path

STAGES = (*FIELDS, "corrupt")
OF_THE_RUN = ("log.txt", "spending.json")  # names of other files in a run folder


def kind_of(path: Path) -> str | None:
    """What a file with a meta file is: its meta file's `kind`, "corrupt", a key of FIELDS, or None."""
    try:
        meta = records.read_json(meta_path(path))
    except InputError:
        return None
    if not isinstance(meta, dict):
        return None
    if "corrupt" in (meta.get("settings") or {}):
        return "corrupt"
    return meta.get("kind") or _kind_of_records(path)


def _kind_of_records(path: Path) -> str | None:
    """The key of FIELDS whose fields the first record of a JSON list has."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8-sig") as file:
        start = file.read(2**16).lstrip()
        while start.startswith("["):
            with contextlib.suppress(ValueError):
                first, _ = json.JSONDecoder().raw_decode(start[1:].lstrip())
                return next((kind for kind, fields in FIELDS.items() if first.keys() >= set(fields)), None)
            if not (more := file.read(2**20)):
                break
            start += more
    return None


def refuse_others(
    out: str | Path, kind: str, inputs: Iterable = (), ours: Callable[[Path], bool] = lambda path: False
) -> None:
    """Raise InputError if a command that makes files of this kind (`kind_of`) may not write `out`. Writes nothing.

    Refused are what the command reads (`inputs`: paths, lists of them, other values), and an existing file that has no meta file or
    another's. `ours` recognises a result that has no meta file. An empty file is nobody's.
    """
    given, out = out, Path(os.path.realpath(out))
    for path in _files(inputs):
        if _same(out, path) or _same(out, meta_path(path)):
            raise InputError(f"{given}: this command reads it. Write the result to another file.")
    if out.name in OF_THE_RUN:
        raise InputError(f"{given}: is another file of the run. Choose another name.")
    meta = meta_path(out)
    if out.exists() and not out.is_file():
        raise InputError(f"{given}: is not a file. Choose another.")
    if not meta.exists():
        if out.exists() and out.stat().st_size and not ours(out):
            raise InputError(
                f"{given}: exists, and no meta file says that this command made it. Move it away, or choose another file."
            )
    elif (known := kind_of(out)) != kind and not (known is None and kind in STAGES and _is_empty(out)):
        raise InputError(
            f"{given}: {meta.name} belongs to a file of another command{f' ({known})' if known else ''}. Choose another file, or move "
            "both away."
        )


def _is_empty(out: Path) -> bool:
    """Whether there is nothing to lose: no file, as a kill leaves it between meta file and result, or one without records."""
    return not out.exists() or out.read_bytes()[:100].strip() in (b"", b"[]")


def _same(out: Path, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(out, path)
    return False


def _files(values: Iterable) -> Iterator[Path]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _files(value)
        elif isinstance(value, str | Path) and os.path.isfile(value):
            yield Path(value)


def inputs_of(args) -> list:
    """All values of a command's arguments but --out."""
    return [value for name, value in vars(args).items() if name != "out"]


def write(out: Path, text: str, kind: str, **facts) -> None:
    """Write a result that is no stage's, and its meta file. Check with `refuse_others` before."""
    records.write_with_meta(out, text, {"kind": kind, **facts, "made_by": records.made_by()})
