"""The train set that PI writes: the judged samples, which of them are trained on, and why the others are not."""

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from mpa.engines import LIMITS
from mpa.files import distributed, outputs, records
from mpa.files.journal import finished
from mpa.files.records import InputError
from mpa.method.presets import PRESETS
from mpa.method.prompts import Annotation, train_prompt
from mpa.method.rules.rule import Selection
from mpa.method.verdict import BOTH_RIGHT, CONSISTENT, PARITY, Judge, Verdict
from mpa.runs.case import read_reasons
from mpa.runs.layout import reasons_path
from mpa.stages import cli
from mpa.stages.stage import run_files


class Judged(NamedTuple):
    """One sample: its annotation, the models' PI records (None: has not answered), and the verdict.

    `place` is that of the S-VLM's answer, where a file of existing answers has another order than the L-VLM's.
    """

    question_id: str | int
    image_path: str
    annotation: Annotation
    lvlm: dict | None
    svlm: dict | None
    verdict: Verdict
    place: int = 0

    @property
    def key(self) -> str:
        return str(self.question_id)

    def as_record(self) -> dict:
        said = {who: (r or {}).get("predictions") for who, r in (("lvlm", self.lvlm), ("svlm", self.svlm))}
        annotation = {"PA_question": self.annotation.question, "PA_answer": self.annotation.answer}
        record = {"question_id": self.question_id, "image_path": self.image_path}
        answers = {f"{who}_answer": text for who, text in said.items()}
        return record | annotation | answers | {"reason": self.verdict.reason, "detail": self.verdict.detail}


def _answered(samples: list[Judged]) -> list[Judged]:
    """Those that the S-VLM has answered, in the order of its answers."""
    return sorted((s for s in samples if s.svlm), key=lambda s: s.place)


def select(samples: list[Judged], judge: Judge) -> tuple[list[Judged], Selection]:
    """(the samples with the verdicts of the rules that select, what is trained on)."""
    of = {reason: [s.svlm for s in _answered(samples) if s.verdict.reason == reason] for reason in (PARITY, BOTH_RIGHT)}
    selection, verdicts = Selection(of[PARITY], of[BOTH_RIGHT]), {}
    for rule in judge.rules:
        before, selection = selection, rule.select(selection)
        kept = {str(r["question_id"]) for r in selection.parity}
        left = {str(r["question_id"]) for r in before.parity} - kept
        verdicts |= dict.fromkeys(left, Verdict(rule.reason))
    for r in selection.anchors or ():
        verdicts[str(r["question_id"])] = Verdict(BOTH_RIGHT, "an anchor: PL also trains on it")
    return [s._replace(verdict=verdicts.get(s.key, s.verdict)) for s in samples], selection


def train_records(selection: Selection, preset: str) -> list[dict]:
    """The records of the train file. With anchors, each says in `kind` whether it is a parity sample or an anchor."""

    def of(r: dict) -> dict:
        return records.train_record(
            r["question_id"], r["image_path"], train_prompt(r["PA_question"], preset), r["PA_answer"]
        )

    if selection.anchors is None:
        return [of(r) for r in selection.parity]
    return [
        of(r) | {"kind": kind}
        for kind, found in (("parity", selection.parity), ("anchor", selection.anchors))
        for r in found
    ]


