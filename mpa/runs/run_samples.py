"""The annotated samples of a run with PI's verdict on each, and what changed between two evaluations."""

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mpa.answers.finish_reasons import canonical
from mpa.answers.matching import MATCHERS
from mpa.data import DATASETS
from mpa.files import records
from mpa.files.records import RELEASED_ALIAS, InputError
from mpa.method.presets import PRESETS
from mpa.method.prompts import Annotation
from mpa.method.rules.caps import Caps
from mpa.method.verdict import (
    HELD_OUT,
    LVLM_FAILED,
    NOT_ASKED,
    PARITY,
    REASONS,
    SVLM_FAILED,
    Judge,
    Verdict,
)
from mpa.runs import comparable
from mpa.runs.evaluations import Evaluation, read_meta
from mpa.runs.judging import annotation_of, judge_of
from mpa.runs.layout import Cell, RunFiles, reasons_path

NOT_REACHED = "not reached yet"  # of a run that is not finished
CHANGES = ("fixed", "broken", "still wrong", "still right", "no usable reply")


@dataclass(frozen=True)
class Sample:
    """An annotated image. ``reason` is PI's verdict, one of `verdict.REASONS` or NOT_REACHED; `detail` says more. Answers not given are None.

    `consistent`: does the L-VLM agree with itself? None if it was not asked. `cut`: was its answer truncated?
    """

    question_id: str
    image_path: str
    question: str | None
    annotation: str | None
    lvlm_answer: str | None
    svlm_answer: str | None
    reason: str
    detail: str
    consistent: bool | None
    cut: bool
    ground_truth_question: str | None
    ground_truth: list[str] | None
    annotation_logprob: float | None
    lvlm_logprob: float | None
    svlm_logprob: float | None

    @property
    def kept(self) -> bool:
        return self.reason == PARITY

    @property
    def rejected(self) -> bool:
        """PI has judged it and not kept it. A held-out sample is neither kept nor rejected."""
        return self.reason not in (PARITY, HELD_OUT, NOT_REACHED)


class RunSamples:
    """The files of one cell in a run folder; those that do not exist yet are empty.

    Raises InputError if there is no PA file and no answers of the L-VLM, or if a file is broken.
    """

    def __init__(self, folder: Path, cell: Cell, ending: str = ""):
        """`ending` is that of another parity set of the cell, such as `_anls`."""
        self.folder, self.cell = folder, cell
        lvlm, svlm, dataset = cell.lvlm, cell.svlm, cell.dataset
        self.pa_json = self._file("PA_", f"_{dataset}.json")
        self.train_json = self._file("PI_", f"_train_{lvlm}_{svlm}_{dataset}{ending}.json")
        self.answers_json = {model: self._file("PI_", f"_{model}_{dataset}.json") for model in (lvlm, svlm)}
        if not self.pa_json.exists() and not self.answers_json[lvlm].exists():
            raise InputError(f"{self.pa_json}: no such file. Run PA.sh first, or name another run.")

    def _file(self, stage: str, rest: str) -> Path:
        """A stage's file with the L-VLM's name, or with the alias that the released files have for it."""
        names = [self.cell.lvlm, RELEASED_ALIAS.get(self.cell.lvlm, self.cell.lvlm)]
        files = [self.folder / f"{stage}{name}{rest}" for name in names]
        return files[0] if files[0].exists() else files[1] if files[1].exists() else files[0]

    @cached_property
    def meta(self) -> dict:
        """The parity set's meta file, {} without one."""
        file = records.meta_path(self.train_json)
        return read_meta(file) if file.exists() else {}

    @property
    def missing(self) -> list[Path]:
        """The files of PA and PI that are not there."""
        files = (self.pa_json, *self.answers_json.values(), self.train_json)
        return [f for f in files[: 4 if self.cell.svlm else 2] if not f.exists()]

    @cached_property
    def judge(self) -> Judge:
        """That of the parity set's meta file. Files without one are the released code's, if they have its alias."""
        settings, alias = self.meta.get("settings", {}), RELEASED_ALIAS.get(self.cell.lvlm)
        released = not self.meta and alias and self.answers_json[self.cell.lvlm].name.startswith(f"PI_{alias}_")
        preset = settings.get("preset", "released" if released else "paper")
        match = settings.get("match", PRESETS[preset].match if preset in PRESETS else None)
        if preset not in PRESETS or match not in MATCHERS:
            raise InputError(f"{records.meta_path(self.train_json)}: unknown preset {preset!r} or matcher {match!r}.")
        return judge_of(settings | {"match": match, "preset": preset}, RunFiles(self.folder, self.cell))

    @cached_property
    def _stored(self) -> dict[str, Verdict]:
        """PI's verdicts by id, as far as they are of the train file that is there; {} for a run without them."""
        file = reasons_path(self.train_json)
        if not (file.exists() and self.train_json.exists()):
            return {}
        found = {str(r["question_id"]): Verdict(r["reason"], r["detail"]) for r in read_reasons(file)}
        kept = {key for key, verdict in found.items() if verdict.reason == PARITY}
        return found if kept == self._kept else {}

    @cached_property
    def _kept(self) -> set[str] | None:
        """The ids of the parity set, None before PI has written it."""
        return {str(r["id"]) for r in records.read_parity(self.train_json)} if self.train_json.exists() else None

    def _answers(self, model: str) -> dict[str, dict]:
        file = self.answers_json[model]
        return {str(r["question_id"]): r for r in records.read_records(file, "PI")} if file.exists() else {}

    @cached_property
    def annotations(self) -> list[dict]:
        """PA's records; without a PA file, those that PI's answers hold."""
        if self.pa_json.exists():
            return records.read_records(self.pa_json, "PA")
        return [
            {**r, "predicted_question": r["PA_question"], "predicted_answer": r["PA_answer"]}
            for r in self._answers(self.cell.lvlm).values()
        ]

    @cached_property
    def held_out(self) -> set[str]:
        """The ids of the held-out samples."""
        name = self.meta.get("held_out")
        return {str(r["question_id"]) for r in records.read_json(self.folder / name)} if name else set()

    @cached_property
    def samples(self) -> list[Sample]:
        """One for each record of PA, in its order."""
        lvlm, svlm = (self._answers(model) for model in (self.cell.lvlm, self.cell.svlm))
        found = []
        for r in self.annotations:
            key = str(r["question_id"])
            of_lvlm, of_svlm = lvlm.get(key), svlm.get(key)
            verdict = self._stored.get(key) or self._verdict(r, of_lvlm, of_svlm)
            truth, asked = r.get("ground_truth_answer"), of_svlm or of_lvlm or {}
            question, annotation = (
                r[f"predicted_{part}"] or asked.get(f"PA_{part}") or ("" if verdict.reason == PARITY else None)
                for part in ("question", "answer")
            )
            found.append(
                Sample(
                    key,
                    asked.get("image_path") or r["image_path"] or "",
                    question,
                    annotation,
                    (of_lvlm or {}).get("predictions"),
                    (of_svlm or {}).get("predictions"),
                    *verdict,
                    None if of_lvlm is None else self._judged(r, of_lvlm, of_svlm).consistent,
                    canonical((of_lvlm or {}).get("finish_reason")) == "length",
                    r.get("ground_truth_question"),
                    None if truth is None else [truth],
                    *(finite(one.get("logprob")) for one in (r, of_lvlm or {}, of_svlm or {})),
                )
            )
        return found

    def _judged(self, pa: dict, lvlm: dict | None, svlm: dict | None) -> Verdict:
        annotation = Annotation(pa["predicted_question"], pa["predicted_answer"])
        if answered := svlm or lvlm:
            annotation = annotation_of(answered)
        held_out = str(pa["question_id"]) in self.held_out
        return self.judge(replace(annotation, left_out=pa.get("left_out")), lvlm, svlm, held_out)

    def _verdict(self, pa: dict, lvlm: dict | None, svlm: dict | None) -> Verdict:
        """Where PI has stored none: what it would say, or has said by the train file that is there."""
        verdict = self._judged(pa, lvlm, svlm)
        if self._kept is None:
            to_come = verdict == Verdict(LVLM_FAILED) or verdict.reason in (NOT_ASKED, PARITY)
            return Verdict(NOT_REACHED, verdict.reason) if to_come else verdict
        if str(pa["question_id"]) in self._kept:
            return Verdict(PARITY)
        if verdict.reason == PARITY:
            capped = {"max_per_question", "max_per_answer"} & self.meta.get("settings", {}).keys()
            return Verdict(Caps.reason) if capped else Verdict(SVLM_FAILED, "not in the parity set")
        return verdict


