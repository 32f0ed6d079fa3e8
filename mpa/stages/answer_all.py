"""PI's --answer-all after a call without it: the S-VLM's answers that are there are taken over, and only the rest is asked."""

import contextlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mpa.files import records
from mpa.files.earlier_replies import journal_header, same_but_content
from mpa.stages.answering import Answers, Question
from mpa.stages.stage import AskedModel


def of_svlm(args, out: Path, label: str, questions: list[Question], needed: set[str], **choices) -> Answers:
    """The S-VLM's answers to the questions whose ids are `needed`; to all, with --answer-all or where that is begun."""
    model = AskedModel(args, args.model_path_svlm)
    if args.answer_all or (not args.restart and _begun_with_all(out)):
        return AllAnswers(model, out, label, "PI", questions, answer_all=True, **choices)
    fewer = [q for q in questions if q.request.key in needed]
    return Answers(model, out, label, "PI", fewer, answer_all=False, **choices)


def _begun_with_all(out: Path) -> bool:
    """Whether these answers were begun with --answer-all, by their result, else its journal."""
    meta, journal = records.meta_path(out), out.with_suffix(".journal.jsonl")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what is broken is said where it is used
        settings = (records.read_json(meta) if out.exists() else journal_header(journal))["settings"]
        return bool(settings["answer_all"])
    return False


class AllAnswers(Answers):
    """The answers to all questions. Those of a finished result to some of them, asked with the same settings, are taken over,
    also where no reply was kept.

    The digest of its requests, which covers questions, prompts and images, shows that they are the same.
    """

    @cached_property
    def earlier(self) -> list[dict]:
        """The replies of such a result; [] if there is none."""
        meta = records.read_json(records.meta_path(self.out)) if self._there() else {}
        old = {} if not isinstance(meta, dict) or meta.get("unfinished") else meta.get("settings")
        if not same_but_content(old, self.settings) or old.get("content") == self.settings["content"]:
            return []
        found = {str(r["question_id"]): r for r in records.read_records(self.out, self.kind)}
        asked = [q for q in self.questions if q.request.key in found]
        if records.digest(json.dumps(self.content(asked))) != old.get("content"):
            return []
        replies = {q.request.key: _reply(found[q.request.key]) for q in asked}
        same = [q for q in asked if self.record(q, replies[q.request.key]) == found[q.request.key]]
        return [replies[q.request.key] for q in same]

    def _there(self) -> bool:
        return not self.model.args.restart and self.out.exists() and records.meta_path(self.out).exists()

    def check(self, content: bool = True, ready=None) -> bool:
        return not self.earlier and super().check(content, ready)

    @contextlib.contextmanager
    def running(self) -> Iterator:
        with super().running() as engine:
            self.journal.take_over([q.request for q in self.questions])
            self.journal.append(self.earlier)  # so that they outlive the result that this one replaces
            if self.earlier:
                n = len(self.questions)
                print(f"{self.label}: {len(self.earlier)} of the {n} answers are there already; asking the rest.")
            yield engine


def _reply(record: dict) -> dict:
    """The reply that gives this record."""
    text = (
        {"error": record["left_out"], "permanent": True}
        if record.get("left_out")
        else {"text": record["predictions"] or ""}
    )
    more = {name: record[name] for name in ("logprob", "finish_reason") if name in record}
    return {"key": str(record["question_id"])} | text | more
