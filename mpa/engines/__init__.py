"""Engines: requests in, replies out as they finish. The stages know no more than this.

An engine is a context manager with `generate(requests, done) -> Iterator[list[dict]]`. It yields lists of replies,
each `{"key", "text", "logprob", "tokens", "finish_reason"}` or `{"key", "error", "permanent"}`: an image that cannot be
read costs one request. Requests whose key is in `done` need no reply.

- `logprob` is the sum over the generated `tokens`, including the end token.
- `finish_reason`: "stop" (the end token, or the line that ends the answer), "length" (the token limit), "content_filter" or
  another word of `mpa.answers.finish_reasons`.
- A reply whose log-probability is NaN or infinite is an error (`not_finite`): its tokens mean nothing.
- An error is `permanent` where asking again cannot help; other errors are temporary.
- `follow_up`: the reply to the request's follow-up. Where it is missing or an error, PI asks that question.

`facts()` goes into the meta file. `status()` is shown in the progress bar, for example the share of the time in which
the model waited for images.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

from tqdm import tqdm

from mpa.answers.finish_reasons import why_cut
from mpa.answers.replies import in_reasoning
from mpa.files import distributed, signals
from mpa.files.journal import Journal, follow_up_key, is_temporary
from mpa.files.packages import require
from mpa.files.records import InputError
from mpa.method.presets import PRESETS
from mpa.method.prompts import annotation_is_complete, follow_up_prompt, holds_mark


@dataclass(frozen=True)
class Request:
    """One image and one prompt. A sampled reply depends on `seed` and `key` alone.

    `stop`, "annotation" or "answer" (a key of prompts.STOPS): the reply may end where that is complete; "": at the end
    token. `follow_up`, a preset or "": the annotation in the reply is asked as a question at once, greedily, while the
    image is still in memory.
    """

    key: str
    image_path: str
    prompt: str
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    stop: str = ""
    follow_up: str = ""


def cut_off(reply: dict) -> str | None:
    """Why an annotation is incomplete; None where it is complete. Text after the line of its answer may be missing."""
    reason, text = why_cut(reply.get("finish_reason")), reply["text"]
    if reason is None or annotation_is_complete(text[: text.rfind("\n") + 1]):
        return None
    return reason if text.strip() and not in_reasoning(text) else f"{reason} before it answered"


NOT_FINITE = "the model's logits are NaN or infinite"
OTHER_DTYPE = {"float16": "use --dtype bfloat16 or float32", "bfloat16": "use --dtype float32"}
FIRST_REPLIES = 8  # where all of these are not finite, none will be


def not_finite(key: str, logprob: float | None, dtype) -> dict | None:
    """The error of a reply whose log-probability is no finite number, as where `dtype` overflows; None for any other."""
    if logprob is not None and math.isfinite(logprob):
        return None
    name = str(dtype).removeprefix("torch.")
    remedy = OTHER_DTYPE.get(name, "are the weights damaged? Else try another --dtype")
    return {"key": key, "error": f"{NOT_FINITE} in {name}: {remedy}", "permanent": True}


def finite(batches: Iterable[list[dict]]) -> Iterator[list[dict]]:
    """The batches of replies. Raises InputError if the first FIRST_REPLIES, or all, have logits that are not finite."""
    wrong, error, batches = 0, "", iter(batches)
    for replies in batches:
        bad = [reply["error"] for reply in replies if reply.get("error", "").startswith(NOT_FINITE)]
        wrong, error = wrong + len(bad), bad[0] if bad else error
        if any("error" not in reply for reply in replies):
            yield replies
            yield from batches
            return
        if wrong >= FIRST_REPLIES:
            break
        yield replies
    if wrong:
        raise InputError(f"{error}. All of the first {wrong} replies are like that; nothing was written.")


MARK_IN_IT = "question: a mark of the prompt format"


def follow_up_request(request: Request, reply: dict, marks: frozenset[str] = frozenset()) -> Request | None:
    """The follow-up of a reply (see `Request.follow_up`), or None. `marks` are the prompt format's own tokens."""
    text = reply.get("text")
    if not request.follow_up or text is None or (PRESETS[request.follow_up].checked and cut_off(reply)):
        return None
    prompt = follow_up_prompt(text, request.follow_up, marks)
    if not prompt or holds_mark(prompt, marks):
        return None
    stop = "" if PRESETS[request.follow_up].whole_reply else "answer"
    return replace(request, prompt=prompt, temperature=0.0, stop=stop, follow_up="")


