"""One model answers questions about pictures, and a result file comes of it: what PI and evaluate share."""

import time
from collections.abc import Callable
from pathlib import Path

from mpa import cli, ranks, records
from mpa.engines import Request, ask
from mpa.journal import Journal, finished
from mpa.prompts import answer_prompt, first_line


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
    """What counts as the answer: all of the reply under `released`, else its first line; None for an error."""
    text = reply.get("text")
    return text if text is None or preset == "released" else first_line(text)


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
    are replies that need not be asked for. `choice` are more settings that decide the outcome,
    `finish(record)` may add to a record, and `facts(result)` goes to the meta file.
    """
    started = time.time()
    content = [(request.key, request.image_path, request.prompt, before, after) for request, before, after in asked]
    settings = cli.settings(args, model_path, content, **(choice or {}))
    if finished(out, settings, args.restart):
        print(f"{label}: {out} is there already, made with these settings (--restart makes it anew).")
        return records.read_records(out, kind)
    journal, ran_on = None, {}
    if ready is None:
        with cli.engine(args, model_path) as engine:
            journal = Journal(out, settings, args.restart)
            ask(engine, [request for request, _, _ in asked], journal, label)
            ran_on = engine.facts()
    else:
        print(f"{label}: its {len(asked)} answers were made along with the annotations.")
    result, replies = [], journal if ready is None else ready
    for request, before, after in asked:
        reply = replies[request.key]
        record = {**before, "predictions": prediction(reply, args.preset), **after}
        result.append(finish(record | {"left_out": reply.get("error"), "logprob": reply.get("logprob")}))
    more = {"model_path": model_path, **ran_on, "seconds": round(time.time() - started, 1), **facts(result)}
    records.write_result(out, result, settings, **more)
    if account := cli.account(ran_on):
        print(f"{label}: {account}")
    if journal:
        journal.close(remove=ranks.FIRST)
    return result
