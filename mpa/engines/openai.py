"""The `openai` engine: GPT-4o, or any server with its protocol (`vllm serve`, `transformers serve`).

The path of a request, in the order of the methods of OpenAIEngine:

    generate           keeps as many requests under way as the server lets through
    _answer            one request: its image is encoded, its reply, its follow-up's reply attached
    _ask_with_retries  attempts until there is a reply, with money reserved before each
    _reserve           waits until the next attempt may be sent and paid
    _send              one HTTP call; its failure is classified

A failure that concerns one request costs only that request. A failure that concerns all (the key, the model's name,
the quota, the budget) ends the run: nothing new is sent, requests under way are awaited, and all replies are kept.
"""

import asyncio
import os
import sys
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import openai

from mpa.engines import Request, follow_up_request
from mpa.engines.budget import Budget
from mpa.engines.chat_request import EncodedImage, Parameters, encode_image
from mpa.engines.costs import Costs, Reservation
from mpa.engines.end_of_run import EndOfRun, Stopped
from mpa.engines.pacing import MAX_RETRIES, Pacer, backoff
from mpa.engines.responses import Refused, Retryable, Unsupported, classify_error, read_reply
from mpa.image_files import ImageError
from mpa.models import COMMON_MARKS
from mpa.records import InputError, without_secrets

TIMEOUT = 300.0  # seconds for a reply
MAX_REFUSALS = 5  # without a single reply: then the images are not the reason


