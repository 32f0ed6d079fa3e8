"""The `openai` engine: GPT-4o, or any server with its protocol (`vllm serve`, `transformers serve`).

The path of a request, in the order of the methods of OpenAIEngine:

    generate           keeps as many requests under way as the server lets through (with --batch, see `openai_batch.py`)
    _answer            one request: its image is encoded, its reply, its follow-up's reply attached
    _ask_with_retries  attempts until there is a reply, with money reserved before each
    _reserve           waits until the next attempt may be sent and paid
    _send              one HTTP call; its failure is classified

A failure that concerns one request costs only that request. A failure that concerns all (the key, the model's name,
the quota, the budget) ends the run: nothing new is sent, requests under way are awaited, and all replies are kept.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

import openai

from mpa.answers.finish_reasons import is_known
from mpa.engines import Request, follow_up_request, submitted
from mpa.engines.budget import Budget
from mpa.engines.chat_request import EncodedImage, Parameters, encode_image
from mpa.engines.costs import Costs, Reservation
from mpa.engines.end_of_run import EndOfRun, Stopped
from mpa.engines.endpoint import Endpoint
from mpa.engines.pacing import MAX_RETRIES, Pacer, backoff
from mpa.engines.responses import Refused, Retryable, Unsupported, read_reply
from mpa.engines.server_errors import causes, classify_error, may_have_arrived
from mpa.files.image_files import ImageError
from mpa.files.records import InputError, without_secrets
from mpa.models.families import MAX_PIXELS
from mpa.models.loading import COMMON_MARKS

TIMEOUT = 300.0  # seconds for a reply
MAX_REFUSALS = 5  # without a single reply, or doubtful and in a row: then the images are not the reason
MAX_PAID_RETRIES = 2  # of a request whose replies are billed and hold no text
THINKS = (
    "{} thinks before it answers: its thoughts are paid for and take from --max-new-tokens. Give it room with a larger "
    '--max-new-tokens, or switch it off: --request-json \'{{"reasoning_effort": "none"}}\' or '
    '\'{{"chat_template_kwargs": {{"enable_thinking": false}}}}\', as the server\'s documentation says.'
)


class OpenAIEngine:
    """A model behind a server; see `mpa.engines`. `model_path` is the server's name for it.

    Prices are for a million tokens, in any currency. `max_cost` covers the whole run, whose account is in `ledger`.
    Images with more than `max_pixels` are made smaller before they are sent. The key comes from $OPENAI_API_KEY alone.
    `request_json`: further fields of each request (see `argument_types.request_json`).
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
        max_pixels: int = MAX_PIXELS,
        ledger: Path | None = None,
        request_json: dict | None = None,
    ):
        if max_cost is not None and not (price_in or price_out):
            raise InputError("--max-cost needs --price-in and --price-out, what a million tokens cost.")
        self.endpoint = Endpoint(base_url, request_json)
        self.server = self.endpoint.server
        self.model, self.max_pixels, self.max_cost = model_path, max_pixels, max_cost
        self.settings = model_path, self.server, max_pixels, image_detail, request_json  # of all requests
        self.budget = Budget(Path(ledger) if ledger else None, f"{Path(sys.argv[0]).stem} {model_path}", max_cost)
        self.costs = Costs(self.budget, model_path, (price_in, price_out), self._note, request_json)
        self.parameters = Parameters(model_path, image_detail, request_json, self._note)
        self.end = EndOfRun()
        self.pacer = Pacer(concurrency, self.server, self.end)
        self.refusals = self.doubtful = self.thinking = 0  # the doubtful in a row
        self.notes = set()
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
        if self.parameters.dropped_values:
            facts["dropped_values"] = dict(sorted(self.parameters.dropped_values.items()))
        if self.thinking:
            facts["thinking_replies"] = self.thinking
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
        submitted.refuse_asked(self._batches(), requests, done, self.settings)
        with self._connected() as runner:
            loop = runner.get_loop()
            self.pacer.start()
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
                if under_way := sum(task.cancel() for task in tasks):
                    self._note(f"{under_way} requests were under way: their replies are lost, and may be billed.")

    def _batches(self) -> list[submitted.Submitted]:
        """The batches of this stage that are not read yet."""
        return submitted.of(self.budget.path, self.budget.stage, self.server) if self.budget.path else []

    @contextlib.contextmanager
    def _connected(self) -> Iterator[asyncio.Runner]:
        """A loop with the server's `client`, in which signals and failures end the run (`EndOfRun.watch`). Its time is recorded."""
        self.started = time.monotonic()
        with asyncio.Runner() as runner:
            self.client = self._client()
            with self.end.watch(runner.get_loop()):
                try:
                    yield runner
                finally:
                    runner.run(self.client.close())
                    with self.end.failing():
                        self.budget.charge(0.0, seconds=time.monotonic() - self.started)

    def _client(self) -> openai.AsyncOpenAI:
        key, url = self.endpoint.key or "none", self.endpoint.url
        try:
            return openai.AsyncOpenAI(api_key=key, base_url=url, max_retries=0, timeout=TIMEOUT)
        except Exception as error:  # whatever the library finds in the environment
            raise InputError(
                f"{self.server}: no connection can be made ({self._says(error)}). Check the address, the proxy variables and "
                "SSL_CERT_FILE."
            ) from None

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
            if self._end_for(error):
                return None
            return {"key": request.key, "error": f"server: {error}", "permanent": error.permanent}
        except Stopped:
            return None
        except (InputError, OSError) as error:
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
            self._end_for(error)
            return {"key": follow_up.key, "error": f"server: {error}", "permanent": error.permanent}
        except Stopped:
            return {"key": follow_up.key, "error": "stopped before it was asked", "permanent": False}
        except (InputError, OSError) as error:
            self.end.fail(error)
            return {"key": follow_up.key, "error": str(error), "permanent": False}

    def _end_for(self, error: Refused) -> bool:
        """Whether this refusal ends the run: with those before it, it shows that no request will succeed."""
        self.refusals += 1
        self.doubtful += error.doubtful
        every = not self.pacer.replies and self.refusals >= MAX_REFUSALS
        if every:
            self.end.fail(InputError(f"{self.model}: the server refuses every request: {error}"))
        elif error.doubtful and self.doubtful >= MAX_REFUSALS:
            says = f"{self.model} at {self.server} refuses one request after the other: {error}"
            self.end.fail(InputError(f"{says}. Finished replies are kept."))
        return every and not error.billed

    async def _ask_with_retries(self, request: Request, image: EncodedImage) -> dict:
        """The reply. Raises Refused for this request, Stopped, or InputError for the run."""
        failures, paid, last_failure, replies_before, left_out = 0, 0, "", self.pacer.replies, set()
        while failures <= MAX_RETRIES:
            reservation = await self._reserve(request, image.pixels)
            sent_at, charge = time.monotonic(), {}
            try:
                reply = await self._send(request, image.url, left_out)
                charge = self.costs.charge(reply.pop("usage"), reservation)
                self.pacer.replied()
                self.doubtful = 0
                return reply
            except (Retryable, Refused) as failure:
                if failure.usage or failure.billed:
                    charge = self.costs.charge(failure.usage, reservation)
                if isinstance(failure, Refused):
                    raise
                if failure.rate_limit:
                    await self.end.sleep(self.pacer.rate_limited(failure, sent_at))
                    continue
                failures, last_failure = failures + 1, str(failure)
                paid += failure.usage is not None
                if paid > MAX_PAID_RETRIES:
                    raise Refused(f"paid {paid} times: {last_failure}", permanent=False) from None
                self._tell_of_first(failure)
                if failures <= MAX_RETRIES:
                    await self.end.sleep(backoff(failures - 1, failure.retry_after))
            except Unsupported:
                continue  # now without the parameter
            finally:
                with self.end.failing():  # the reply is here, and kept
                    self.budget.charge(reservation.amount, **charge)
                await self.pacer.release()
        if self.pacer.replies > replies_before:
            raise Refused(f"failed {failures} times while others went through: {last_failure}", permanent=False)
        raise InputError(f"{self.server}: keeps failing: {last_failure}. Finished replies are kept; run again later.")

    async def _reserve(self, request: Request, pixels: int) -> Reservation:
        """Waits until the request may be sent, and sets aside what it may cost. Raises Stopped where the run ends
        before, InputError where the budget does not allow the request."""
        prompt_tokens, least = self.costs.prompt_tokens(request, pixels)
        while True:
            await self.pacer.wait_for_slot()
            amount = self.costs.upper_bound(request, prompt_tokens)
            if self.budget.reserve(amount):
                self.pacer.in_flight += 1
                return Reservation(amount, prompt_tokens, least)
            if not self.pacer.in_flight:
                raise self._nearly_spent(amount)
            await self.pacer.wait_for_change()  # a reply may cost less than was reserved for it

    def _nearly_spent(self, amount: float) -> InputError:
        return InputError(
            f"--max-cost {self.max_cost:g} is nearly spent: this run has cost {self.budget.spent():.4f}, and "
            f"the next request may cost {amount:.4f}. All replies are kept. To go on, raise it and run the "
            "same command."
        )

    async def _send(self, request: Request, image_url: str, left_out: set[str]) -> dict:
        """One call. Raises Retryable, Refused, Unsupported or InputError, by what the failure concerns."""
        arguments, sent = self.parameters.chat_completion(request, image_url, left_out)
        try:
            raw = await self.client.chat.completions.with_raw_response.create(**arguments)
        except openai.APIStatusError as error:
            response = error.response
            raise self._failure(error.status_code, response.headers, response.text, sent, left_out) from None
        except Exception as error:  # connections, time-outs, redirections to nowhere, bodies that are no JSON
            raise Retryable(self._says(error), billed=may_have_arrived(error)) from None
        return self._reply(request, raw.http_response.text, sent)

    def _failure(self, status: int, headers: Mapping, text: str, sent: dict, left_out: set[str]) -> Exception:
        """What an error response means, see `classify_error`; a parameter that is not taken is left out from here on."""
        failure = classify_error(status, headers, text, sent, self.endpoint.redact)
        if isinstance(failure, Unsupported):
            self.parameters.drop(failure, sent, left_out)
        if isinstance(failure, Refused) and failure.billed:  # the limit was used up
            self._note(THINKS.format(self.model))
        if isinstance(failure, InputError):
            failure = InputError(f"{self.model} at {self.server}: {failure}. Finished replies are kept.")
        return failure

    def _reply(self, request: Request, text: str, sent: dict) -> dict:
        """The reply in the text of a chat completion, with its `usage`. Raises Retryable and Refused."""
        reply = read_reply(text, request.max_new_tokens, self.endpoint.redact)
        tokens = reply["usage"][1] if reply["usage"] else None
        self.parameters.replied(sent, tokens)
        if reply.pop("thinks"):
            self.thinking += 1
            self._note(THINKS.format(self.model))
        if not is_known(reply["finish_reason"]):
            said = repr(reply["finish_reason"])
            self._note(
                f"{self.server} ends replies for the reason {said}, which is not known: they do not count as complete."
            )
        return {"key": request.key, **reply, "tokens": tokens}

    def _tell_of_first(self, failure: Retryable) -> None:
        """Say why there is no reply, before the attempts go on for minutes."""
        if not self.pacer.replies and "first failure" not in self.notes:
            proxy = f" through the proxy {without_secrets(self.endpoint.proxy)}" if self.endpoint.proxy else ""
            self._note(f"{self.server}{proxy}: {failure}. Trying again for some minutes.")
            self.notes.add("first failure")

    def _says(self, error: Exception) -> str:
        """An exception with its cause, which libraries hide, without secrets."""
        first = causes(error)[-1]
        said = f"{type(error).__name__}: {str(first) or type(first).__name__}"
        return self.endpoint.redact(without_secrets(" ".join(said.split())))[:300]
