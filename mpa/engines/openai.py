"""The `openai` engine: GPT-4o, or any server that speaks its protocol (`vllm serve`, `transformers serve`).

As many requests at a time as the server lets through. What may pass is asked again after a while; what concerns one request
costs only that; what concerns all (the key, the model's name, the quota, the budget) ends the run with everything kept: nothing
new is sent, and what is under way is awaited, since it is paid for.
"""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import openai
from PIL import Image

from mpa.engines import Request, follow_up_request
from mpa.engines.budget import Budget
from mpa.engines.responses import RENAMED, Passing, Refused, Unsupported, meaning, read_reply
from mpa.image_files import ImageError, open_image
from mpa.models import COMMON_MARKS
from mpa.records import InputError, without_secrets

RETRIES = 8  # more tries of a request, before it is given up; too many requests at a time are no failed try
LONGEST_WAIT = 60.0  # seconds between two, unless the server asks for more
PATIENCE = 1800.0  # seconds without any reply, while the server says that there are too many requests
TIMEOUT = 300.0  # seconds for a reply
MANY = 5  # refusals without a single reply: then it is not the images
# An upper estimate of an image's tokens, until replies tell: so many, and one for so many pixels.
IMAGE_TOKENS, PIXELS_A_TOKEN = 1000, 300


class Stopped(Exception):
    """The run ends before this request was sent."""


