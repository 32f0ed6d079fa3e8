"""One model answers questions about images, and a result file comes of it: what PI and evaluate share."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mpa import cli, distributed, image_files, records
from mpa.engines import Request, ask
from mpa.journal import Journal, finished, passing
from mpa.prompts import answer_prompt
from mpa.replies import first_line, strip_reasoning

ONLY_REASONING = "only reasoning, no answer"


def question_request(args, key: str, image_path: str, question: str) -> Request:
    """A question as the preset puts it. Under `paper` the reply may end with its first line."""
    return Request(
        key=key,
        image_path=image_path,
        prompt=answer_prompt(question, args.preset),
        max_new_tokens=args.max_new_tokens,
        stop="" if args.preset == "released" else "answer",
    )


def prediction(reply: dict, preset: str) -> str | None:
    """What counts as the answer: all of the reply under `released`, else its first line after any reasoning; None for an error."""
    text = reply.get("text")
    return text if text is None or preset == "released" else first_line(text)


def answered(before: dict, reply: dict, after: dict, preset: str) -> dict:
    """The record of a reply. One that was cut off or filtered says so in `finish_reason`."""
    record = {**before, "predictions": prediction(reply, preset), **after}
    left_out = reply.get("error")
    if preset != "released" and "text" in reply and reply["text"].strip() and strip_reasoning(reply["text"]) is None:
        left_out = ONLY_REASONING
    record |= {"left_out": left_out, "logprob": reply.get("logprob")}
    cut = reply.get("finish_reason", "stop") != "stop"
    return record | {"finish_reason": reply["finish_reason"]} if cut else record


def answers(
    args,
    model_path: str,
    out: Path,
    kind: str,
    asked: list[tuple[Request, dict, dict]],
    label: str,
    ready: dict[str, dict] | None = None,
    choice: dict | None = None,
    finish: Callable[[dict], dict] = lambda record: record,
    facts: Callable[[list[dict]], dict] = lambda result: {},
) -> list[dict]:
    """The records of the result file `out`: read when it is finished, else made, resumably.

    `asked` are requests, each with the fields of its record before and after `predictions`. `ready`
    are replies by key that need not be asked for. `choice` are more settings that decide the outcome,
    `finish(record)` may add to a record, and `facts(result)` goes to the meta file.
    """
    started, ready = time.time(), ready or {}
    prints = image_files.fingerprints(request.image_path for request, _, _ in asked)
    content = [(r.key, r.image_path, prints[r.image_path], r.prompt, before, after) for r, before, after in asked]
    settings = cli.settings(args, model_path, content, **(choice or {}))
    if finished(out, settings, args.restart):
        print(f"{label}: {out} is there already, made with these settings (--restart makes it anew).")
        return records.read_records(out, kind)
    journal, ran_on, replies = None, {}, dict(ready)
    left = [request for request, _, _ in asked if request.key not in ready]
    if left:
        with cli.engine(args, model_path) as engine:
            journal = Journal(out, settings, args.restart)
            ask(engine, left, journal, label)
            ran_on = engine.facts()
        replies |= {request.key: journal[request.key] for request in left}
    if len(left) < len(asked):
        print(f"{label}: {len(asked) - len(left)} of its {len(asked)} answers were made along with the annotations.")
    result = [finish(answered(before, replies[r.key], after, args.preset)) for r, before, after in asked]
    unfinished = sum(passing(replies[request.key]) for request, _, _ in asked)
    nothing = all("error" in replies[request.key] for request, _, _ in asked)
    more = {"model_path": model_path, **ran_on, "seconds": round(time.time() - started, 1), **facts(result)}
    counts = {"left_out": Counter(r["left_out"] for r in result if r["left_out"])}
    counts["finish_reason"] = Counter(r["finish_reason"] for r in result if r.get("finish_reason"))
    records.write_result(out, result, settings, **more, counts=counts, unfinished=unfinished or nothing * len(asked))
    if account := cli.account(ran_on):
        print(f"{label}: {account}")
    if cut := cli.short_replies(result):
        print(f"{label}: {cut}.")
    if unfinished:
        print(f"{label}: {unfinished} replies failed for reasons that may pass. The same command asks again.")
    if journal:
        journal.close(remove=distributed.FIRST and not unfinished and not nothing)
    if nothing:
        raise records.InputError(
            f"{out}: not one question could be asked; `left_out` in it says why: {cli.counted(counts['left_out'].elements())}."
        )
    return result
