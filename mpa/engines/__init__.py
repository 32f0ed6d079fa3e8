"""Engines: requests in, replies out as they finish. The stages know no more than this.

An engine is a context manager with `generate(requests, done) -> Iterator[list[dict]]`. It yields
lists of replies, each `{"key", "text", "logprob", "tokens"}` or `{"key", "error"}`: one picture that
cannot be read costs one request. `logprob` is the sum over the `tokens` written, end token included.
Requests whose key is in `done` need no reply. The reply to a request with a `follow_up` holds, under
that name, the reply to the prompt that followed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module

from tqdm import tqdm

from mpa.journal import Journal

ENGINES = {"hf": "mpa.engines.hf:HFEngine"}


@dataclass(frozen=True)
class Request:
    """One picture and one prompt. A sampled reply depends on `seed` and `key` alone."""

    key: str
    image_path: str
    prompt: str
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0
    stop: str = ""  # "answer", "annotation": may end where this is complete (a key of hf.STOPS); "": at the end token
    # A preset: an annotation in the reply is put to the model as a question at once, greedily, while the
    # picture is still at hand. "": it is not.
    follow_up: str = ""


def open_engine(name: str, **settings):
    """The engine called `name`; its model is loaded when the first reply is asked for."""
    module, cls = ENGINES[name].split(":")
    return getattr(import_module(module), cls)(**settings)


def ask(engine, requests: Collection[Request], journal: Journal, label: str) -> None:
    """See to it that every request's reply is in the journal."""
    missing = sum(request.key not in journal for request in requests)
    if missing:
        bar = tqdm(total=len(requests), initial=len(requests) - missing, desc=label, unit="sample", disable=None)
        with bar:
            for replies in engine.generate(requests, journal):
                new = sum(reply["key"] not in journal for reply in replies)
                journal.append(replies)
                bar.update(new)
