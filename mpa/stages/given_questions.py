"""Questions that the user gives for the held-out images, without answers: the guard then measures what will be asked.

The L-VLM answers them; an answer of the S-VLM is right if it agrees. Its own questions can be distributed otherwise than those
that matter, and then the guard's figures are about other questions (docs/no-harm.md).
"""

import os
import random
from collections import Counter
from pathlib import Path

from mpa.answers.finish_reasons import why_cut
from mpa.data.loading import train_labels
from mpa.data.paths import inside, moved
from mpa.files import distributed, records
from mpa.files.records import InputError, read_json
from mpa.method import holdout
from mpa.stages import further
from mpa.stages.answering import Answers, Question, question_request
from mpa.stages.stage import run_files

TRAIN = "train"  # instead of a file: the questions of the dataset's train split
ID = "given-{}"  # the question ids, by the place in the file or split


def read(source: str, dataset: str, image_root: str | None, path_map: dict[str, str]) -> list[dict]:
    """[{"question_id", "image_path", "question"}] of a JSON list of {"image", "question"}, or of the train split.

    Images are relative to `image_root`, by default to the file's folder. Raises InputError for anything else in the file.
    """
    if source == TRAIN:
        found = [(s.image_path, s.question) for s in train_labels(dataset)]
        if not found:
            raise InputError(
                f"--held-out-questions train: {dataset} has no train questions here. Name a file of yours."
            )
    else:
        found = _of_file(Path(source), image_root, path_map)
    return [
        {"question_id": ID.format(i), "image_path": path, "question": question}
        for i, (path, question) in enumerate(found)
    ]


def _of_file(file: Path, image_root: str | None, path_map: dict[str, str]) -> list[tuple[str, str]]:
    if not file.exists():
        raise InputError(f"{file}: no such file. Give a JSON list of {{image, question}}, or `train`.")
    content, root = read_json(file), os.path.abspath(image_root or file.parent)
    if not isinstance(content, list) or not content:
        raise InputError(f"{file}: contains no questions; expected a list of {{image, question}}.")
    found = []
    for index, record in enumerate(content):
        image, question = (record.get(name) if isinstance(record, dict) else None for name in ("image", "question"))
        if not (isinstance(image, str) and image and isinstance(question, str) and question.strip()):
            raise InputError(f"{file}, record {index}: expected {{image, question}}, both text: {str(record)[:80]}")
        path = moved(image, path_map)
        try:
            found.append((inside("/" if os.path.isabs(path) else root, path), question))
        except InputError as error:
            raise InputError(f"{file}, record {index}: {error}") from None
    return found


def about_held_out_images(questions: list[dict], threshold: str, seed: int, most: int) -> list[dict]:
    """Those about held-out images, each with its `image_hash`; of more than `most` a random choice, about as many images as possible.

    The guard's interval counts images: several questions about one tell less than as many about others.
    """
    hashes = holdout.hashes(r["image_path"] for r in questions)
    found = [r | {"image_hash": hashes[r["image_path"]]} for r in questions]
    found = [r for r in found if holdout.is_held_out(r["image_hash"], threshold)]
    before, ranked = Counter(), []
    for place in random.Random(seed).sample(range(len(found)), len(found)):
        ranked.append((before[found[place]["image_hash"]], place))
        before[found[place]["image_hash"]] += 1
    chosen = sorted(ranked, key=lambda pair: pair[0])[:most]  # first one question about each image, then a second …
    return [found[place] for place in sorted(place for _, place in chosen)]


def of(args) -> list[dict] | None:
    """The given questions; None if none are given. Raises InputError as `read`."""
    return args.held_out_questions and read(args.held_out_questions, args.dataset, args.image_root, args.path_map)


def about(args, given: list[dict], threshold: str) -> tuple[list[dict], Answers]:
    """(those of the given questions that are about held-out images, the L-VLM's answers). Raises InputError if there are none."""
    chosen = about_held_out_images(given, threshold, args.seed, args.max_held_out_questions)
    if not chosen:
        raise InputError(
            f"--held-out-questions {args.held_out_questions}: none of its {len(given):,} questions is about a held-out image of this "
            "run. Ask about more images, or hold out more (--hold-out)."
        )
    questions = []
    for r in chosen:
        key = r["question_id"]
        request = question_request(args, key, r["image_path"], r["question"])
        before = {"question_id": key, "image_path": r["image_path"], "PA_question": r["question"], "PA_answer": ""}
        questions.append(Question(request, before))
    return chosen, further.answers(args, "given", questions)


def write(args, given: list[dict], chosen: list[dict], stage: Answers) -> None:
    """Ask the L-VLM the chosen ones of the given questions, and write them with its answers as a second held-out set."""
    answers, by_key = stage.ask(), {r["question_id"]: r for r in chosen}
    kept = [r for r in answers if r["predictions"] and not r["left_out"] and not why_cut(r.get("finish_reason"))]
    file = run_files(args).held_out_given
    if distributed.FIRST:
        test = [by_key[r["question_id"]] | {"answers": [r["predictions"]]} for r in kept]
        records.write_json(file, test)
    print(f"PI: the guard will ask {len(kept):,} of {len(given):,} given questions, about held-out images.")
