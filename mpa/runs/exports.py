"""Export the parity set for other trainers: one function per format, from a sample (id, image, conversations) to a row.

The exported prompt is the evaluated one: the image, then the text, with no line break between them.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from mpa.files import atomic, records
from mpa.files.image_files import read_file
from mpa.files.packages import require
from mpa.files.records import InputError, funnel_line

MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant"}
PART = r"train-00000-of-00001-[0-9a-f]{16}\.parquet"
MADE_BY = "Model Parity Alignment (arXiv 2509.16633)"  # a folder whose card says this may be overwritten


def turns(sample: dict) -> list[tuple[str, str]]:
    """("user" or "assistant", text) per turn. Only the first text has an <image> mark, with no line break after it.

    Raises ValueError if the sample is not such a conversation about one image.
    """
    conversation = sample["conversations"]
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        raise ValueError("'conversations' should be a list of turns")
    for turn in conversation:
        if turn.get("from") not in list(ROLES) or not isinstance(turn.get("value"), str):
            raise ValueError(f"a turn should be from 'human' or 'gpt', with text as value: {json.dumps(turn)[:80]}")
    found = [(ROLES[turn["from"]], re.sub(rf"{MARK}\r?\n", MARK, turn["value"])) for turn in conversation]
    if [role for role, _ in found] != ["user", "assistant"] * (len(found) // 2) or not found:
        raise ValueError("the turns of 'conversations' should be from 'human' and 'gpt' in turn")
    marks = [text.count(MARK) for _, text in found]
    if marks[0] != 1 or any(marks[1:]):
        raise ValueError(f"{sum(marks)} {MARK} marks in its text; expected one, in the first turn")
    return found


def kind_of(sample: dict) -> dict:
    """{"kind"} of a sample from PI's --anchors, "parity" or "anchor": every format keeps it. Raises ValueError if it is no text."""
    kind = sample.get("kind")
    if not isinstance(kind, str | None):
        raise ValueError(f"'kind' should be text: {str(kind)[:80]}")
    return {} if kind is None else {"kind": kind}


def sharegpt(sample: dict) -> dict:
    names = {role: name for name, role in ROLES.items()}
    conversation = [{"from": names[role], "value": text} for role, text in turns(sample)]
    return {"id": sample["id"], "conversations": conversation, "images": [sample["image"]]} | kind_of(sample)


def ms_swift(sample: dict) -> dict:
    return {
        "messages": [{"role": role, "content": text} for role, text in turns(sample)],
        "images": [sample["image"]],
    } | kind_of(sample)


def trl(sample: dict) -> dict:
    """All turns but the last are the prompt. The image part takes the position of the <image> mark."""

    def content(text: str) -> list[dict]:
        parts = [{"type": "text", "text": words} for words in text.split(MARK)]
        if MARK in text:
            parts.insert(1, {"type": "image", "text": None})
        return [part for part in parts if part["text"] != ""] or parts

    messages = [{"role": role, "content": content(text)} for role, text in turns(sample)]
    return {"prompt": messages[:-1], "completion": messages[-1:], "images": [sample["image"]]} | kind_of(sample)


def question_and_answer(sample: dict) -> dict:
    found = turns(sample)
    if len(found) > 2:
        raise ValueError(f"has {len(found) // 2} questions; this format holds one (--to trl holds all)")
    (_, question), (_, answer) = found
    return {
        "id": _unicode(str(sample["id"])),
        "image": sample["image"],
        "question": question.replace(MARK, ""),
        "answer": answer,
    } | kind_of(sample)


FORMS = {"llava": dict, "sharegpt": sharegpt, "ms-swift": ms_swift, "trl": trl, "hf": question_and_answer}