def read_reasons(file: Path) -> list[dict]:
    """The records that PI wrote beside a train file. Raises InputError for another file."""
    found = records.read_json(file)
    fields = ("question_id", "reason", "detail")
    if not isinstance(found, list) or not all(isinstance(r, dict) and set(fields) <= r.keys() for r in found):
        raise InputError(f"{file}: not the reasons that PI writes; run PI.sh again, or remove it.")
    return found


def finite(value) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def inspected(samples: list, n: int, seed: int) -> list:
    """n random kept and n random rejected samples, as the paper's analysis looks at; the rejected by their reasons."""
    rng, chosen = random.Random(seed), []
    for of_kind in ([s for s in samples if s.kept], [s for s in samples if s.rejected]):
        chosen += sorted(rng.sample(of_kind, min(n, len(of_kind))), key=lambda s: REASONS.index(s.reason))
    return chosen


def task_of(cell: Cell) -> str:
    return DATASETS[cell.dataset].task


@dataclass(frozen=True)
class Change:
    """One test question before and after. `kind` is one of CHANGES; right is a score above 0.5."""

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
        if not self.usable:
            return "no usable reply"
        right = (self.score_before > 0.5, self.score_after > 0.5)
        return {(False, True): "fixed", (True, False): "broken", (False, False): "still wrong"}.get(
            right, "still right"
        )


def changes(before: Evaluation, after: Evaluation) -> list[Change]:
    """Each question that both were asked, with its scores by the headline metric. Raises as `comparable.same_questions`."""
    places, _ = comparable.same_questions(before, after)
    found = []
    for i, j in zip(*places, strict=True):
        was, now = before.records[i], after.records[j]
        answers = was.get("answers") or [was["GT_answer"]]
        said, scores = (was["predictions"], now["predictions"]), (float(before.scores[i]), float(after.scores[j]))
        usable = bool(before.usable[i] and after.usable[j])
        image, question = was["image_path"] or "", was["GT_question"] or ""
        found.append(Change(str(was["question_id"]), image, question, answers, *said, *scores, usable))
    return found