class TrainFile:
    """The train file of a run, with its meta file and its reasons."""

    def __init__(self, args, rule_settings: dict):
        self.args, self.rule_settings, self.files = args, rule_settings, run_files(args)
        self.path: Path = args.out or self.files.train

    def _settings(self, samples: list[Judged] | None) -> dict:
        """The settings that decide the file; without `samples`, those that are known before the models are asked."""
        settings = {name: getattr(self.args, name) for name in ("preset", "match", "hold_out")}
        if self.args.lvlm_json:
            settings |= {"lvlm_json": str(self.args.lvlm_json), "svlm_json": str(self.args.svlm_json)}
        return settings | self.rule_settings | ({} if samples is None else {"content": self._content(samples)})

    def _content(self, samples: list[Judged]) -> str:
        """The digest of the answers. Where the file is there and was made before --answer-all asked the rest: of those it was made from."""
        lvlm = [s.lvlm for s in samples if s.lvlm]
        asked = [s.svlm for s in _answered(samples)]
        deciding = [s.svlm for s in _answered(samples) if s.verdict.reason in CONSISTENT]
        before = records.digest(json.dumps([lvlm, deciding]))
        there = (_meta_of(self.path).get("settings") or {}).get("content")
        return before if there == before else records.digest(json.dumps([lvlm, asked]))

    def check(self, samples: list[Judged] | None = None) -> bool:
        """Whether the file is there. Raises InputError if it was made with other settings, or is another command's."""
        inputs = [*outputs.inputs_of(self.args), self.files.lvlm_answers]
        outputs.refuse_others(self.path, "train", inputs)
        outputs.refuse_others(
            reasons_path(self.path), "reasons", inputs, ours=lambda path: _stored_reasons(path) is not None
        )
        # A train file of a run is made anew when its answers have changed; one of --lvlm-json and --svlm-json is refused.
        return finished(self.path, self._settings(samples), self.args.restart, lambda: not self.args.lvlm_json)

    def write(self, samples: list[Judged], selection: Selection, **facts) -> None:
        """Write the file and its reasons, unless they are there. `samples` are those of `select`; `facts` go to the meta file."""
        there, file, found = self.check(samples), reasons_path(self.path), [s.as_record() for s in samples]
        told = _stored_reasons(file) == found
        if there and told:
            return
        cli.open_log(self.args, writes=True)
        if distributed.FIRST and not told:
            records.write_json(file, found)
        if there:
            return
        if self.path.exists() and not self.args.restart:
            print(f"PI: {self.path} was made from other answers; it is made anew.")
        facts |= {"dataset": self.args.dataset} | self._models() | self._limits()
        if self.files.held_out.exists():
            facts["held_out"] = os.path.relpath(self.files.held_out, self.path.parent)
        records.write_result(self.path, train_records(selection, self.args.preset), self._settings(samples), **facts)

    def _models(self) -> dict:
        """{"model_path_lvlm", "model_path_svlm"} as far as they are known."""
        if not self.args.lvlm_json:
            return {name: getattr(self.args, name) for name in ("model_path_lvlm", "model_path_svlm")}
        found = {"model_path_lvlm": _meta_of(self.args.lvlm_json), "model_path_svlm": _meta_of(self.args.svlm_json)}
        return {name: meta["model_path"] for name, meta in found.items() if isinstance(meta.get("model_path"), str)}

    def _limits(self) -> dict:
        """The limits of an image with which the S-VLM was asked, {} if its answers do not say: what trains on the set needs them."""
        settings = _meta_of(self.args.svlm_json or self.files.svlm_answers).get("settings")
        return {name: settings[name] for name in LIMITS if name in settings} if isinstance(settings, dict) else {}


def matched_within_words(samples: list[Judged], judge: Judge, preset: str) -> dict[str, int]:
    """How many of each model's answers match only without the words around them; {} under a preset that compares to the letter."""
    if PRESETS[preset].literal:
        return {}
    answers = {"L-VLM": [s.lvlm for s in samples if s.lvlm], "S-VLM": [s.svlm for s in samples if s.svlm]}
    return {
        who: sum(judge.match.only_unwrapped(r["predictions"], r["PA_answer"]) for r in found)
        for who, found in answers.items()
    }


def _meta_of(result: Path) -> dict:
    """The content of a result's meta file, {} if there is none that can be read."""
    file = records.meta_path(result)
    meta = records.read_json(file) if file.exists() else {}
    return meta if isinstance(meta, dict) else {}


def _stored_reasons(file: Path) -> list[dict] | None:
    """None where there is no file of reasons, or another."""
    with contextlib.suppress(InputError):
        return read_reasons(file)
    return None