def _unicode(text: str) -> str:
    """Escape what is not valid Unicode, e.g. a file name in another encoding: Parquet stores only Unicode."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_unicode(sample: dict) -> bool:
    """Is all text of the conversation valid Unicode? No tokenizer accepts half a surrogate pair."""
    return not any(re.search("[\ud800-\udfff]", text) for _, text in turns(sample))


# --- a dataset folder


def free_for_folder(folder: Path) -> None:
    """Raise InputError if `folder` holds anything other than an earlier export, complete or killed."""
    if not folder.is_dir():
        return
    card, data = folder / "README.md", folder / "data"
    existing = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    others = existing - {card.name, data.name}
    if card.is_file():
        ours = MADE_BY in card.read_text(encoding="utf-8", errors="replace")
    else:
        ours = all(re.fullmatch(PART, path.name) or path.name.startswith(".") for path in data.glob("*"))
    if others or not ours:
        raise InputError(
            f"{folder}: exists and is not an export of a parity set (it holds {', '.join(sorted(others or existing))}). "
            "Choose another --out."
        )


def write_folder(folder: Path, samples: list[dict], form: Callable, card: Callable[[str], str]) -> None:
    """Write a dataset folder: data/train-….parquet with embedded images, and README.md with the text of `card(file)`.

    The file name contains a hash of the content. `datasets` caches by the folder's name and the card's `configs`, not
    by content: with a fixed file name it would return another run's set from its cache.
    """
    require("--to hf and trl", "export", "datasets", "pyarrow")
    import pyarrow.parquet
    from datasets import Features, Image, List, Value

    text = Value("string")
    message = List({"role": text, "content": List({"type": text, "text": text})})
    features = {
        trl: Features({"prompt": message, "completion": message, "images": List(Image())}),
        question_and_answer: Features({"id": text, "image": Image(), "question": text, "answer": text}),
    }[form]
    if any(map(kind_of, samples)):
        features["kind"] = text

    def embedded(path: str) -> dict:
        return {"bytes": read_file(path), "path": _unicode(Path(path).name)}

    def rows() -> Iterator[dict]:
        for sample in samples:
            row = form(sample)
            if "image" in row:
                yield row | {"image": embedded(row["image"])}
            else:
                yield row | {"images": [embedded(path) for path in row["images"]]}

    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    with records.locked(folder / "README.md", wait=True), atomic.temporary(data / "train.parquet") as file:
        with pyarrow.parquet.ParquetWriter(file, features.arrow_schema) as writer:
            row_iterator = rows()
            while group := list(islice(row_iterator, 32)):  # small groups, since images may be large
                writer.write_table(pyarrow.Table.from_pylist(group, schema=features.arrow_schema))
        atomic.on_disk(file)
        file.seek(0)
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        part = data / f"train-00000-of-00001-{content}.parquet"
        os.replace(file.name, part)
        records.write_text(folder / "README.md", card(f"data/{part.name}"))
        for old in data.glob("train-*.parquet"):  # from an earlier export; the card no longer names it
            if old != part:
                old.unlink()


def size_category(n: int) -> str:
    """The Hub's size category for `n` samples.

    >>> size_category(999), size_category(100_000)
    ('n<1K', '100K<n<1M')
    """
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    above = sum(n >= 10 ** (3 + i) for i in range(len(bounds)))
    if above in (0, len(bounds)):
        return f"n<{bounds[0]}" if not above else f"n>{bounds[-1]}"
    return f"{bounds[above - 1]}<n<{bounds[above]}"


def data_card(train_json: Path, meta: dict, n: int, file: str) -> str:
    """The dataset card: what the dataset is and how it was made. `meta` is the parity set's meta file."""
    funnel = funnel_line(meta.get("funnel", {})) or "not known"
    lvlm, svlm = (records.short_name(meta.get(f"model_path_{which}", "not known")) for which in ("lvlm", "svlm"))
    anchors = meta.get("funnel", {}).get("anchors", 0)
    which = f"{n - anchors} of them wrongly, and {anchors}, the anchors, rightly" if anchors else "each of them wrongly"
    return f"""---
task_categories:
- visual-question-answering
license: other
size_categories:
- {size_category(n)}
configs:
- config_name: default
  data_files:
  - split: train
    path: {file}
---

# Parity set {train_json.stem}

{n} questions about images. A large vision-language model (L-VLM) wrote and answered them; a small one (S-VLM)
answered {which}: {MADE_BY}. No human wrote or checked an answer.

- L-VLM: {lvlm}
- S-VLM: {svlm}
- Run: {train_json.resolve().parent.name}
- Funnel: {funnel}
- Settings: {json.dumps(meta.get("settings", {}), ensure_ascii=False)}

The images keep the licence of their source, and the L-VLM's licence may restrict models trained on its answers.
Set `license` before you publish this dataset.
"""


# --- LLaMA-Factory's registry of datasets


def registry_with(data: Path) -> dict:
    """The content of dataset_info.json in the folder of `data`, with an entry for `data` added.

    Raises InputError if the file is broken or has a different entry with that name.
    """
    path = data.with_name("dataset_info.json")
    info = records.read_json(path) if path.exists() else {}
    if not isinstance(info, dict):
        raise InputError(
            f"{path}: should map dataset names to entries, as LLaMA-Factory reads it; fix it or move it away."
        )
    columns = {"messages": "conversations", "images": "images"}
    entry = {"file_name": data.name, "formatting": "sharegpt", "columns": columns}
    if info.get(data.stem, entry) != entry:
        raise InputError(f"{path}: already has another dataset named {data.stem!r}; choose another file with --out.")
    return info | {data.stem: entry}
