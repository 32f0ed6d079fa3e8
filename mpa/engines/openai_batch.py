"""The `openai` engine with --batch: the provider's batch interface, which takes half the price and answers within a day.

    generate     finds the batches that an earlier call submitted; submits what is missing; yields replies as batches end
    _submit      as many requests as the limits and the budget allow: a file, money set aside, upload, batch
    _recover     a batch of which it is not known whether it was submitted: found at the server, or made impossible there
    _poll        looks at the open batches, more and more seldom
    _end         an ended batch: its results are read, charged all at once, and those that were not served wait again

Each step is on the disk before the server sees it (`submitted.py`), so no batch is submitted twice, or paid for twice,
whenever this process is killed. A follow-up is not sent: PI asks it, in one round with all others.
"""

import asyncio
import contextlib
import math
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from mpa.engines import Request, submitted
from mpa.engines.batch_calls import BatchCalls
from mpa.engines.batch_file import Result, input_line, read_results
from mpa.engines.chat_request import encode_image
from mpa.engines.costs import BATCH_PRICE, Reservation
from mpa.engines.end_of_run import Stopped
from mpa.engines.responses import Refused, Retryable, Unsupported
from mpa.engines.submitted import Line, Submitted
from mpa.files import atomic
from mpa.files.image_files import ImageError
from mpa.files.log_file import detail
from mpa.files.records import InputError, locked, without_secrets

# OpenAI's limits of a batch's input file (API reference, "Create batch").
MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0  # seconds between two looks at the open batches
QUEUE_PAUSE = 300.0  # seconds before the next batch, where the queue is full and no batch of ours is in it
LISTED_AFTER = 30.0  # seconds after which a submitted batch is surely in the server's list
MAX_ROUNDS = 3  # of a request that fails
ENDED = ("completed", "failed", "expired", "cancelled")
_QUEUE_LIMIT = re.compile(r"limit: ([\d,]+)", re.IGNORECASE)


