"""The parity set in the form that another trainer reads.

    python scripts/export.py results/RUN/PI_…_train_….json --to ms-swift
    python scripts/export.py results/RUN/PI_…_train_….json --to hf --out parity-set

Reads  a parity set, or any train JSON of that form (id, image, conversations).
Writes beside it, or to --out:
  llava      one JSON list with `image`, as LLaVA and Qwen2-VL-Finetune read it: the parity set's own form
  sharegpt   one JSON list with `images`, as LLaMA-Factory reads it, and its dataset_info.json
  ms-swift   JSON lines of `messages` and `images`
  trl        a data set folder of `prompt`, `completion` and `images`, the pictures inside: SFTTrainer's vision form
  hf         a data set folder of `id`, `image`, `question` and `answer`, the pictures inside, with a data card
The folders load with `datasets.load_dataset(folder)`.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpa import cli, records
from mpa.datasets import locate, look_for_pictures
from mpa.records import InputError

MARK = "<image>"


def turns(sample: dict) -> list[tuple[str, str]]:
    """("user" or "assistant", text) in turn; the first user's text has the <image> mark."""
    return [({"human": "user", "gpt": "assistant"}[t["from"]], t["value"]) for t in sample["conversations"]]


def sharegpt(sample: dict) -> dict:
    return {"id": sample["id"], "conversations": sample["conversations"], "images": [sample["image"]]}


def ms_swift(sample: dict) -> dict:
    messages = [{"role": role, "content": text.replace(f"{MARK}\n", MARK)} for role, text in turns(sample)]
    return {"messages": messages, "images": [sample["image"]]}


def trl(sample: dict) -> dict:
    """All turns but the last are the prompt. As many image parts as images."""

    def content(text: str) -> list[dict]:
        words = {"type": "text", "text": text.replace(MARK, "").strip("\n")}
        return [{"type": "image", "text": None}, words] if MARK in text else [words]

    messages = [{"role": role, "content": content(text)} for role, text in turns(sample)]
    return {"prompt": messages[:-1], "completion": messages[-1:], "images": [sample["image"]]}


def question_and_answer(sample: dict) -> dict:
    (_, question), (_, answer), *_ = turns(sample)
    question = question.replace(MARK, "").strip("\n")
    return {"id": str(sample["id"]), "image": sample["image"], "question": question, "answer": answer}


def write_folder(folder: Path, samples: list[dict], form, card: str) -> None:
    """A data set folder: data/train-….parquet with the pictures inside, and README.md, the data card."""
    from datasets import Dataset, Features, Image, List, Value, disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    text = Value("string")
    message = List({"role": text, "content": List({"type": text, "text": text})})
    features = {
        trl: Features({"prompt": message, "completion": message, "images": List(Image())}),
        question_and_answer: Features({"id": text, "image": Image(), "question": text, "answer": text}),
    }[form]

    def embedded(path: str) -> dict:
        return {"bytes": Path(path).read_bytes(), "path": Path(path).name}

    def rows() -> Iterator[dict]:
        for sample in samples:
            row = form(sample)
            if "image" in row:
                yield row | {"image": embedded(row["image"])}
            else:
                yield row | {"images": [embedded(path) for path in row["images"]]}

    (folder / "data").mkdir(parents=True, exist_ok=True)
    part = folder / "data/train-00000-of-00001.parquet"
    temporary = part.with_name(f".{part.name}")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        Dataset.from_generator(rows, features=features, cache_dir=cache).to_parquet(temporary)
    os.replace(temporary, part)
    records.write_text(folder / "README.md", card)


def data_card(train_json: Path, samples: list[dict]) -> str:
    """What the data set is and how it was made, from the parity set's meta file."""
    meta = records.meta_path(train_json)
    made = records.read_json(meta) if meta.exists() else {}
    funnel = " → ".join(f"{n} {what}" for what, n in made.get("funnel", {}).items()) or "not known"
    lvlm, svlm = (records.short_name(made.get(f"model_path_{which}", "not known")) for which in ("lvlm", "svlm"))
    return f"""---
task_categories:
- visual-question-answering
license: other
size_categories:
- {"n<1K" if len(samples) < 1000 else "1K<n<10K" if len(samples) < 10_000 else "10K<n<100K"}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
---

# Parity set {train_json.stem}

{len(samples)} questions about pictures, written and answered by a large vision-language model (L-VLM), of which a small
one (S-VLM) got each wrong: Model Parity Alignment (arXiv 2509.16633). No person has written or checked an answer.

- L-VLM: {lvlm}
- S-VLM: {svlm}
- Funnel: {funnel}
- Settings: {json.dumps(made.get("settings", {}), ensure_ascii=False)}

The pictures keep the terms of where they come from, and the L-VLM's licence may bind what is trained on its answers:
set `license` before you publish this.
"""


FORMS = {"llava": dict, "sharegpt": sharegpt, "ms-swift": ms_swift, "trl": trl, "hf": question_and_answer}


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("train_json", type=Path, help="the parity set")
    p.add_argument("--to", choices=FORMS, default="llava", help="(default: llava)")
    p.add_argument("--out", type=Path, help="file or folder to write (default: beside the parity set)")
    p.add_argument("--image-root", metavar="DIR", help="look for the pictures below this folder")
    p.add_argument(
        "--path-map", type=cli.path_map, action="append", default=[], metavar="OLD=NEW", help="moved pictures"
    )
    args = p.parse_args(argv)
    samples = records.read_records(args.train_json, "train")
    if not samples:
        raise InputError(f"{args.train_json}: no samples in it.")
    paths = locate([s["image"] for s in samples], dict(args.path_map), args.image_root)
    samples = [s | {"image": path} for s, path in zip(samples, paths, strict=True)]
    folder = args.to in ("trl", "hf")
    out = args.out or args.train_json.with_name(f"{args.train_json.stem}_{args.to}" + ("" if folder else ".json"))
    if args.to == "ms-swift" and not args.out:
        out = out.with_suffix(".jsonl")
    if out == args.train_json:
        raise InputError(f"{out}: is what is read; name another file with --out.")
    missing = look_for_pictures([s["image"] for s in samples])
    if missing and folder:
        raise InputError(f"{missing[0]}: no such picture, nor {len(missing) - 1} others; a folder holds them all.")
    if folder:
        write_folder(out, samples, FORMS[args.to], data_card(args.train_json, samples))
    elif args.to == "ms-swift":
        records.write_text(out, "".join(json.dumps(ms_swift(s), ensure_ascii=False) + "\n" for s in samples))
    else:
        records.write_json(out, [FORMS[args.to](s) for s in samples])
        if args.to == "sharegpt":
            columns = {"messages": "conversations", "images": "images"}
            info = {out.stem: {"file_name": out.name, "formatting": "sharegpt", "columns": columns}}
            records.write_json(out.with_name("dataset_info.json"), info)
    print(f"{len(samples)} samples, wrote {out}.")


if __name__ == "__main__":
    cli.run(main)
