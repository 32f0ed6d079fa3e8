"""An engine that replies at once, by rule, to measure and kill everything except the model."""

import hashlib
import random
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from mpa import engines
from mpa.engines import Request, follow_up_request


class InstantEngine:
    """Replies depend on the model's name, the key and the prompt; `pause` is the mean time of a batch, in seconds."""

    def __init__(self, model_path: str, batch_size: int | None = None):
        self.model, self.batch_size, self.pause = model_path, batch_size or 8, PAUSE

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def facts(self) -> dict:
        return {"device": "none", "dtype": None}

    def status(self) -> str:
        return ""

    def reply(self, request: Request) -> dict:
        chance = int(hashlib.sha256(f"{self.model} {request.key} {request.prompt}".encode()).hexdigest()[:8], 16)
        if chance % 50 == 0:
            return {"key": request.key, "error": "image: no such file", "permanent": True}
        text = f"Question: is it number {chance % 9}?\nAnswer: yes" if "Question:" in request.prompt else "yes"
        text = "nothing to say" if chance % 7 == 0 else text
        reply = {"key": request.key, "text": text, "logprob": -(chance % 999) / 100, "tokens": len(text.split())}
        if follow_up_request(request, reply):
            reply["follow_up"] = {
                "key": request.key,
                "text": "yes" if chance % 3 else "no",
                "logprob": -0.5,
                "tokens": 2,
            }
        return reply

    def generate(self, requests, done):
        requests, times = (r for r in requests if r.key not in done), random.Random()
        while batch := list(islice(requests, self.batch_size)):
            if self.pause:
                time.sleep(times.expovariate(1 / self.pause))
            yield [self.reply(request) for request in batch]


class Requests(Sequence):
    """A lazy sequence of requests."""

    def __init__(self, keys: range):
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Requests(self.keys[index])
        return Request(
            f"{self.keys[index]}#0", f"/images/{self.keys[index]}.jpg", "Question: … Answer: …", follow_up="paper"
        )


PAUSE = 0.0
engines.ENGINES["instant"] = engines.Engine("instant:InstantEngine", ("batch_size",), local=False)
