"""One model answers questions about images: what PI and evaluate share."""

from collections import Counter
from dataclasses import dataclass, field

from mpa import records
from mpa.engines import Request, ask
from mpa.image_files import fingerprints
from mpa.journal import passing
from mpa.presets import PRESETS
from mpa.prompts import answer_prompt
from mpa.replies import first_line, strip_reasoning
from mpa.stage import Model, Stage, counted

ONLY_REASONING = "only reasoning, no answer"


@dataclass(frozen=True)
class Question:
    """A request, and the fields of its record before and after `predictions`."""

    request: Request
    before: dict
    after: dict = field(default_factory=dict)


def question_request(args, key: str, image_path: str, question: str) -> Request:
    """A question as the preset puts it."""
    return Request(
        key=key,
        image_path=image_path,
        prompt=answer_prompt(question, args.preset),
        max_new_tokens=args.max_new_tokens,
        stop="" if PRESETS[args.preset].whole_reply else "answer",
    )


def prediction(reply: dict, preset: str) -> str | None:
    """What counts as the answer: the whole reply, or its first line after any reasoning; None for an error."""
    text = reply.get("text")
    return text if text is None or PRESETS[preset].whole_reply else first_line(text)


class Answers(Stage):
    """The answers of a model to questions, in a result file of `kind` (a key of records.FIELDS)."""

    def __init__(self, model: Model, out, label: str, kind: str, questions: list[Question], **choices):
        self.kind, self.questions, self.preset = kind, questions, model.args.preset
        prints = fingerprints(q.request.image_path for q in questions)
        content = []
        for q in questions:
            path = q.request.image_path
            content.append((q.request.key, path, prints[path], q.request.prompt, q.before, q.after))
        super().__init__(model, out, label, content, **choices)

    def record(self, question: Question, reply: dict) -> dict:
        """The record of a reply. One that was cut off or filtered says so in `finish_reason`."""
        record = {**question.before, "predictions": prediction(reply, self.preset), **question.after}
        left_out, text = reply.get("error"), reply.get("text", "")
        if not PRESETS[self.preset].whole_reply and text.strip() and strip_reasoning(text) is None:
            left_out = ONLY_REASONING
        record |= {"left_out": left_out, "logprob": reply.get("logprob")}
        cut = reply.get("finish_reason", "stop") != "stop"
        return record | {"finish_reason": reply["finish_reason"]} if cut else record

    def summary(self, result: list[dict]) -> dict:
        """More for the meta file."""
        return {}

    def records(self, ready: dict[str, dict] | None = None) -> list[dict]:
        """The records, read when the result is finished, else made. `ready` has replies by key that need no request."""
        if self.finished():
            return records.read_records(self.out, self.kind)
        ready = ready or {}
        requests = [q.request for q in self.questions]
        replies, left = dict(ready), [request for request in requests if request.key not in ready]
        if left:
            with self.running() as engine:
                ask(engine, left, self.journal, self.label)
            replies |= {request.key: self.journal[request.key] for request in left}
        if len(left) < len(requests):
            done = len(requests) - len(left)
            print(f"{self.label}: {done} of its {len(requests)} answers were made along with the annotations.")
        result = [self.record(q, replies[q.request.key]) for q in self.questions]
        failed = sum(passing(replies[request.key]) for request in requests)
        usable = sum("error" not in replies[request.key] for request in requests)
        counts = {"left_out": Counter(r["left_out"] for r in result if r["left_out"])}
        counts["finish_reason"] = Counter(r["finish_reason"] for r in result if r.get("finish_reason"))
        self.write(result, failed, usable, **self.summary(result), counts=counts)
        if not usable:
            why = counted(counts["left_out"].elements())
            raise records.InputError(f"{self.out}: no question could be asked; `left_out` in it says why: {why}.")
        return result
