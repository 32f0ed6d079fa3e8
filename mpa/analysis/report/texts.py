"""Texts of models, datasets and file names on a page: cut, without folders, and as JSON that cannot end a script."""

import json
import re
from dataclasses import is_dataclass, replace
from pathlib import Path

from mpa.files.records import REPOSITORY

LONGEST = 2000  # characters of a text that the page holds


def shortened(text: str | None) -> str | None:
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … ({len(text):,} characters)"


def plain(text) -> str:
    """Text that a file and an HTML page can hold: without NUL and lone surrogates."""
    return re.sub("[\0\ud800-\udfff]", "\ufffd", str(text))


def without_folders(text: str) -> str:
    """Absolute paths in a text as their last part: for --redact-paths."""
    for root in (str(REPOSITORY), str(Path.cwd()), str(Path.home())):
        text = text.replace(f"{root}/", "") if len(root) > 1 else text
    path = r"(?<![\w./])(?:file://)?/(?:[^\s/:,\"'<>]+/)*[^\s/:,\"'<>]+/?"
    return re.sub(path, lambda m: m[0].rstrip("/").rpartition("/")[2], text)


def redacted(value):
    """The same value with `without_folders` applied to every text in it."""
    if isinstance(value, str):
        return without_folders(value)
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return replace(value, **redacted(vars(value))) if is_dataclass(value) else value


def as_json(value) -> str:
    """JSON that cannot end a script element: <, >, & and line separators are escaped, as is all that is not ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