class BatchEngine(BatchCalls):
    """As OpenAIEngine, with the batch interface. Prices are those of single requests; `ledger` is needed."""

    def __init__(self, model_path: str, ledger: Path, price_in: float = 0.0, price_out: float = 0.0, **settings):
        prices = {"price_in": BATCH_PRICE * price_in, "price_out": BATCH_PRICE * price_out}
        super().__init__(model_path, ledger=ledger, **prices, **settings)
        self.end.stopping = "nothing more is submitted"
        self.parameters.dropped |= self.budget.refused(model_path)  # else each stage would lose a round to find them
        self.waiting: deque[Request] = deque()
        self.requests: dict[str, Request] = {}  # those that are wanted, by custom id
        self.open: list[Submitted] = []  # what this process attends to
        self.ended: deque[tuple[Submitted, dict]] = deque()  # of these, with the server's word on them; not read yet
        self.read: list[Submitted] = []  # whose replies were given out
        self.foreign: set[str] = set()  # tokens of those that hold no request of this call
        self.failures: Counter[str] = Counter()  # rounds, by custom id
        self.left_out = defaultdict(set)  # parameters, by custom id
        self.progress: dict[str, int] = {}  # finished requests, by token
        self.most_tokens = math.inf  # in the server's queue
        self.hold_until = self.poll_at = 0.0  # on the monotonic clock
        self.pause = FIRST_PAUSE

    def __enter__(self):
        with self._connected() as runner, contextlib.suppress(Stopped):
            runner.run(self.check())
        return self

    def status(self) -> str:
        return f"cost {self.budget.spent():.2f}" if any(self.costs.prices) else ""

    # --- the path of the requests -----------------------------------------------------------------

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies as batches end. Raises InputError when the server cannot be used or `max_cost` is reached, and
        KeyboardInterrupt after a signal; submitted batches go on, and the next call finds them."""
        quiet = tqdm(bar_format="{desc}", leave=False, disable=None)  # None: without a terminal
        with contextlib.ExitStack() as self.locks, self._connected() as runner, quiet as self.bar:
            self.locks.callback(submitted.clean, self.budget.path)
            try:
                self._find(list(requests), done)
                while not self.end and (replies := runner.run(self._next())) is not None:
                    if replies:
                        yield replies
                    while self.read:  # the replies are in the journal
                        self.read.pop().remove()
            finally:
                self._say_what_goes_on()

    def _say_what_goes_on(self) -> None:
        """What the run leaves at the server, where it ends early."""
        going = [batch for batch in self.open if batch.posted]
        if not going:
            return
        n, most = sum(len(batch.lines) for batch in going), sum(batch.amount for batch in going)
        cost = f" and may cost up to {most:.2f}" if most else ""
        ids = " ".join(batch.id or f"(metadata mpa={batch.token})" for batch in going[:20])
        self._note(
            f"{len(going)} {'batch goes' if len(going) == 1 else 'batches go'} on with {n:,} requests at {self.server}{cost}. The same command picks them up. To cancel "
            f'one: curl -X POST -H "Authorization: Bearer $OPENAI_API_KEY" {without_secrets(self.endpoint.url)}/batches/ID/cancel, '
            f"then the same command reads what was finished. ID: {ids}"
        )

    def _find(self, requests: list[Request], done: Container[str]) -> None:
        """Attend to the batches that earlier calls of the stage submitted; what is in none of them waits to be submitted.

        Those that hold none of the requests are charged where they have ended, and stay for who wants their replies.
        """
        self.open, self.ended, self.read, self.foreign = [], deque(), [], set()
        batches = self._batches()
        self.known = submitted.by_custom_id(requests, self.settings) if batches else {}
        self.requests = {name: request for name, request in self.known.items() if request.key not in done}
        in_batches = set()
        for batch in batches:
            ours, wanted = (names.keys() & batch.lines.keys() for names in (self.known, self.requests))
            if not self._attend(batch, needed=bool(ours)):
                continue
            if not batch.posted:
                self._give_back(batch)
            elif wanted:
                in_batches |= {self.requests[name].key for name in wanted}
                ago = timedelta(seconds=round(time.time() - batch.posted))
                detail(f"batch {batch.id or batch.token}: {len(batch.lines):,} requests were submitted {ago} ago.")
            elif not self.budget.holds(batch.owner):  # charged, and its replies are in the journal if they are ours
                self.open.remove(batch)
                if ours:
                    batch.remove()
            elif not ours:
                self.foreign.add(batch.token)
        self.waiting = deque(r for r in requests if r.key not in done and r.key not in in_batches)

    def _attend(self, batch: Submitted, needed: bool) -> bool:
        """Take over a batch. False where another process attends to it; if it is `needed` here, InputError is raised."""
        try:
            self.locks.enter_context(locked(batch.path))
        except InputError:
            if needed:
                raise
            return False
        self.open.append(batch)
        return True

    async def _next(self) -> list[dict] | None:
        """The next replies, perhaps none; None where all are given out, or the run ends."""
        try:
            while True:
                if self.ended:
                    return await self._end(*self.ended.popleft())
                if self.waiting and time.monotonic() >= self.hold_until and not (self.open and self._on_trial()):
                    if replies := await self._submit():
                        return replies
                elif time.monotonic() >= self.poll_at:
                    await self._poll()
                elif self.waiting or any(self.requests.keys() & batch.lines.keys() for batch in self.open):
                    await self.end.sleep(self.poll_at - time.monotonic())
                else:
                    return None
        except Stopped:
            pass
        except (InputError, OSError) as error:
            self.end.fail(error)
        return None

    def _on_trial(self) -> bool:
        """Under a budget, is it still unknown what a reply costs? Then a batch holds one request, as the estimate may be wrong."""
        return self.max_cost is not None and not (self.costs.known or self.pacer.replies)

    async def _submit(self) -> list[dict]:
        """Submit a batch. Returns the errors of images that cannot be read."""
        batch, replies = submitted.new(self.budget.path, self.budget.stage, self.server), []
        most, money, size = 1 if self._on_trial() else MAX_REQUESTS, self.budget.left(), 0
        tokens = self.most_tokens - sum(map(self._tokens, self.open))
        batch.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.temporary(batch.path.with_name("upload.jsonl")) as file:
            while self.waiting and len(batch.lines) < most:
                request = self.waiting[0]
                try:
                    custom_id, content, line = await asyncio.to_thread(self._line, request)
                except ImageError as error:
                    replies.append({"key": request.key, "error": f"image: {error}", "permanent": True})
                    self.waiting.popleft()
                    continue
                if self.end:
                    raise Stopped
                money, size = money - line.amount, size + len(content)
                tokens -= self.costs.tokens_in(line.prompt_tokens)
                if money < 1e-9 or size > MAX_BYTES or (tokens < 0 and (batch.lines or self.open)):
                    break
                file.write(content)
                batch.lines[custom_id], self.requests[custom_id] = line, self.waiting.popleft()
            if batch.lines:
                await self._send_batch(batch, file)
            elif self.waiting:
                if not self.open:
                    raise self._nearly_spent(line.amount)
                self.hold_until = math.inf  # until a batch ends
        return replies

    def _line(self, request: Request) -> tuple[str, bytes, Line]:
        """(custom id, line of the input file, what is kept of it). Raises ImageError."""
        custom_id = submitted.custom_id(request, self.settings)
        image = encode_image(request.image_path, self.max_pixels)
        arguments, sent = self.parameters.chat_completion(request, image.url, self.left_out[custom_id])
        prompt_tokens, least = self.costs.prompt_tokens(request, image.pixels)
        amount = self.costs.upper_bound(request, prompt_tokens)
        return custom_id, input_line(custom_id, arguments), Line(amount, prompt_tokens, least, sent)

    def _tokens(self, batch: Submitted) -> float:
        return sum(self.costs.tokens_in(line.prompt_tokens) for line in batch.lines.values())

    async def _send_batch(self, batch: Submitted, file: BinaryIO) -> None:
        batch.write()
        self._attend(batch, needed=True)
        try:
            if self.budget.reserve(batch.amount, batch.owner):  # else another process has spent it meanwhile
                batch.file = await self.upload(f"mpa-{batch.token}.jsonl", file)
                batch.posted = time.time()
                batch.write()
        finally:
            if not batch.posted:
                self._give_back(batch)
        if batch.posted:
            await self._create(batch)

    async def _create(self, batch: Submitted) -> None:
        """Submit the uploaded file."""
        try:
            batch.id = await self.create(batch.file, batch.token)
        except Retryable:  # it may have arrived
            await self._recover(batch)
            return
        except InputError:
            self._give_back(batch)
            raise
        batch.write()
        most = f", which may cost {batch.amount:.2f}" if batch.amount else ""
        detail(f"batch {batch.id}: {len(batch.lines):,} requests submitted{most}.")
        self._look_soon()

    def _look_soon(self) -> None:
        self.pause, self.poll_at = FIRST_PAUSE, time.monotonic() + FIRST_PAUSE

    async def _recover(self, batch: Submitted) -> None:
        """Find out whether the batch was submitted. If not, delete its file, so that no late call can submit it."""
        if (early := batch.posted + LISTED_AFTER - time.time()) > 0:
            await self.end.sleep(early)
        batch.id = await self.listed(batch.token)
        if not batch.id:
            await self.delete(batch.file)
            batch.id = await self.listed(batch.token)
        if batch.id:
            batch.write()
        else:
            self._give_back(batch)

    def _give_back(self, batch: Submitted) -> None:
        """The batch is not at the server, or failed there unpaid: its requests wait again."""
        if batch.posted:
            batch.posted = 0.0
            batch.write()  # so that it is not looked for
        self.budget.settle(batch.owner)
        batch.remove()
        self.open.remove(batch)
        self.waiting.extend(self.requests[name] for name in batch.lines if name in self.requests)

    async def _poll(self) -> None:
        """Look at the open batches."""
        for batch in list(self.open):
            if not batch.id:
                await self._recover(batch)
                continue
            try:
                document = await self.look(batch.id)
            except Refused as error:
                if batch.token in self.foreign:
                    continue
                raise InputError(
                    f"{self.server} does not know batch {batch.id} ({error}). Use the key that it was submitted with. To forget "
                    f"it, delete {batch.path}; its replies may have to be paid."
                ) from None
            counts = _counts(document)
            self.progress[batch.token] = counts.get("completed", 0) + counts.get("failed", 0)
            if document.get("status") in ENDED:
                self.ended.append((batch, document))
        self.poll_at, self.pause = time.monotonic() + self.pause, min(1.5 * self.pause, LONGEST_PAUSE)
        self._show_progress()

    def _show_progress(self) -> None:
        if self.open:
            total, done = sum(len(b.lines) for b in self.open), sum(self.progress.get(b.token, 0) for b in self.open)
            since = timedelta(seconds=round(time.time() - min(b.posted for b in self.open)))
            self.bar.set_description_str(
                f"batches: {done:,} of {total:,} requests finished, {len(self.open)} open, {since} since submission"
            )

    # --- an ended batch ---------------------------------------------------------------------------

    async def _end(self, batch: Submitted, document: dict) -> list[dict]:
        """The replies of an ended batch; all that it cost is charged."""
        status = document["status"]
        if status == "failed":
            self._give_back(batch)
            self._look_soon()
            if batch.token not in self.foreign:
                self._failed(batch, document)
            return []
        files = [document.get(name) for name in ("output_file_id", "error_file_id")]
        contents = [await self.content(file) for file in files if file]
        results, damaged = read_results(
            (line for c in contents for line in (c or b"").split(b"\n")), self.endpoint.redact
        )
        if unknown := len(results.keys() - batch.lines.keys()):
            self._note(f"batch {batch.id}: {unknown} results are of no request of it, and are left out.")
        replies, charges = [], Counter()
        # First those that were served: they show which parameters the model takes.
        for name in sorted(batch.lines, key=lambda name: name not in results or results[name].status != 200):
            if name in results and not results[name].unserved:
                reply, charge = self._outcome(name, batch.lines[name], results[name])
                charge.pop("peaks", None)
                charges.update(charge)
                if reply:
                    replies.append(reply)
            elif name in self.requests:
                self._missing(name, status, replies)
        missing = [line.amount for name, line in batch.lines.items() if name not in results]
        served = sum(results[name].status == 200 for name in results.keys() & batch.lines.keys())
        billed = _counts(document).get("completed", len(batch.lines) if None in contents else served + damaged)
        if (lost := min(billed - served, len(missing))) > 0:
            self._note(f"batch {batch.id}: {lost} replies are lost. They count at their upper estimate.")
            charges.update(requests=lost, cost=sum(sorted(missing, reverse=True)[:lost]))
        self.budget.settle(batch.owner, self.costs.peaks, **charges)
        self.budget.refused(self.model, self.parameters.dropped)
        self.open.remove(batch)
        self.read += [] if batch.token in self.foreign else [batch]
        self.hold_until = 0.0
        self._look_soon()
        if status == "cancelled" and self.waiting:
            self.end.fail(
                InputError(f"batch {batch.id} was cancelled at {self.server}. To ask the rest, run the same command.")
            )
        with contextlib.suppress(Retryable, InputError):
            await self.delete(batch.file, again=False)
        return replies

    def _outcome(self, name: str, line: Line, result: Result) -> tuple[dict | None, dict]:
        """(the reply, or None where there is none or the request waits again; what it adds to the account)."""
        request, charge = self.requests.get(name), {}
        reservation = Reservation(line.amount, line.prompt_tokens, line.least)
        try:
            if result.status != 200:
                raise self._failure(result.status or 500, {}, result.body, line.sent, self.left_out[name])
            reply = self._reply(request or Request(name, "", ""), result.body, line.sent)
            charge = self.costs.charge(reply.pop("usage"), reservation)
            self.pacer.replied()
            self.doubtful = 0
            return request and reply, charge
        except Unsupported:
            if request:
                self.waiting.append(request)  # now without the parameter
        except (Retryable, Refused) as failure:
            if failure.usage or failure.billed:
                charge = self.costs.charge(failure.usage, reservation)
            if request:
                return self._again(name, failure), charge
        except InputError as error:
            self.end.fail(error)
        return None, charge

    def _again(self, name: str, failure: Retryable | Refused) -> dict | None:
        """The error of a request; None where it waits for another round, or the run ends."""
        request = self.requests[name]
        if isinstance(failure, Retryable):
            self.failures[name] += 1
            if self.failures[name] < MAX_ROUNDS:
                self.waiting.append(request)
                return None
            failure = Refused(f"failed in {MAX_ROUNDS} batches: {failure}", permanent=False)
        elif self._end_for(failure):
            return None
        return {"key": request.key, "error": f"server: {failure}", "permanent": failure.permanent}

    def _missing(self, name: str, status: str, replies: list[dict]) -> None:
        """A request without a result: it waits again."""
        if status != "completed":
            self.waiting.append(self.requests[name])
        elif reply := self._again(name, Retryable("no result in a completed batch")):
            replies.append(reply)

    def _failed(self, batch: Submitted, document: dict) -> None:
        """The server has refused a batch as a whole, which costs nothing. Raises InputError unless its queue is full."""
        errors = (document.get("errors") or {}).get("data") or [{}]
        code, message = (str(errors[0].get(name) or "") for name in ("code", "message"))
        if code != "token_limit_exceeded":
            place = f", line {errors[0]['line']}" if errors[0].get("line") else ""
            why = self.endpoint.redact(without_secrets(message or code or "no reason given"))[:500]
            raise InputError(f"{self.model} at {self.server}: batch {batch.id} failed{place}: {why}")
        tokens, others = self._tokens(batch), sum(map(self._tokens, self.open))
        said = _QUEUE_LIMIT.search(message)
        limit = float(said[1].replace(",", "")) if said else math.inf
        self.most_tokens = min(self.most_tokens, limit if limit < tokens + others else others or tokens / 2)
        self.hold_until = math.inf if self.open else time.monotonic() + QUEUE_PAUSE
        self._note(f"the queue for {self.model} at {self.server} is full: further batches wait.")


def _counts(document: dict) -> dict[str, int]:
    """`request_counts`: "total", "completed", "failed"; without what is no number."""
    counts = document.get("request_counts")
    return {name: n for name, n in counts.items() if isinstance(n, int)} if isinstance(counts, dict) else {}