@dataclass(frozen=True)
class Engine:
    """Where an engine is (module:class), and which of the stages' arguments it takes besides `model_path`.

    `local`: the model is a folder or a hub id whose files are read here; else a name that a server knows. `packages`: a
    requirements file, by its group, and the packages of it that must be installed. `batch`: where the engine with `batch` is.
    """

    where: str
    settings: tuple[str, ...]
    local: bool = True
    packages: tuple[str, ...] = ()
    batch: str = ""


LIMITS = ("min_pixels", "max_pixels", "max_tiles")
ENGINES = {
    "hf": Engine(
        "mpa.engines.hf:HFEngine",
        (
            *("batch_size", "batch_tokens", "device", "dtype", "workers", "trust_remote_code"),
            *("quantization", "device_map", "static_cache", *LIMITS),
        ),
    ),
    "vllm": Engine(
        "mpa.engines.vllm:VLLMEngine",
        (
            *("dtype", "trust_remote_code", "tensor_parallel_size", "pipeline_parallel_size"),
            *("gpu_memory_utilization", "max_model_len", *LIMITS),
        ),
    ),
    "openai": Engine(
        "mpa.engines.openai:OpenAIEngine",
        (
            *("base_url", "request_json", "concurrency", "max_cost", "price_in", "price_out", "image_detail"),
            *("max_pixels", "ledger", "batch"),
        ),
        local=False,
        packages=("openai", "openai"),
        batch="mpa.engines.openai_batch:BatchEngine",
    ),
}
# Runs one of these in its actors, and takes the arguments of all.
_ALL_SETTINGS = dict.fromkeys(name for engine in ENGINES.values() for name in engine.settings)
ENGINES["ray"] = Engine("mpa.engines.ray:RayEngine", ("ray_engine", "actors", *_ALL_SETTINGS), packages=("ray", "ray"))


def open_engine(name: str, batch: bool = False, **settings):
    """The engine called `name`. Its model is loaded with the first request. `batch`: through a provider's batch interface."""
    module, cls = (ENGINES[name].batch if batch else ENGINES[name].where).split(":")
    if ENGINES[name].packages:
        require(f"--engine {name}", *ENGINES[name].packages)
    return getattr(import_module(module), cls)(**settings)


def _ask_follow_ups(engine, requests: Sequence[Request], journal: Journal) -> None:
    """Ask the follow-ups that an earlier call did not send, or whose error was temporary."""
    follow_ups = []
    for request in filter(lambda request: request.key in journal, requests):
        reply = journal[request.key]
        if is_temporary(reply.get("follow_up") or {}):
            follow_up = follow_up_request(request, reply, getattr(engine, "marks", frozenset()))
            if follow_up:
                follow_ups.append(replace(follow_up, key=follow_up_key(request.key)))
    journal.take_over(follow_ups)
    if any(follow_up.key not in journal for follow_up in follow_ups):
        for replies in engine.generate(follow_ups, journal):
            journal.append(replies)
            signals.stop_if_asked()


def ask(engine, requests: Sequence[Request], journal: Journal, label: str) -> None:
    """Put the reply to every request into the journal. Of several processes, each asks for its part."""
    signals.stop_if_asked()
    ours = requests[distributed.RANK :: distributed.WORLD]
    journal.take_over(ours)
    _ask_follow_ups(engine, ours, journal)
    missing = sum(request.key not in journal for request in ours)
    if missing:
        quiet = None if distributed.FIRST else True  # None: without a terminal
        with tqdm(total=len(ours), initial=len(ours) - missing, desc=label, unit="sample", disable=quiet) as bar:
            batches = engine.generate(ours, journal)
            for replies in finite(batches) if missing == len(ours) else batches:
                new = sum(reply["key"] not in journal for reply in replies)
                journal.append(replies)
                bar.set_postfix_str(engine.status(), refresh=False)
                bar.update(new)
                signals.stop_if_asked()
    distributed.wait()
    journal.read_others()
