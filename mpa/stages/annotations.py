"""The annotations of a PA file as PI takes them: which can be used, and which already have the L-VLM's own answer."""

from collections import Counter
from pathlib import Path

from mpa.answers.replies import without_end_tokens
from mpa.data.paths import locate
from mpa.files import records
from mpa.files.image_files import fingerprints
from mpa.method.presets import PRESETS
from mpa.method.prompts import A_MARK, holds_mark, parse_annotation, with_question_mark
from mpa.stages.stage import AskedModel


def answers_of_pa(args, pa_json: Path, annotations: list[dict]) -> tuple[dict[str, dict], Counter]:
    """(the L-VLM's answers that PA already has, by id; a count of the reasons why others must be asked).

    An answer is reused if everything that determines it is the same: model, preset, limits of the image, max_new_tokens,
    question, image, and for a local model the dtype.
    """
    meta = records.read_json(records.meta_path(pa_json)) if records.meta_path(pa_json).exists() else {}
    pa_settings = meta.get("settings", {}) if isinstance(meta, dict) else {}
    model = AskedModel(args, args.model_path_lvlm)
    now = {name: getattr(args, name) for name in ("preset", "max_new_tokens", "min_pixels", "max_pixels")}
    now |= {"quantization": None, "max_tiles": None, "request_json": None} | model.deciding()
    if not model.local:
        del now["dtype"]
    differing = [name for name, value in now.items() if pa_settings.get(name) != value]
    ready, why = {}, Counter()
    for r in annotations:
        follow_up = r.get("follow_up") or {}
        if not pa_settings or not r.get("reply"):
            why["PA did not ask them"] += 1
        elif differing:
            why[f"PA asked with another {', '.join(differing)}"] += 1
        elif "text" not in follow_up:
            why["PA did not get an answer" if follow_up else "PA did not ask them"] += 1
        # Users may edit these files: the question must still be the one that the L-VLM answered.
        elif parse_annotation(r["reply"], args.preset, keep_refusals=True).question != r["predicted_question"]:
            why["the question was edited"] += 1
        else:
            ready[str(r["question_id"])] = follow_up
    return ready, why


def usable_annotations(annotations: list[dict], args, marks=frozenset()) -> tuple[list[dict], dict[str, str]]:
    """(the PA records with a question and an answer, with the current paths of their images; {id: why another cannot be used}).

    One with one of the prompt format's `marks` cannot be used, nor one whose image has changed since PA.
    The released code's records (without `reply`) lack the question mark; under `paper` it is restored.
    """
    usable, left_out = [], {}
    paths = locate([r["image_path"] for r in annotations], args.path_map, args.image_root)
    images = fingerprints(path for r, path in zip(annotations, paths, strict=True) if r.get("image_hash"))
    for r, path in zip(annotations, paths, strict=True):
        question, answer = r["predicted_question"], without_end_tokens(r["predicted_answer"] or "")
        if not (question and answer):
            continue
        if PRESETS[args.preset].checked and "reply" not in r:
            question = with_question_mark(question)
        if holds_mark(f"{question}\n{answer}", marks):
            left_out[str(r["question_id"])] = A_MARK
        elif images.get(path) and images[path][1] != r["image_hash"]:
            left_out[str(r["question_id"])] = "the image has changed since PA"
        else:
            usable.append(r | {"image_path": path, "predicted_question": question, "predicted_answer": answer})
    return usable, left_out