class OpenAIEngine:
    """A model behind a server; see `mpa.engines`. `model_path` is the server's name for it.

    Prices are for a million tokens, in any currency. `max_cost` covers the whole run, whose account is in `ledger`.
    Images with more than `max_pixels` are made smaller before they are sent. The key comes from $OPENAI_API_KEY alone.
    """

    marks = COMMON_MARKS  # the model's own tokenizer is not known here

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
        self.server = without_secrets(self.base_url) if self.base_url else "OpenAI"
        self.model, self.max_pixels, self.max_cost = model_path, max_pixels, max_cost
        self.budget = Budget(Path(ledger) if ledger else None, f"{Path(sys.argv[0]).stem} {model_path}", max_cost)
        self.costs = Costs(self.budget, model_path, (price_in, price_out), self._note)
        self.parameters = Parameters(model_path, image_detail, self._note)
        self.end = EndOfRun()
        self.pacer = Pacer(concurrency, self.server, self.end)
        self.refusals, self.notes = 0, set()
        self.started = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def facts(self) -> dict:
        """The account of this stage over all calls, and the parameters that the model did not take."""
        account = self.budget.account()
        facts = {name: account[name] for name in ("requests", "tokens_in", "tokens_out")}
        facts |= {"cost": round(account["cost"], 6), "server_seconds": round(account["seconds"], 1)}
        if self.parameters.dropped:
            facts["dropped_parameters"] = dict(sorted(self.parameters.dropped.items()))
        return {"device": self.server, "dtype": None, **facts}

    def status(self) -> str:
        pace = self.costs.tokens_out / max(time.monotonic() - self.started, 1e-9)
        return f"{pace:.0f} tokens/s" + (f", cost {self.budget.spent():.2f}" if any(self.costs.prices) else "")

    def _note(self, what: str) -> None:
        """Tell the user once."""
        if what not in self.notes:
            self.notes.add(what)
            print(f"note: {what}", file=sys.stderr)

    # --- the path of a request --------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies as they come. Raises InputError when the server cannot be used or `max_cost` is reached, and
        KeyboardInterrupt after a signal; each after the requests under way were answered."""
        waiting, tasks = (r for r in requests if r.key not in done), set()
        self.started = time.monotonic()
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            self.client = openai.AsyncOpenAI(
                api_key=self.key or "none", base_url=self.base_url, max_retries=0, timeout=TIMEOUT
            )
            self.pacer.start()
            with self.end.watch(loop):
                try:
                    while True:
                        while not self.end and len(tasks) < self._max_tasks() and (request := next(waiting, None)):
                            tasks.add(loop.create_task(self._answer(request)))
                        if not tasks:
                            break
                        finished, tasks = runner.run(asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))
                        replies = [reply for task in finished if (reply := task.result())]
                        if replies:
                            yield replies
                finally:
                    for task in tasks:
                        task.cancel()
                    runner.run(self.client.close())
                    self.budget.charge(0.0, seconds=time.monotonic() - self.started)

    def _max_tasks(self) -> int:
        """One until it is known what a reply costs, where there is a budget."""
        return self.pacer.concurrency if self.pacer.replies or self.max_cost is None else 1

    async def _answer(self, request: Request) -> dict | None:
        """The reply to a request, with its follow-up's attached; None where the run ended before it was sent."""
        try:
            image = await asyncio.to_thread(encode_image, request.image_path, self.max_pixels)
            reply = await self._ask_with_retries(request, image)
        except ImageError as error:
            return {"key": request.key, "error": f"image: {error}", "permanent": True}
        except Refused as error:
            self.refusals += 1
            if not self.pacer.replies and self.refusals >= MAX_REFUSALS:
                self.end.fail(InputError(f"{self.model}: the server refuses every request: {error}"))
                return None
            return {"key": request.key, "error": f"server: {error}", "permanent": error.permanent}
        except Stopped:
            return None
        except InputError as error:
            self.end.fail(error)
            return None
        if follow_up := follow_up_request(request, reply, self.marks):
            reply["follow_up"] = await self._answer_follow_up(follow_up, image)
        return reply

    async def _answer_follow_up(self, follow_up: Request, image: EncodedImage) -> dict:
        """Its reply, or an error: its parent is paid for and is kept. A later call or PI asks the follow-up again."""
        try:
            return await self._ask_with_retries(follow_up, image)
        except Refused as error:
            return {"key": follow_up.key, "error": f"server: {error}", "permanent": error.permanent}
        except Stopped:
            return {"key": follow_up.key, "error": "stopped before it was asked", "permanent": False}
        except InputError as error:
            self.end.fail(error)
            return {"key": follow_up.key, "error": str(error), "permanent": False}

    async def _ask_with_retries(self, request: Request, image: EncodedImage) -> dict:
        """The reply. Raises Refused for this request, Stopped, or InputError for the run."""
        failures, last_failure, replies_before = 0, "", self.pacer.replies
        while failures <= MAX_RETRIES:
            reservation = await self._reserve(request, image.pixels)
            sent_at, charge = time.monotonic(), {}
            try:
                reply = await self._send(request, image.url)
                charge = self.costs.charge(reply.pop("usage"), reservation)
                self.pacer.replied()
                return reply
            except (Retryable, Refused) as failure:
                if failure.usage or failure.billed:
                    charge = self.costs.charge(failure.usage, reservation)
                if isinstance(failure, Refused):
                    raise
                if failure.rate_limit:
                    self.pacer.rate_limited(failure, sent_at)
                    continue
                failures, last_failure = failures + 1, str(failure)
                if failures <= MAX_RETRIES:
                    await self.end.sleep(backoff(failures - 1, failure.retry_after))
            except Unsupported as failure:
                self.parameters.drop(str(failure))
            finally:
                self.budget.charge(reservation.amount, **charge)
                await self.pacer.release()
        if self.pacer.replies > replies_before:
            raise Refused(f"failed {failures} times while others went through: {last_failure}", permanent=False)
        raise InputError(f"{self.server}: keeps failing: {last_failure}. Finished replies are kept; run again later.")

    async def _reserve(self, request: Request, pixels: int) -> Reservation:
        """Waits until the request may be sent, and sets aside what it may cost. Raises Stopped where the run ends
        before, InputError where the budget does not allow the request."""
        prompt_tokens = self.costs.prompt_tokens(request, pixels)
        while True:
            await self.pacer.wait_for_slot()
            amount = self.costs.upper_bound(request, prompt_tokens)
            if self.budget.reserve(amount):
                self.pacer.in_flight += 1
                return Reservation(amount, prompt_tokens)
            if not self.pacer.in_flight:
                raise InputError(
                    f"--max-cost {self.max_cost:g} is nearly spent: this run has cost {self.budget.spent():.4f}, and "
                    f"the next request may cost {amount:.4f}. All replies are kept. To go on, raise it and run the "
                    "same command."
                )
            await self.pacer.wait_for_change()  # a reply may cost less than was reserved for it

    async def _send(self, request: Request, image_url: str) -> dict:
        """One call. Raises Retryable, Refused, Unsupported or InputError, by what the failure concerns."""
        arguments, sent = self.parameters.chat_completion(request, image_url)
        try:
            raw = await self.client.chat.completions.with_raw_response.create(**arguments)
        except openai.APIStatusError as error:
            failure = classify_error(error, sent, self.key)
            if isinstance(failure, InputError):
                failure = InputError(f"{self.model} at {self.server}: {failure}. Finished replies are kept.")
            raise failure from None
        except (openai.APIError, ValueError) as error:  # connections, time-outs, bodies that are no JSON
            says = without_secrets(f"{type(error).__name__}: {error}")
            raise Retryable(says, billed=_may_have_arrived(error)) from None
        reply = read_reply(raw.http_response.text)
        return {"key": request.key, **reply, "tokens": reply["usage"][1] if reply["usage"] else None}


def _may_have_arrived(error: Exception) -> bool:
    """Whether a request may have reached the server, and be billed, before its connection failed."""
    causes, cause = [], error
    while cause is not None:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    return not any(name.startswith("Connect") and name != "ConnectionResetError" for name in causes[1:])
