"""Run folders with the files of the four stages, without a model: the fields that evaluate.py, PI.py and the trainer write."""

import json
from pathlib import Path

from mpa.files import records
from mpa.runs import scoring

EVALUATE = {"limit": None, "sample": None, "preset": "paper", "dtype": "float32", "max_new_tokens": 128}
PL = {"num_train_epochs": 1.0, "learning_rate": 1e-5, "per_device_train_batch_size": 2, "world_size": 1}


def write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", "utf-8", errors="backslashreplace")


def evaluation(folder: Path, model: str, dataset: str, right: list[int], /, seed=0, ids=None, **changed) -> Path:
    """An Eval file in which question i is answered correctly if right[i], and its meta file. Returns its path."""
    out = folder / f"Eval_{records.short_name(model)}_{dataset}.json"
    ids = list(range(len(right))) if ids is None else ids
    names, found = scoring.metric_names(dataset), []
    for i, is_right in zip(ids, right, strict=True):
        answer = f"word {i}"
        record = {
            "question_id": i,
            "image_path": f"/images/{i}.png",
            "GT_question": f"what is {i}?",
            "GT_answer": answer,
        }
        record |= {
            "predictions": answer if is_right else "no",
            "answers": [answer] * 10,
            "left_out": None,
            "logprob": -1.0,
        }
        found.append(record | {"scores": {name: scoring.values([record], name)[0] for name in names}})
    settings = EVALUATE | {"dataset": dataset, "seed": seed, "model": f"{records.short_name(model)}@0", **changed}
    settings["content"] = records.digest(json.dumps(ids))
    meta = {"settings": settings, "model_path": model, "unfinished": 0, "seconds": 1.0, "n": len(found)}
    write(records.meta_path(out), meta | {"scores": scoring.score(found, dataset)})
    write(out, found)
    return out


def parity(folder: Path, dataset: str, lvlm: str, svlm: str, samples: int, parsed: int, **changed) -> Path:
    """A parity set's meta file, with the funnel. Returns the path that the parity set has."""
    lvlm_name, svlm_name = records.short_name(lvlm), records.short_name(svlm)
    out = folder / f"PI_{lvlm_name}_train_{lvlm_name}_{svlm_name}_{dataset}.json"
    meta = {"settings": {"preset": "paper", "match": "exact", "hold_out": 0.0, **changed}, "n": samples}
    meta |= {"model_path_lvlm": lvlm, "model_path_svlm": svlm}
    write(records.meta_path(out), meta | {"funnel": {"pictures": parsed, "parsed": parsed, "parity": samples}})
    return out


def trained(
    folder: Path, dataset: str, lvlm: str, svlm: str, right: list[int], samples: int, seed=0, variant="mpa", **more
) -> Path:
    """A trained S-VLM's train_meta.json and its evaluation. Returns the Eval file's path."""
    name = f"PL_{records.short_name(lvlm)}_{records.short_name(svlm)}_{dataset}" + (
        "" if variant == "mpa" else f"_{variant}"
    )
    pl, changed = more.pop("pl", {}), more
    write(
        folder / name / "train_meta.json", {"settings": PL | {"seed": seed, "model_id": svlm} | pl, "samples": samples}
    )
    return evaluation(folder, str(folder / name), dataset, right, seed, **changed)


def run(folder: Path, dataset: str, lvlm: str, svlm: str, before: list[int], after: list[int], seed=0, **more) -> None:
    """A run folder with one pair: parity set, S-VLM before, and MPA. `pl` are settings of the training."""
    parity(folder, dataset, lvlm, svlm, samples=sum(after), parsed=10 * sum(after))
    evaluation(folder, svlm, dataset, before, seed)
    trained(folder, dataset, lvlm, svlm, after, sum(after), seed, **more)
