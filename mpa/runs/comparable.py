"""What may be compared: the one place that decides it, for tables, guard, diagnosis, report, checks and `evaluate.py --compare`.

Two evaluations are compared on the questions that both asked and both have a usable reply to, if all that decides a score but the
model is equal: dataset, preset, limits of the images, the questions and the right answers. What differs is named.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpa.answers import paired
from mpa.answers.metrics import most_common
from mpa.answers.normalise import normalise
from mpa.files.journal import differences
from mpa.files.records import InputError
from mpa.runs import scoring
from mpa.runs.evaluations import Evaluation

# Of the questions that both were asked, without a usable reply from both. Above it the others may be of another kind, since what
# fails is no random choice, and nothing is said.
MOST_UNUSABLE = 0.10
# Settings that decide what an evaluation asks and how it scores.
SAME = ("dataset", "preset", "min_pixels", "max_pixels")
SAME_FOR_ONE_MODEL = (*SAME, "max_tiles", "max_new_tokens")  # those of two families of models may need to differ
NAMED = ("max_tiles", "max_new_tokens", "dtype")  # where they differ and need not be equal, a note says so


class NotComparable(InputError):
    """Two evaluations say nothing about the difference of their models. The message names both and what differs."""


@dataclass(frozen=True)
class Pairs:
    """The questions that both evaluations asked: the places in each [n] of those with a usable reply from both, and how many
    have none. `notes` say what else is not compared, or differs.
    """

    before: Evaluation
    after: Evaluation
    places: tuple[np.ndarray, np.ndarray]
    unusable: int
    notes: list[str]

    @property
    def asked(self) -> int:
        return len(self.places[0]) + self.unusable

    @property
    def no_verdict(self) -> str:
        """Why nothing can be said, "" if something can."""
        if self.unusable <= MOST_UNUSABLE * self.asked:
            return ""
        share, most = (f"{100 * part:.0f} %" for part in (self.unusable / self.asked, MOST_UNUSABLE))
        return f"{self.unusable} of {self.asked} questions have no usable reply from one of both ({share}, more than {most}): errors, or cut"

    @property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """By the headline metric, before and after, of each question [n]."""
        return self.before.scores[self.places[0]], self.after.scores[self.places[1]]

    @cached_property
    def gains(self) -> np.ndarray:
        """after - before, of each question [n]."""
        before, after = self.scores
        return after - before

    @property
    def images(self) -> list[Hashable]:
        """The image of each question [n]."""
        return images_of([self])[0]

    @property
    def records(self) -> list[tuple[dict, dict]]:
        """(before, after) of each question [n]."""
        return [(self.before.records[i], self.after.records[j]) for i, j in zip(*self.places, strict=True)]

    def of(self, chosen: np.ndarray) -> "Pairs":
        """Those of the questions [n] that are chosen."""
        return Pairs(self.before, self.after, tuple(places[chosen] for places in self.places), 0, [])

    def summary(self) -> dict:
        """`paired.summary` of the gains."""
        return paired.summary(self.gains, self.images)

    def by_metric(self, names: Iterable[str]) -> dict:
        """{metric: `paired.summary` of after - before}, from the records."""
        sides, images, found = list(zip(*self.records, strict=True)), self.images, {}
        for name in names:
            was, now = (np.array(scoring.values(side, name)) for side in sides)
            found[name] = paired.summary(now - was, images)
        return found


def images_of(found: Sequence[Pairs]) -> list[list[Hashable]]:
    """The image of each question, in each of several comparisons: by its content if all say it, else by its path."""
    known = [pairs.after.images for pairs in found]
    hashed = all(hashes is not None for hashes, _ in known)
    return [
        [(hashes if hashed else paths)[place] for place in pairs.places[1].tolist()]
        for pairs, (hashes, paths) in zip(found, known, strict=True)
    ]


def interval(found: Sequence[Pairs]) -> tuple[float, float]:
    """`paired.interval` of the mean gain over several comparisons, such as those of several seeds."""
    return paired.interval(*zip([pairs.gains for pairs in found], images_of(found), strict=True))


def compare(before: Evaluation, after: Evaluation, one_model: bool = True) -> Pairs:
    """What two evaluations say about the difference of their models. Raises NotComparable if that is nothing.

    `one_model`: one S-VLM, before and after a training or after two. Else they may be of other families.
    """
    found = pairs(before, after, one_model)
    if found.no_verdict:
        raise NotComparable(f"{_both(before, after)}: {found.no_verdict}. Repeat the evaluation.")
    return found


def pairs(before: Evaluation, after: Evaluation, one_model: bool = True) -> Pairs:
    """As `compare`, but it may be that too few replies are usable (`Pairs.no_verdict`)."""
    notes = _settings(before, after, one_model)
    for one in (before, after):
        if one.retrained:
            changed = f"{one.path}: the weights of {one.model} have changed since it gave these answers."
            if one_model:
                raise NotComparable(f"{changed} Evaluate it again, with --restart.")
            notes.append(changed)
    places, other_images = same_questions(before, after)
    usable = before.usable[places[0]] & after.usable[places[1]]
    if other_images:
        notes.append(f"{other_images} questions are about images that have changed in between: not compared.")
    if lost := int((~usable).sum()):
        notes.append(f"{lost} of {len(usable)} questions have no usable reply from one of both: not compared.")
    only = [len(one.scores) - len(usable) - other_images for one in (before, after)]
    if any(only):
        notes.append(
            f"Gain and n: of {len(usable)} questions that both evaluations asked; {only[0]} are only in {before.path.name} and "
            f"{only[1]} only in {after.path.name}."
        )
    return Pairs(before, after, (places[0][usable], places[1][usable]), lost + other_images, notes)


def _both(before: Evaluation, after: Evaluation) -> str:
    return f"{after.path} against {before.path}"


def _settings(before: Evaluation, after: Evaluation, one_model: bool) -> list[str]:
    """Notes on settings. Raises NotComparable if those differ that must not."""
    old, new = (one.meta["settings"] for one in (before, after))
    if unknown := [one.path.name for one in (before, after) if "model" not in one.meta["settings"]]:
        return [f"No meta file says how {' and '.join(unknown)} was made: settings are not compared."]
    same = SAME_FOR_ONE_MODEL if one_model else SAME
    if old.get("max_tiles") and new.get("max_tiles"):
        same = (*same, "max_tiles")
    if wrong := _differing(old, new, same):
        raise NotComparable(f"{_both(before, after)}: {wrong}. Evaluate both with the same settings.")
    named = _differing(old, new, [name for name in NAMED if name not in same])
    return [f"{_both(before, after)}: {named}."] if named else []


def _differing(old: dict, new: dict, names: Iterable[str]) -> str:
    return differences(*({name: settings.get(name) for name in names} for settings in (old, new)))


def same_questions(before: Evaluation, after: Evaluation) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """The places in both of the questions that both asked about the same image; and how many are about a changed image.

    Raises NotComparable if there is none, and where one id means two questions or has other right answers.
    """
    content = [one.meta["settings"].get("content") for one in (before, after)]
    if content[0] and content[0] == content[1] and len(before.scores) == len(after.scores):
        places = np.arange(len(after.scores))  # the same questions in the same order
        return (places, places), 0
    at = [{str(r["question_id"]): i for i, r in enumerate(one.records)} for one in (before, after)]
    both, changed = [key for key in at[1] if key in at[0]], 0
    if not both:
        raise NotComparable(f"{_both(before, after)}: they share no question. Evaluate both on the same questions.")
    kept, questions, answers = [], [], []
    for key in both:
        a, b = (one.records[places[key]] for one, places in zip((before, after), at, strict=True))
        if normalise(a["GT_question"]) != normalise(b["GT_question"]):
            questions.append((a, b))
        elif _right(a) != _right(b):
            answers.append((a, b))
        if a.get("image_hash") and b.get("image_hash") and a["image_hash"] != b["image_hash"]:
            changed += 1
        else:
            kept.append(key)
    for what, found in (("questions", questions), ("right answers", answers)):
        if found:
            told = [(r["GT_question"] if found is questions else _told(scoring.answers_of(r))) for r in found[0]]
            verb = "is" if found is questions else "has the answers"
            raise NotComparable(
                f"{_both(before, after)}: question {found[0][0]['question_id']!r} {verb} {told[0]!r} in the one file and {told[1]!r} in "
                f"the other: these are not the same {what} ({len(found)} of {len(both)} differ). Evaluate both with one file of "
                "questions and answers; for existing results name it with --annotations."
            )
    return tuple(np.array([places[key] for key in kept], dtype=int) for places in at), changed


def _right(record: dict) -> tuple[list[str], str]:
    """What of the right answers decides a score."""
    answers = scoring.answers_of(record)
    return sorted(answers), most_common(answers)


def _told(answers: list[str]) -> str:
    """The answers for a message: ten equal ones are one answer given ten times."""
    counts = Counter(answers).most_common()
    return ", ".join(f"{answer[:40]} ({n} times)" if n > 1 else answer[:40] for answer, n in counts[:3])


@dataclass(frozen=True)
class Change:
    """One test question before and after."""

    question_id: str
    image_path: str
    question: str
    answers: list[str]
    before: str | None
    after: str | None
    score_before: float
    score_after: float
    usable: bool = True  # both replies

    @property
    def kind(self) -> str:
        """Right is a score above 0.5."""
        if not self.usable:
            return "no usable reply"
        if self.score_before > 0.5:
            return "still right" if self.score_after > 0.5 else "broken"
        return "fixed" if self.score_after > 0.5 else "still wrong"


def changes(before: Evaluation, after: Evaluation) -> list[Change]:
    """Each question that both were asked, with its scores by the headline metric. Raises as `same_questions`."""
    places, _ = same_questions(before, after)
    found = []
    for i, j in zip(*places, strict=True):
        was, now = before.records[i], after.records[j]
        answers = was.get("answers") or [was["GT_answer"]]
        said, scores = (was["predictions"], now["predictions"]), (float(before.scores[i]), float(after.scores[j]))
        usable = bool(before.usable[i] and after.usable[j])
        image, question = was["image_path"] or "", was["GT_question"] or ""
        found.append(Change(str(was["question_id"]), image, question, answers, *said, *scores, usable))
    return found
