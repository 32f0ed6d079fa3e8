"""How a run of the `openai` engine ends early: by a failure that concerns every request, or by a signal."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator


class Stopped(Exception):
    """The run ends before this request was sent."""


class EndOfRun:
    """Whether the run ends, and why. Then nothing new is sent. Requests under way are awaited, as they are paid."""

    stopping = "waiting for the requests under way, which are paid for"  # what is said when a signal comes

    def __init__(self):
        self.failure: BaseException | None = None
        self.signal = 0

    def __bool__(self) -> bool:
        return bool(self.failure or self.signal)

    def fail(self, failure: BaseException) -> None:
        """End the run; the first failure is the one that is raised."""
        self.failure = self.failure or failure
        self.event.set()

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """An error of the disk within this block ends the run; what follows the block is still done."""
        try:
            yield
        except OSError as error:
            self.fail(error)

    async def sleep(self, seconds: float) -> None:
        """Raises Stopped as soon as the run ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.event.wait(), seconds)
        if self:
            raise Stopped

    @contextlib.contextmanager
    def watch(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Within this block, SIGINT and SIGTERM end the run cleanly, and a second Ctrl-C ends the process at once.

        After it, the signal is handled as it would have been, and KeyboardInterrupt or the failure is raised.
        """
        self.event, earlier = asyncio.Event(), {}

        def receive(number: int) -> None:
            if self.signal and number == signal.SIGINT:
                os._exit(130)
            self.signal = number
            self.event.set()
            print(f"stopping: {self.stopping}.", file=sys.stderr)

        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread, not Unix
                earlier[number] = signal.getsignal(number)
                loop.add_signal_handler(number, receive, number)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                with contextlib.suppress(ValueError, RuntimeError):
                    loop.remove_signal_handler(number)
                    signal.signal(number, handler)
        if self.signal:
            if callable(handler := earlier.get(self.signal)):
                handler(self.signal, None)
            raise KeyboardInterrupt
        if self.failure:
            raise self.failure
