"""When the `openai` engine may send its next request: concurrency that adapts, and pauses.

Concurrency grows by one per round of replies, and is halved when the server says that there are too many requests
(additive increase, multiplicative decrease, as TCP does). As long as replies come in between, some concurrency is kept, and a short
pause is made by the refused request alone.
"""

import asyncio
import contextlib
import random
import time

from mpa.engines.end_of_run import EndOfRun, Stopped
from mpa.engines.responses import Retryable
from mpa.files.records import InputError

MAX_RETRIES = 8  # of a request, before it is given up; a rate limit is not a failed attempt
MAX_BACKOFF = 60.0  # seconds between two attempts, unless the server asks for more
LEAST_CONCURRENCY = 4  # as long as replies come in between
PAUSES_ALONE = (
    10  # in a row, without a reply in between, that the refused request makes alone; then all do, longer and longer
)
SHORT_PAUSE = 1.0  # seconds; a longer one is made by all requests
RATE_LIMIT_PATIENCE = 1800.0  # seconds without any reply, while the server says that there are too many requests


def backoff(retries: int, retry_after: float | None) -> float:
    """Seconds before the next attempt: exponential with jitter, and at least what the server asks for."""
    return max(min(0.5 * 2**retries, MAX_BACKOFF) * random.uniform(0.75, 1.25), retry_after or 0.0)


class Pacer:
    """Counts the requests in flight, and says when another one may be sent. `server` is its name in messages."""

    def __init__(self, concurrency: int, server: str, end: EndOfRun):
        self.concurrency, self.server, self.end = concurrency, server, end
        self.limit, self.in_flight = float(concurrency), 0
        self.resume_at = self.slowed_at = 0.0  # on the monotonic clock
        self.rate_limits = 0  # in a row
        self.replies = 0

    def start(self) -> None:
        """Begin in a new event loop."""
        self.changed, self.last_reply_at = asyncio.Condition(), time.monotonic()

    async def wait_for_slot(self) -> None:
        """Until a request may be sent. Raises Stopped where the run ends before."""
        while True:
            if self.end:
                raise Stopped
            pause = self.resume_at - time.monotonic()
            if pause > 0:  # each request resumes at a moment of its own, not all at once
                await self.end.sleep(pause + random.uniform(0, min(2.0, 0.1 * self.concurrency, pause)))
            elif self.in_flight < max(1, int(self.limit)):
                return
            else:
                await self.wait_for_change()

    async def wait_for_change(self) -> None:
        """Until a request in flight is finished, a second at most."""
        async with self.changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 1.0)

    async def release(self) -> None:
        """A request is in flight no more."""
        self.in_flight -= 1
        async with self.changed:
            self.changed.notify_all()

    def replied(self) -> None:
        self.replies += 1
        self.rate_limits, self.last_reply_at = 0, time.monotonic()
        self.limit = min(float(self.concurrency), self.limit + 1 / self.limit)

    def rate_limited(self, failure: Retryable, sent_at: float) -> float:
        """Fewer requests at a time, and a pause: for all, or for this request alone the seconds that are returned.

        Raises InputError after RATE_LIMIT_PATIENCE without a reply.
        """
        now, asked_for = time.monotonic(), failure.retry_after
        if now - self.last_reply_at > RATE_LIMIT_PATIENCE:
            minutes = RATE_LIMIT_PATIENCE / 60
            raise InputError(f"{self.server}: too many requests for {minutes:.0f} minutes: {failure}. Run again later.")
        first = sent_at > self.slowed_at  # of requests sent together, only the first rate limit counts
        self.rate_limits += first
        more = self.rate_limits - PAUSES_ALONE
        if first:
            least = LEAST_CONCURRENCY if more <= 0 else 1
            self.slowed_at, self.limit = now, min(self.limit, max(least, self.limit / 2))
        if more <= 0 and (asked_for or 0.0) <= SHORT_PAUSE:
            return asked_for * random.uniform(1.0, 1.25) if asked_for else backoff(0, None)
        pause = asked_for if more <= 0 else backoff(min(more, 10), asked_for)
        self.resume_at = max(self.resume_at, now + pause)
        return 0.0
