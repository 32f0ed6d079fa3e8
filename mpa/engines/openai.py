"""The `openai` engine: GPT-4o, or any server that speaks its protocol (`vllm serve`, `transformers serve`).

Many requests at a time. What may pass (429, 5xx, a cut connection, a reply that is none) is asked again after a
while, all others waiting with it where the server says so; what concerns one request costs only that; what
concerns all (the key, the model's name, the quota) ends the run with everything kept.
"""

import asyncio
import base64
import hashlib
import io
import json
import math
import os
import random
import time
from collections.abc import Container, Iterable, Iterator
from email.utils import parsedate_to_datetime

import openai
from PIL import Image

from mpa.engines import Request, following
from mpa.pictures import PictureError, open_picture
from mpa.records import InputError

RETRIES = 8  # more tries of a request, before it is given up
LONGEST_WAIT = 60.0  # seconds between two, unless the server asks for more
TIMEOUT = 300.0  # seconds for a reply
MANY = 5  # refusals without a single reply: then it is not the pictures


class Passing(Exception):
    """A failure that may pass; `after` is how many seconds the server asks to wait, or None."""

    def __init__(self, what: str, after: float | None = None):
        super().__init__(what)
        self.after = after


class Refused(Exception):
    """The server does not want this one request."""


class OpenAIEngine:
    """`generate` through a server; see `mpa.engines`. `model_path` is the name that the server knows the model by.

    Prices are for a million tokens, in any currency; `max_cost` is of one call, in the same. Pictures with more than
    `max_pixels` are made smaller before they travel. The key comes from $OPENAI_API_KEY alone.
    """

    def __init__(
        self,
        model_path: str,
        base_url: str | None = None,
        concurrency: int = 16,
        max_cost: float | None = None,
        price_in: float = 0.0,
        price_out: float = 0.0,
        image_detail: str = "auto",
        max_pixels: int = 512 * 28 * 28,
    ):
        if max_cost is not None and not (price_in or price_out):
            raise InputError("--max-cost needs --price-in and --price-out, what a million tokens cost.")
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if not (self.key or base_url):
            raise InputError(
                "OPENAI_API_KEY is not set: export your key, or name a server of your own with --base-url."
            )
        self.model, self.base_url, self.concurrency = model_path, base_url, concurrency
        self.max_cost, self.prices, self.detail, self.max_pixels = (
            max_cost,
            (price_in, price_out),
            image_detail,
            max_pixels,
        )
        self.tokens, self.replied, self.refused = [0, 0], 0, 0  # tokens read and written; requests
        self.logprobs, self.resume_at, self.started = True, 0.0, time.monotonic()
        self.client = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    @property
    def cost(self) -> float:
        return sum(n * price for n, price in zip(self.tokens, self.prices, strict=True)) / 1e6

    def facts(self) -> dict:
        """The account of this call."""
        read, written = self.tokens
        account = {"requests": self.replied, "tokens_in": read, "tokens_out": written, "cost": round(self.cost, 6)}
        return {"device": self.base_url or "OpenAI", "dtype": None, **account}

    def status(self) -> str:
        pace = self.tokens[1] / max(time.monotonic() - self.started, 1e-9)
        return f"{pace:.0f} tokens/s" + (f", cost {self.cost:.2f}" if any(self.prices) else "")

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies as they come. Raises InputError when the server cannot be used, or `max_cost` is reached."""
        waiting, pending, enough = (r for r in requests if r.key not in done), set(), False
        self.started = time.monotonic()
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            self.client = openai.AsyncOpenAI(
                api_key=self.key or "none", base_url=self.base_url, max_retries=0, timeout=TIMEOUT
            )
            try:
                while True:
                    while len(pending) < self._at_a_time() and not (enough := enough or self._spent(len(pending))):
                        request = next(waiting, None)
                        if request is None:
                            break
                        pending.add(loop.create_task(self._answer(request)))
                    if not pending:
                        break
                    finished, pending = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                    failures = [task.exception() for task in finished if task.exception()]
                    yield [task.result() for task in finished if not task.exception()]
                    if failures:
                        raise failures[0]
            finally:
                for task in pending:
                    task.cancel()
                runner.run(self.client.close())
        if enough:
            raise InputError(
                f"--max-cost {self.max_cost:g} is all but spent: {self.cost:.4f} for {self.replied} replies. They are kept; "
                "the same command with more goes on."
            )

    def _at_a_time(self) -> int:
        """One until it is known what a reply costs, where that matters."""
        return self.concurrency if self.replied or self.max_cost is None else 1

    def _spent(self, under_way: int) -> bool:
        """Would one more request, beside those under way, cost more than `max_cost`?"""
        if self.max_cost is None or not self.replied:
            return False
        return self.cost + (under_way + 1) * self.cost / self.replied > self.max_cost

    async def _answer(self, request: Request) -> dict:
        """A request's reply, and that to what follows from it."""
        try:
            picture = await asyncio.to_thread(self._encoded, request.image_path)
            reply = await self._until_it_passes(request, picture)
            if asked := following(request, reply["text"]):
                reply["follow_up"] = await self._until_it_passes(asked, picture)
            return reply
        except PictureError as error:
            return {"key": request.key, "error": f"picture: {error}"}
        except Refused as error:
            self.refused += 1
            if not self.replied and self.refused >= MANY:
                raise InputError(f"{self.model}: the server refuses every request: {error}") from None
            return {"key": request.key, "error": f"server: {error}"}

    def _encoded(self, path: str) -> str:
        """The picture as a data URL, without loss, no larger than `max_pixels`."""
        picture = open_picture(path)
        shrink = math.sqrt(self.max_pixels / (picture.width * picture.height))
        if shrink < 1:
            size = (max(1, int(picture.width * shrink)), max(1, int(picture.height * shrink)))
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        content = io.BytesIO()
        picture.save(content, "PNG")
        return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()

    async def _until_it_passes(self, request: Request, picture: str) -> dict:
        replied_before, wait = self.replied, 0.5
        for attempt in range(RETRIES + 1):
            await asyncio.sleep(max(0.0, self.resume_at - time.monotonic()))
            try:
                return await self._ask(request, picture)
            except Passing as failure:
                if attempt == RETRIES:
                    last = str(failure)
                    break
                if failure.after is not None:  # the server's word, to all
                    self.resume_at = max(self.resume_at, time.monotonic() + failure.after)
                else:
                    await asyncio.sleep(min(wait, LONGEST_WAIT) * random.uniform(0.75, 1.0))
                    wait *= 2
        if self.replied > replied_before:
            raise Refused(f"failed {RETRIES + 1} times while others went through: {last}")
        raise InputError(
            f"{self.base_url or 'OpenAI'}: keeps failing: {last}. What is finished is kept; call again later."
        )

    async def _ask(self, request: Request, picture: str) -> dict:
        """One call. Raises Passing, Refused, or InputError, by what the failure concerns."""
        image = {"url": picture} | ({"detail": self.detail} if self.detail != "auto" else {})
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": request.prompt}]
        options = {"temperature": request.temperature, "max_completion_tokens": request.max_new_tokens}
        if request.temperature:
            seed = hashlib.sha256(f"{request.seed}:{request.key}".encode("utf-8", "surrogatepass")).digest()
            options |= {"top_p": request.top_p, "seed": int.from_bytes(seed[:4]) // 2}
        if self.logprobs:
            options["logprobs"] = True
        try:
            reply = await self.client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": content}], **options
            )
        except openai.APIStatusError as error:
            if error.status_code == 400 and "logprobs" in str(error) and "logprobs" in options:
                self.logprobs = False
                return await self._ask(request, picture)
            raise self._meaning_of(error) from None
        except (openai.APIError, json.JSONDecodeError) as error:  # connections, time-outs, garbage
            raise Passing(f"{type(error).__name__}: {error}") from None
        return self._reply(request, reply)

    def _meaning_of(self, error: openai.APIStatusError) -> Exception:
        detail = error.body if isinstance(error.body, dict) else {}
        says = str(detail.get("message") or detail.get("detail") or error)
        says = f"{error.status_code}: {says.replace(self.key, '…') if self.key else says}"[:500]
        if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
            return InputError(f"{self.model} at {self.base_url or 'OpenAI'}: {says}. What is finished is kept.")
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            return Passing(says, _retry_after(error.response.headers))
        return Refused(says)

    def _reply(self, request: Request, reply) -> dict:
        if not getattr(reply, "choices", None):
            raise Passing(f"no reply, but {str(reply)[:80]!r}")
        choice, usage = reply.choices[0], reply.usage
        if usage:
            self.tokens[0] += usage.prompt_tokens
            self.tokens[1] += usage.completion_tokens
        self.replied += 1
        if choice.message.content is None:
            raise Refused(f"no text in the reply: {choice.message.refusal or choice.finish_reason}")
        logprobs = choice.logprobs and choice.logprobs.content
        return {
            "key": request.key,
            "text": choice.message.content,
            "logprob": round(sum(token.logprob for token in logprobs), 4) if logprobs else None,
            "tokens": usage.completion_tokens if usage else None,
        }


def _retry_after(headers) -> float | None:
    """Seconds that the server asks to wait: Retry-After, in seconds or as a date; None where it does not say."""
    value = headers.get("retry-after")
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
