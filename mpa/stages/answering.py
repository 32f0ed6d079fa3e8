"""One model answers questions about images. PI and evaluate share this code."""

from collections import Counter
from dataclasses import dataclass, field

from mpa.answers.finish_reasons import canonical
from mpa.answers.replies import first_line, strip_reasoning, without_end_tokens
from mpa.engines import Request, ask
from mpa.files import records
from mpa.files.earlier_replies import Asked
from mpa.files.image_files import fingerprints
from mpa.files.journal import is_temporary
from mpa.method.presets import PRESETS
from mpa.method.prompts import A_MARK, answer_prompt, holds_mark
from mpa.stages.stage import AskedModel, Stage, counted

ONLY_REASONING = "only reasoning, no answer"


@dataclass(frozen=True)
class Question:
    """A request, and the fields that its record has before and after `predictions`."""

    request: Request
    before: dict
    after: dict = field(default_factory=dict)


def question_request(args, key: str, image_path: str, question: str) -> Request:
    """The request for a question, with the preset's prompt."""
    return Request(
        key=key,
        image_path=image_path,
        prompt=answer_prompt(question, args.preset),
        max_new_tokens=args.max_new_tokens,
        stop="" if PRESETS[args.preset].whole_reply else "answer",
    )


def prediction(reply: dict, preset: str) -> str | None:
    """The answer in a reply: the whole reply, or its first line after any reasoning, without end tokens. None for an error."""
    text = reply.get("text")
    if text is None:
        return None
    return without_end_tokens(text) if PRESETS[preset].whole_reply else first_line(text)


class Answers(Stage):
    """The answers of a model to questions, in a result file of `kind` (a key of records.FIELDS)."""

    def __init__(self, model: AskedModel, out, label: str, kind: str, questions: list[Question], **choices):
        self.kind, self.questions, self.preset = kind, questions, model.args.preset
        self.prints = fingerprints(q.request.image_path for q in questions)
        asked = Asked(self.prints, [q.request for q in questions])
        super().__init__(model, out, label, self.content(questions), asked, **choices)

    def content(self, questions: list[Question]) -> list[tuple]:
        """What decides the records of these questions, besides the settings."""
        paths = [q.request.image_path for q in questions]
        return [
            (q.request.key, path, self.prints[path], q.request.prompt, q.before, q.after)
            for q, path in zip(questions, paths, strict=True)
        ]

    def record(self, question: Question, reply: dict) -> dict:
        """The record of a reply. `finish_reason` is set if the reply was truncated or filtered."""
        record = {**question.before, "predictions": prediction(reply, self.preset), **question.after}
        left_out, text = reply.get("error"), reply.get("text", "")
        if not PRESETS[self.preset].whole_reply and text.strip() and strip_reasoning(text) is None:
            left_out = ONLY_REASONING
        if holds_mark(record["predictions"] or ""):  # a server that generates beyond the answer's end
            left_out = A_MARK
        record |= {"left_out": left_out, "logprob": reply.get("logprob")}
        reason = canonical(reply.get("finish_reason"))
        return record if reason == "stop" else record | {"finish_reason": reason}

    def summary(self, result: list[dict]) -> dict:
        """Additional fields for the meta file: whose questions these are."""
        return {"model_path_lvlm": self.model.args.model_path_lvlm}

    def ask(self, ready: dict[str, dict] | None = None) -> list[dict]:
        """The records: those of the finished result, else asked for now, which may take hours. `ready`: replies by key that need no request."""
        ready = ready or {}
        # Where nothing is asked, the result takes a moment: another process that makes it is waited for.
        with self.to_do(all(q.request.key in ready for q in self.questions), ready) as to_do:
            return self._make(ready) if to_do else records.read_records(self.out, self.kind)

    def _make(self, ready: dict[str, dict]) -> list[dict]:
        """Make and write the result. Returns its records."""
        requests = [q.request for q in self.questions]
        replies, pending = dict(ready), [request for request in requests if request.key not in ready]
        if pending:
            with self.running() as engine:
                ask(engine, pending, self.journal, self.label)
            replies |= {request.key: self.journal[request.key] for request in pending}
        if done := sum("error" not in ready.get(request.key, {"error": ""}) for request in requests):
            print(f"{self.label}: PA already produced {done} of the {len(requests)} answers.")
        result = [self.record(q, replies[q.request.key]) for q in self.questions]
        failed = sum(is_temporary(replies[request.key]) for request in requests)
        usable = sum("error" not in replies[request.key] for request in requests)
        counts = {"left_out": Counter(r["left_out"] for r in result if r["left_out"])}
        counts["finish_reason"] = Counter(r["finish_reason"] for r in result if r.get("finish_reason"))
        self.write(result, failed, usable, **self.summary(result), counts=counts)
        if not usable:
            why = counted(counts["left_out"].elements())
            raise records.InputError(f"{self.out}: no question was answered; its field `left_out` says why: {why}.")
        return result