class OpenAIEngine:
    """`generate` through a server; see `mpa.engines`. `model_path` is the name that the server knows the model by.

    Prices are for a million tokens, in any currency; `max_cost` is of the whole run, whose account is the file `ledger`. Images
    with more than `max_pixels` are made smaller before they travel. The key comes from $OPENAI_API_KEY alone.
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
        ledger: Path | None = None,
    ):
        if max_cost is not None and not (price_in or price_out):
            raise InputError("--max-cost needs --price-in and --price-out, what a million tokens cost.")
        self.key, self.base_url = os.environ.get("OPENAI_API_KEY", ""), base_url or os.environ.get("OPENAI_BASE_URL")
        if not (self.key or self.base_url):
            raise InputError(
                "OPENAI_API_KEY is not set: export your key, or name a server of your own with --base-url."
            )
        self.where = without_secrets(self.base_url) if self.base_url else "OpenAI"
        self.model, self.concurrency, self.max_pixels = model_path, concurrency, max_pixels
        self.max_cost, self.prices, self.detail = max_cost, (price_in, price_out), image_detail
        self.budget = Budget(Path(ledger) if ledger else None, f"{Path(sys.argv[0]).stem} {model_path}", max_cost)
        self.replied = self.refused = 0
        self.dropped: dict[str, str] = {}  # parameters that the model does not take: by what they were replaced, or ""
        # Of estimates; the most tokens of a prompt and of a reply: of the calls before, too.
        names = (f"{model_path}: {what}" for what in ("factor", "prompt", "reply"))
        self.seen = {name: self.budget.remember(name) for name in names}
        self.limit, self.under_way = float(concurrency), 0  # requests at a time: allowed, sent
        self.resume_at = self.slowed_at = 0.0
        self.crowded = 0  # refusals for too many requests, one after the other
        self.progress = self.started = time.monotonic()
        self.written, self.said = 0, set()
        self.fatal: BaseException | None = None
        self.signal = 0
        self.client = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    marks = COMMON_MARKS  # the model's own are not known here

    def facts(self) -> dict:
        """The account of this stage over all calls, and what the model did not take."""
        account = self.budget.account()
        facts = {name: account[name] for name in ("requests", "tokens_in", "tokens_out")}
        facts |= {"cost": round(account["cost"], 6), "server_seconds": round(account["seconds"], 1)}
        dropped = {"dropped_parameters": dict(sorted(self.dropped.items()))} if self.dropped else {}
        return {"device": self.where, "dtype": None, **facts, **dropped}

    def status(self) -> str:
        pace = self.written / max(time.monotonic() - self.started, 1e-9)
        return f"{pace:.0f} tokens/s" + (f", cost {self.budget.spent():.2f}" if any(self.prices) else "")

    # --- the run ------------------------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies as they come. Raises InputError when the server cannot be used, or `max_cost` is reached, and
        KeyboardInterrupt after a signal; each after what was under way has come in."""
        waiting, pending = (r for r in requests if r.key not in done), set()
        self.started = self.progress = time.monotonic()
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            self.ending, self.changed = asyncio.Event(), asyncio.Condition()
            self.client = openai.AsyncOpenAI(
                api_key=self.key or "none", base_url=self.base_url, max_retries=0, timeout=TIMEOUT
            )
            with self._signals(loop) as before:
                try:
                    while True:
                        while not self._ends() and len(pending) < self._at_a_time():
                            request = next(waiting, None)
                            if request is None:
                                break
                            pending.add(loop.create_task(self._answer(request)))
                        if not pending:
                            break
                        finished, pending = runner.run(asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED))
                        replies = [reply for task in finished if (reply := task.result())]
                        if replies:
                            yield replies
                finally:
                    for task in pending:
                        task.cancel()
                    runner.run(self.client.close())
                    self.budget.settle(0.0, seconds=time.monotonic() - self.started)
            if self.signal:
                handler = before.get(self.signal)
                if callable(handler):
                    handler(self.signal, None)
                raise KeyboardInterrupt
        if self.fatal:
            raise self.fatal

    def _ends(self) -> bool:
        return bool(self.fatal or self.signal)

    def _end(self, failure: BaseException) -> None:
        self.fatal = self.fatal or failure
        self.ending.set()

    @contextlib.contextmanager
    def _signals(self, loop):
        """SIGINT and SIGTERM end the run in order; a second Ctrl-C ends it at once. Yields the handlers of before."""
        before = {}

        def hear(number: int) -> None:
            if self.signal and number == signal.SIGINT:
                os._exit(130)
            self.signal = number
            self.ending.set()
            print("stopping: waiting for what is under way.", file=sys.stderr)

        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # no main thread, no Unix
                before[number] = signal.getsignal(number)
                loop.add_signal_handler(number, hear, number)
        try:
            yield before
        finally:
            for number, handler in before.items():
                with contextlib.suppress(ValueError, RuntimeError):
                    loop.remove_signal_handler(number)
                    signal.signal(number, handler)

    def _at_a_time(self) -> int:
        """One until it is known what a reply costs, where that matters."""
        return self.concurrency if self.replied or self.max_cost is None else 1

    # --- a request ----------------------------------------------------------------------------------

    async def _answer(self, request: Request) -> dict | None:
        """A request's reply, and that to what follows from it; None where the run ended before it was sent."""
        try:
            image = await asyncio.to_thread(self._encoded, request.image_path)
            reply = await self._until_it_passes(request, image)
        except ImageError as error:
            return {"key": request.key, "error": f"image: {error}", "permanent": True}
        except Refused as error:
            self.refused += 1
            if not self.replied and self.refused >= MANY:
                self._end(InputError(f"{self.model}: the server refuses every request: {error}"))
                return None
            return {"key": request.key, "error": f"server: {error}", "permanent": error.permanent}
        except Stopped:
            return None
        except InputError as error:
            self._end(error)
            return None
        if asked := follow_up_request(request, reply, self.marks):
            try:
                reply["follow_up"] = await self._until_it_passes(asked, image)
            except Refused as error:  # PI asks again
                reply["follow_up"] = {"key": request.key, "error": f"server: {error}", "permanent": error.permanent}
            except Stopped:
                reply["follow_up"] = {"key": request.key, "error": "stopped before it was asked", "permanent": False}
            except InputError as error:
                reply["follow_up"] = {"key": request.key, "error": str(error), "permanent": False}
                self._end(error)
        return reply

    def _encoded(self, path: str) -> tuple[str, int]:
        """The image as a data URL, without loss, no larger than `max_pixels`, and its pixels."""
        image = open_image(path)
        shrink = math.sqrt(self.max_pixels / (image.width * image.height))
        if shrink < 1:
            size = (max(1, int(image.width * shrink)), max(1, int(image.height * shrink)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        content = io.BytesIO()
        image.save(content, "PNG")
        url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        return url, image.width * image.height

    async def _until_it_passes(self, request: Request, image: tuple[str, int]) -> dict:
        attempt, wait, last = 0, 0.5, ""
        replied_before = self.replied
        while attempt <= RETRIES:
            reserved, estimate = await self._turn(request, image[1])
            sent, spent = time.monotonic(), {}
            try:
                reply = await self._ask(request, image[0])
                spent = self._cost(reply.pop("usage"), reserved, estimate)
                self._goes_well()
                return reply
            except (Passing, Refused) as failure:
                usage = getattr(failure, "usage", None)
                if usage or getattr(failure, "billed", False):
                    spent = self._cost(usage, reserved, estimate)
                if isinstance(failure, Refused):
                    raise
                last = str(failure)
                if failure.rate:
                    await self._crowded(failure, sent)
                    continue
                attempt += 1
                if attempt <= RETRIES:
                    pause = max(min(wait, LONGEST_WAIT) * random.uniform(0.75, 1.25), failure.after or 0.0)
                    wait *= 2
                    await self._sleep(pause)
            except Unsupported as failure:
                self._drop(str(failure), request)
            finally:
                self.budget.settle(reserved, **spent)
                self.under_way -= 1
                async with self.changed:
                    self.changed.notify_all()
        if self.replied > replied_before:
            raise Refused(f"failed {RETRIES + 1} times while others went through: {last}", permanent=False)
        raise InputError(f"{self.where}: keeps failing: {last}. What is finished is kept; call again later.")

    async def _turn(self, request: Request, pixels: int) -> tuple[float, float]:
        """Waits until this request may be sent: (the money set aside for it, its prompt's tokens as estimated). Raises Stopped
        where the run ends before, InputError where the budget does not allow it."""
        estimate = self._estimate(request, pixels)
        while True:
            if self._ends():
                raise Stopped
            now = time.monotonic()
            if now < self.resume_at:  # each at a moment of its own, not all at once
                await self._sleep(self.resume_at - now + random.uniform(0, min(2.0, 0.1 * self.concurrency)))
                continue
            if self.under_way < max(1, int(self.limit)):
                amount = self._upper_cost(request, estimate)
                if self.budget.reserve(amount):
                    self.under_way += 1
                    return amount, estimate
                if not self.under_way:
                    spent = self.budget.spent()
                    raise InputError(
                        f"--max-cost {self.max_cost:g} is all but spent: {spent:.4f} by this run, and the next request may cost "
                        f"{amount:.4f}. All replies are kept; the same command with more goes on."
                    )
            async with self.changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), 1.0)

    async def _sleep(self, seconds: float) -> None:
        """Or until the run ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.ending.wait(), seconds)
        if self._ends():
            raise Stopped

    def _goes_well(self) -> None:
        self.replied += 1
        self.crowded, self.progress = 0, time.monotonic()
        self.limit = min(float(self.concurrency), self.limit + 1 / self.limit)

    async def _crowded(self, failure: Passing, sent: float) -> None:
        """Too many requests: fewer at a time, after a pause for all. Raises InputError where none has passed for PATIENCE."""
        now = time.monotonic()
        if now - self.progress > PATIENCE:
            raise InputError(
                f"{self.where}: too many requests for {PATIENCE / 60:.0f} minutes: {failure}. Call again later."
            )
        if sent > self.slowed_at:  # of those sent together, the first counts
            self.slowed_at, self.limit = now, max(1.0, self.limit / 2)
            self.crowded += 1
        floor = min(LONGEST_WAIT, 0.5 * 2 ** min(self.crowded, 10)) * random.uniform(0.75, 1.25)
        self.resume_at = max(self.resume_at, now + max(floor, failure.after or 0.0))

    # --- money --------------------------------------------------------------------------------------

    def _estimate(self, request: Request, pixels: int) -> float:
        """Prompt tokens, from above: a byte of text is a token at most."""
        return IMAGE_TOKENS + pixels / PIXELS_A_TOKEN + len(request.prompt.encode("utf-8", "surrogatepass"))

    def _upper_cost(self, request: Request, estimate: float) -> float:
        factor, most_in, most_out = self.seen.values()
        tokens_in = max(1.25 * factor * estimate, most_in) if factor else estimate
        tokens_out = max(request.max_new_tokens, most_out)
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def _cost(self, usage: tuple[int, int] | None, reserved: float, estimate: float) -> dict:
        """What a reply adds to the account. One that does not say what it used counts as much as was set aside."""
        if usage is None:
            if any(self.prices):
                self._say("the server does not say what a reply uses: each counts at its upper estimate.")
            return {"requests": 1, "cost": reserved}
        read, written = usage
        self.written += written
        now = dict(zip(self.seen, (read / estimate, read, written), strict=True))
        self.seen = {name: max(self.seen[name], value) for name, value in now.items()}
        cost = (read * self.prices[0] + written * self.prices[1]) / 1e6
        return {"requests": 1, "tokens_in": read, "tokens_out": written, "cost": cost, "most": self.seen}

    # --- the wire -----------------------------------------------------------------------------------

    async def _ask(self, request: Request, data_url: str) -> dict:
        """One call. Raises Passing, Refused, Unsupported or InputError, by what the failure concerns."""
        options = self._options(request)
        image = {"url": data_url} | ({"detail": options.pop("detail")} if "detail" in options else {})
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": request.prompt}]
        sent = {**options, "image_url": {name: "" for name in image}}
        messages = [{"role": "user", "content": json.loads(json.dumps(content).encode("utf-8", "replace"))}]
        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **options
            )
        except openai.APIStatusError as error:
            raise self._placed(meaning(error, sent, self.key)) from None
        except (openai.APIError, ValueError) as error:  # connections, time-outs, garbage
            says = without_secrets(f"{type(error).__name__}: {error}")
            raise Passing(
                says, billed=not isinstance(error.__cause__, ConnectionRefusedError) and _was_sent(error)
            ) from None
        reply = read_reply(raw.http_response.text)
        usage = reply.pop("usage")
        tokens = usage[1] if usage else None
        return {"key": request.key, **reply, "tokens": tokens, "usage": usage}

    def _placed(self, failure: Exception) -> Exception:
        if isinstance(failure, InputError):
            return InputError(f"{self.model} at {self.where}: {failure}. What is finished is kept.")
        return failure

    def _options(self, request: Request) -> dict:
        options = {
            "temperature": request.temperature,
            "max_completion_tokens": request.max_new_tokens,
            "logprobs": True,
        }
        if request.temperature:
            seed = hashlib.sha256(f"{request.seed}:{request.key}".encode("utf-8", "surrogatepass")).digest()
            options |= {"top_p": request.top_p, "seed": int.from_bytes(seed[:4]) // 2}
        if self.detail != "auto":
            options["detail"] = self.detail
        for name, instead in self.dropped.items():
            value = options.pop(name, None)
            if instead and value is not None:
                options[instead] = value
        return options

    def _drop(self, name: str, request: Request) -> None:
        """Send a parameter under its other name, or no more; said once, and told in the meta file."""
        if name in self.dropped:  # another request was first
            return
        instead = RENAMED.get(name, "")
        self.dropped[name] = "" if instead in self.dropped else instead
        what = f"is sent as {self.dropped[name]}" if self.dropped[name] else "is not sent"
        effect = (
            " Replies are sampled as the server does by itself." if name in ("temperature", "top_p", "seed") else ""
        )
        self._say(f"{self.model} does not take {name}: it {what}.{effect}")

    def _say(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            print(f"note: {what}", file=sys.stderr)


def _was_sent(error: Exception) -> bool:
    """Whether a request may have reached the server before its connection failed."""
    causes, cause = [], error
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return not any(name.startswith("Connect") and name not in ("ConnectionResetError",) for name in causes[1:])
