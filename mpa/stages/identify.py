"""How PI comes to judged samples: it asks both models, or reads their answers."""

import sys
from pathlib import Path
from typing import NamedTuple

from mpa.answers.finish_reasons import why_cut
from mpa.data.paths import locate, missing_images
from mpa.files import records
from mpa.files.records import InputError
from mpa.method import holdout, rules
from mpa.method.presets import PRESETS
from mpa.method.prompts import Annotation, holds_mark
from mpa.method.verdict import NOT_ASKED, Judge, Verdict
from mpa.runs.judging import annotation_of, judge_of
from mpa.runs.layout import RunFiles
from mpa.stages import answer_all, cli, further, given_questions, held_out
from mpa.stages.annotations import answers_of_pa, usable_annotations
from mpa.stages.answering import Answers, Question, question_request
from mpa.stages.stage import AskedModel, counted, run_files, short_replies
from mpa.stages.train_set import Judged, TrainFile

SVLMS_MARK = "a mark of the S-VLM’s prompt format"


class Found(NamedTuple):
    """The judged samples, the judge, and the funnel up to the S-VLM."""

    samples: list[Judged]
    judge: Judge
    funnel: dict[str, int]


class Annotated(NamedTuple):
    """D_PA: PA's records, those that can be used, and why others cannot, by id."""

    path: Path
    everything: list[dict]
    usable: list[dict]
    left_out: dict[str, str]

    @property
    def images(self) -> int:
        return len({r["image_path"] for r in self.everything})


def read_annotations(args) -> Annotated:
    """Raises InputError if none can be used, and if an image is not there."""
    files = run_files(args)
    pa_json = args.pa_json or files.needed(files.pa, "--pa-json", "PA.sh")
    annotations = cli.selected(records.read_records(pa_json, "PA"), args)
    usable, left_out = usable_annotations(annotations, args, AskedModel(args, args.model_path_lvlm).marks)
    if left_out:
        print(f"PI: {counted(left_out.values())}", file=sys.stderr)
    if not usable:
        raise InputError(f"{pa_json}: none of its {len(annotations)} records has a usable question and answer.")
    missing_images([r["image_path"] for r in usable])
    return Annotated(pa_json, annotations, usable, left_out)


