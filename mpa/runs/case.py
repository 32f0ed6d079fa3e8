"""One cell in one run folder: its samples by PI's verdict, evaluations, training log, and what labels say."""

import contextlib
import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mpa.answers.finish_reasons import canonical
from mpa.answers.matching import MATCHERS, Match
from mpa.answers.normalise import normalise
from mpa.data import DATASETS
from mpa.data.loading import train_labels
from mpa.files import records
from mpa.files.records import RELEASED_ALIAS, InputError
from mpa.method.presets import PRESETS, method_name
from mpa.method.prompts import Annotation
from mpa.method.verdict import (
    HELD_OUT,
    LVLM_FAILED,
    NO_ANNOTATION,
    NOT_ASKED,
    PARITY,
    REASONS,
    Judge,
    Verdict,
    in_order,
)
from mpa.runs.evaluations import Evaluation
from mpa.runs.folders import RunFolder
from mpa.runs.judging import annotation_of, judge_of
from mpa.runs.layout import MPA, Cell, RunFiles, reasons_path

NOT_REACHED = "not reached yet"  # of a run that is not finished


@dataclass(frozen=True)
class JudgedSample:
    """An annotated image. `reason` is PI's verdict, one of `verdict.REASONS` or NOT_REACHED; `detail` says more. Answers not given are None.

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


class Case:
    """The files of one cell in a run folder; those that do not exist yet are empty or None. Raises InputError for a broken one."""

    def __init__(self, folder: Path, cell: Cell):
        self.folder, self.cell, self.files = folder, cell, RunFiles(folder, cell)
        self.task, self.model = DATASETS[cell.dataset].task, self.files.levelled().name
        there, models = self.files.there, (cell.lvlm, cell.svlm)
        self.pa_json, self.train_json = there(self.files.pa), there(self.files.train)
        self.answers_json = {model: there(self.files.answers(model)) for model in models}

    @cached_property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def meta(self) -> dict:
        """The parity set's meta file, {} without one."""
        return self.run.meta(self.train_json)

    @cached_property
    def settings(self) -> dict:
        """Those of PA, and over them of PI, as far as they are known."""
        found = {}
        for file in (self.pa_json, self.train_json):
            with contextlib.suppress(InputError):  # what needs it says so
                found |= self.run.meta(file).get("settings", {})
        return found

    @property
    def method(self) -> str:
        """MPA, or another name if PI added anchors."""
        return method_name(self.meta.get("settings", {}).get("anchors"))

    @property
    def missing(self) -> list[Path]:
        """The files of PA and PI that are not there."""
        files = (self.pa_json, *self.answers_json.values(), self.train_json)
        return [f for f in files[: 4 if self.cell.svlm else 2] if not f.exists()]

    def evaluation(self, model: str, dataset: str | None = None) -> Evaluation | None:
        path = self.files.evaluation(model, dataset)
        return Evaluation.read(path) if path.exists() and records.meta_path(path).exists() else None

    def trained(self, variant: str = MPA) -> dict:
        """What the trainer says of a levelled model, {} if it is not there."""
        return self.run.meta(self.files.levelled(variant))

    @cached_property
    def history(self) -> list[dict]:
        """What the trainer logged, by step; [] if it has not trained or the file is of another kind."""
        path = self.files.levelled() / "trainer_state.json"
        content = records.read_json(path, finite=False) if path.exists() else {}  # transformers writes it
        history = content.get("log_history") if isinstance(content, dict) else None
        history = history if isinstance(history, list) else []
        return [e for e in history if isinstance(e, dict) and isinstance(e.get("step"), int | float)]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.history if isinstance(entry.get("loss"), int | float)]

    @cached_property
    def kept(self) -> list[JudgedSample]:
        return [s for s in self.samples if s.kept]

    @cached_property
    def annotated(self) -> list[JudgedSample]:
        """The samples with a question and an answer."""
        return [s for s in self.samples if s.question and s.annotation and s.reason != NO_ANNOTATION]

    @cached_property
    def usable(self) -> list[JudgedSample]:
        """Those that the L-VLM has answered."""
        return [s for s in self.samples if s.consistent is not None]

    @cached_property
    def consistent(self) -> list[JudgedSample]:
        """Those on which the L-VLM agrees with itself."""
        return [s for s in self.samples if s.consistent]

    @cached_property
    def judge(self) -> Judge:
        """That of the parity set's meta file. Files without one are the released code's, if they have its alias."""
        settings, alias = self.meta.get("settings", {}), RELEASED_ALIAS.get(self.cell.lvlm)
        released = not self.meta and alias and self.answers_json[self.cell.lvlm].name.startswith(f"PI_{alias}_")
        preset = settings.get("preset", "released" if released else "paper")
        match = settings.get("match", PRESETS[preset].match if preset in PRESETS else None)
        if preset not in PRESETS or match not in MATCHERS:
            raise InputError(f"{records.meta_path(self.train_json)}: unknown preset {preset!r} or matcher {match!r}.")
        return judge_of(settings | {"match": match, "preset": preset}, self.files)

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
        """PA's records; without a PA file, those that PI's answers hold. Raises InputError if there is neither."""
        if self.pa_json.exists():
            return records.read_records(self.pa_json, "PA")
        if not self.answers_json[self.cell.lvlm].exists():
            raise InputError(f"{self.pa_json}: no such file. Run PA.sh first, or name another run.")
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
    def samples(self) -> list[JudgedSample]:
        """One for each record of PA, in its order."""
        lvlm, svlm = (self._answers(model) for model in (self.cell.lvlm, self.cell.svlm))
        found = []
        for r in self.annotations:
            key = str(r["question_id"])
            of_lvlm, of_svlm = lvlm.get(key), svlm.get(key)
            stored = self._stored.get(key)
            # The reason of a rule that is no longer there does not say whether the L-VLM agrees with itself.
            known = stored and stored.reason in REASONS
            judged = stored if known else self._judged(r, of_lvlm, of_svlm)
            verdict = stored or self._told(key, judged)
            truth, asked = r.get("ground_truth_answer"), of_svlm or of_lvlm or {}
            question, annotation = (
                r[f"predicted_{part}"] or asked.get(f"PA_{part}") or ("" if verdict.reason == PARITY else None)
                for part in ("question", "answer")
            )
            found.append(
                JudgedSample(
                    key,
                    asked.get("image_path") or r["image_path"] or "",
                    question,
                    annotation,
                    (of_lvlm or {}).get("predictions"),
                    (of_svlm or {}).get("predictions"),
                    *verdict,
                    None if of_lvlm is None else judged.consistent,
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

    def _told(self, key: str, verdict: Verdict) -> Verdict:
        """Where PI has stored none: what it would say, or has said by the train file that is there."""
        if self._kept is None:
            to_come = verdict == Verdict(LVLM_FAILED) or verdict.reason in (NOT_ASKED, PARITY)
            return Verdict(NOT_REACHED, verdict.reason) if to_come else verdict
        if key in self._kept:
            return Verdict(PARITY)
        return self.judge.not_selected if verdict.reason == PARITY else verdict


def read_reasons(file: Path) -> list[dict]:
    """The records that PI wrote beside a train file. Raises InputError for another file."""
    found = records.read_json(file)
    fields = ("reason", "detail")
    if not isinstance(found, list) or not all(
        isinstance(r, dict) and "question_id" in r and all(isinstance(r.get(name), str) for name in fields)
        for r in found
    ):
        raise InputError(f"{file}: not the reasons that PI writes; run PI.sh again, or remove it.")
    return found


def finite(value) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def inspected(samples: list, n: int, seed: int) -> list:
    """n random kept and n random rejected samples, as the paper's analysis looks at; the rejected by their reasons."""
    rng, chosen = random.Random(seed), []
    for of_kind in ([s for s in samples if s.kept], [s for s in samples if s.rejected]):
        chosen += in_order(rng.sample(of_kind, min(n, len(of_kind))), lambda s: s.reason)
    return chosen


def _labelled(case: Case) -> dict[tuple[str, str], list[str]]:
    """{(image's file name, normalised question): answers} of the dataset's train questions, and of the PA file's."""
    labels = train_labels(case.cell.dataset)
    known = {(Path(s.image_path).name, normalise(s.question)): list(s.answers) for s in labels}
    for s in case.samples:
        if s.ground_truth_question and s.ground_truth:
            known[Path(s.image_path).name, normalise(s.ground_truth_question)] = s.ground_truth
    return known


def checked_against_labels(case: Case, samples: list[JudgedSample]) -> list[tuple[JudgedSample, bool]]:
    """(sample, whether its annotation is right) for those whose question a label of the same image answers."""
    known, match = _labelled(case), Match("tolerant")
    found = []
    for s in samples:
        answers = known.get((Path(s.image_path).name, normalise(s.question)))
        if answers:
            found.append((s, any(match(s.annotation, answer) for answer in answers)))
    return found