class Asking:
    """Both models and what they are asked about D_PA. Raises InputError, before anything is asked, for models and settings that
    cannot be used, and for results that are there with other settings.
    """

    def __init__(self, args, train: TrainFile):
        self.args, self.train, self.files = args, train, run_files(args)
        self.annotated = read_annotations(args)
        self.given = given_questions.of(args)
        self.rules = rules.of(train.rule_settings)
        self.judge = Judge.of(vars(args), self.rules)
        self.models = {who: AskedModel(args, getattr(args, f"model_path_{who}")) for who in ("lvlm", "svlm")}
        for who in ("lvlm",) if args.only_lvlm else self.models:
            self.models[who].check()
        self.ready, self.why_asked = answers_of_pa(args, self.annotated.path, self.annotated.usable)
        self.questions = self._questions()
        self.lvlm = Answers(
            self.models["lvlm"], self.files.lvlm_answers, f"PI L-VLM {self.files.cell.lvlm}", "PI", self.questions
        )
        self.lvlm.check(ready=self.ready)
        holdout.decide(self.files.held_out, {}, args.hold_out)
        further.check(args, self.rules, self.questions)
        if not args.only_lvlm:
            self._of_svlm([], set()).check(content=False)
            train.check()

    def _questions(self) -> list[Question]:
        questions = []
        for r in self.annotated.usable:
            before = {"question_id": r["question_id"], "image_path": r["image_path"]}
            before |= {"PA_question": r["predicted_question"], "PA_answer": r["predicted_answer"]}
            request = question_request(self.args, str(r["question_id"]), r["image_path"], r["predicted_question"])
            questions.append(Question(request, before))
        return questions

    def _of_svlm(self, questions: list[Question], needed: set[str]) -> Answers:
        """The S-VLM's answers to those questions that are `needed`, see `answer_all.of_svlm`."""
        choices = {"match": self.args.match, "hold_out": self.args.hold_out} | rules.deciding_consistency(
            self.train.rule_settings
        )
        label = f"PI S-VLM {self.files.cell.svlm}"
        return answer_all.of_svlm(self.args, self.files.svlm_answers, label, questions, needed, **choices)

    def dry_run(self) -> None:
        """Ask a few requests of each kind; print how many there are and what they cost."""
        requests = [question.request for question in self.questions]
        if pending := [request for request in requests if request.key not in self.ready]:
            self.models["lvlm"].dry_run(pending, "PI L-VLM")
        further.dry_run(self.args, self.rules, self.questions)
        self.models["svlm"].dry_run(requests, "PI S-VLM, at most")

    def ask_lvlm(self) -> list[dict]:
        """Ã, and what rules ask. All of it is the same for all S-VLMs."""
        if not self.args.only_lvlm:
            self.models["svlm"].check_memory()  # now, not after the L-VLM's hours
        if self.ready and self.why_asked:
            why = ", ".join(f"{n} {w}" for w, n in self.why_asked.items())
            print(f"PI: asking the L-VLM {self.why_asked.total()} questions: {why}.")
        answers = self.lvlm.ask(self.ready)
        further.ask(self.args, self.rules, self.questions, answers)
        return answers

    def hold_out(self, lvlm_answers: list[dict]) -> tuple[list[dict], held_out.HeldOut]:
        """(the answers on which the L-VLM agrees with itself, what is held out of them)."""
        consistent = [r for r in lvlm_answers if self.judge(annotation_of(r), r).reason == NOT_ASKED]
        return consistent, held_out.decide(self.args, consistent)

    def write_held_out(self, consistent: list[dict], held: held_out.HeldOut) -> None:
        """Write the held-out set, once nothing can be refused any more; ask the L-VLM the given questions about it."""
        if self.given:
            chosen, of_given = given_questions.about(self.args, self.given, held.threshold)
            of_given.check()
        held_out.write(self.args, consistent, held)
        if self.given:
            given_questions.write(self.args, self.given, chosen, of_given)

    def ask_svlm(self, lvlm_answers: list[dict]) -> Found:
        """Â where the L-VLM agrees with itself and the image is not held out, and the verdict on each sample."""
        usable, marked = self._without_marks(lvlm_answers)
        consistent, held = self.hold_out(usable)
        needed = {str(r["question_id"]) for r in consistent}
        usable_ids = {str(r["question_id"]) for r in usable}
        questions = [q for q in self.questions if q.request.key in usable_ids and q.request.image_path not in held]
        if not (questions if self.args.answer_all else any(q.request.key in needed for q in questions)):
            self._refuse(usable, consistent, held)
        svlm = self._of_svlm(questions, needed)
        there = svlm.ask() if svlm.check() else None  # where the answers are there, this only reads them
        self.train.check(self._judged(lvlm_answers, there, held, marked) if there is not None else None)
        self.write_held_out(consistent, held)
        samples = self._judged(lvlm_answers, svlm.ask() if there is None else there, held, marked)
        funnel = {"pictures": self.annotated.images, "parsed": len(usable), "L-consistent": len(consistent)}
        return Found(samples, self.judge, funnel | ({"held out": held.images} if held.images else {}))

    def _without_marks(self, lvlm_answers: list[dict]) -> tuple[list[dict], set[str]]:
        """(the answers without a mark of the S-VLM's prompt format, the ids of the others)."""
        marks = self.models["svlm"].marks
        marked = {
            str(r["question_id"]) for r in lvlm_answers if holds_mark(f"{r['PA_question']}\n{r['PA_answer']}", marks)
        }
        if marked:
            print(f"PI: {counted([SVLMS_MARK] * len(marked))}", file=sys.stderr)
        return [r for r in lvlm_answers if str(r["question_id"]) not in marked], marked

    def _judged(self, lvlm_answers: list[dict], svlm_answers: list[dict], held, marked: set[str]) -> list[Judged]:
        lvlm, svlm = ({str(r["question_id"]): r for r in found} for found in (lvlm_answers, svlm_answers))
        samples = []
        for r in self.annotated.everything:
            key = str(r["question_id"])
            left_out = self.annotated.left_out.get(key) or (SVLMS_MARK if key in marked else r.get("left_out"))
            of_lvlm = None if key in marked else lvlm.get(key)
            annotation = Annotation(r["predicted_question"], r["predicted_answer"], left_out)
            if of_lvlm:
                annotation = annotation_of(of_lvlm)
            image = (of_lvlm or r)["image_path"]
            verdict = self.judge(annotation, of_lvlm, svlm.get(key), image in held)
            samples.append(Judged(r["question_id"], image, annotation, of_lvlm, svlm.get(key), verdict))
        return samples

    def _refuse(self, usable: list[dict], consistent: list[dict], held: held_out.HeldOut) -> None:
        """Nothing is left to ask the S-VLM."""
        share = f"--hold-out {self.args.hold_out:g}"
        kept = f"; all are held out ({share}), so none is left to train on" if held.images else ""
        remedy, images = "Annotate more images.", self.annotated.images
        if len(usable) < images / 2:
            remedy = f"Only {len(usable)} of {images} images were annotated: see `reply` and `left_out` in that file."
        raise InputError(
            f"{self.annotated.path}: the L-VLM agrees with itself on {len(consistent)} of {len(usable)} samples "
            f"(--match {self.args.match}){kept}. {_lost_answers(self.args, usable) or remedy}"
        )


def _lost_answers(args, lvlm_answers: list[dict]) -> str:
    """Why most of the L-VLM's answers cannot agree with the annotations, where they are cut off or missing; else ""."""
    cut = sum(bool(why_cut(r.get("finish_reason"))) for r in lvlm_answers) if PRESETS[args.preset].checked else 0
    failed = [r["left_out"] for r in lvlm_answers if r.get("left_out")]
    if cut + len(failed) < len(lvlm_answers) / 2:
        return ""
    what = ", ".join(filter(None, [short_replies(lvlm_answers) if cut else "", counted(failed)]))
    return f"Of the L-VLM's {len(lvlm_answers)} answers: {what}. More images would not help."


def read(args, train: TrainFile) -> Found:
    """The samples of existing answers, --lvlm-json and --svlm-json. No model is loaded."""
    lvlm_answers = records.read_records(args.lvlm_json, "PI")
    svlm_answers = cli.selected(records.read_records(args.svlm_json, "PI"), args)
    paths = locate([r["image_path"] for r in svlm_answers], args.path_map, args.image_root)
    svlm = {str(r["question_id"]): r | {"image_path": path} for r, path in zip(svlm_answers, paths, strict=True)}
    lvlm = {str(r["question_id"]): r for r in lvlm_answers}
    settings = {"match": args.match, "preset": args.preset} | train.rule_settings
    judge = judge_of(settings, RunFiles(args.lvlm_json.parent, run_files(args).cell))

    def verdict(key: str, held: bool) -> Verdict:
        r = svlm.get(key) or lvlm[key]
        return judge(annotation_of(r), lvlm.get(key), svlm.get(key), held)

    further.tell(judge.rules, lvlm_answers, args.lvlm_json)
    keys, places = list(dict.fromkeys([*lvlm, *svlm])), {key: place for place, key in enumerate(svlm)}
    consistent = [key for key in svlm if key in lvlm and verdict(key, True).consistent]
    held = held_out.decide(args, [svlm[key] for key in consistent])
    samples = []
    for key in keys:
        r = svlm.get(key) or lvlm[key]
        is_held, annotation = r["image_path"] in held, annotation_of(r)
        both = lvlm.get(key), None if is_held else svlm.get(key)
        told, place = verdict(key, is_held), places.get(key, 0)
        samples.append(Judged(r["question_id"], r["image_path"], annotation, *both, told, place))
    train.check(samples)
    held_out.write(args, [svlm[key] for key in consistent], held)
    funnel = {"L-consistent": sum(bool(s.verdict.consistent) for s in samples)}
    return Found(samples, judge, funnel | ({"held out": held.images} if held.images else {}))
