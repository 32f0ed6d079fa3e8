"""Requests made ready in threads ahead of the model, in an order that follow-ups may enter: for the vllm engine."""

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition, Thread

from mpa.engines import Request
from mpa.image_files import ImageError, open_image

READERS = 4  # threads that open images
AHEAD = 8  # requests made ready beyond those in flight; as many images again are open


@dataclass
class Row:
    """A request on its way."""

    request: Request
    follows: dict | None = None  # the reply whose follow-up it is
    opened: Future | None = None
    processed: dict | None = None  # what vLLM takes
    error: str = ""
    seen: int = 0  # characters of the reply


class Feed:
    """Rows made ready ahead of the model, at most AHEAD of them; a follow-up comes before all that are not ready yet.

    Threads open the images; one thread makes the rows ready, and they are taken in its order, which vLLM's
    cache of images relies on. `left` are those still to be taken.
    """

    def __init__(self, requests: list[Request], prepare: Callable):
        self.left, self.prepare = len(requests), prepare
        self.coming, self.opening = iter(requests), deque()
        self.pushed, self.ready = deque(), deque()
        self.changed, self.closed = Condition(), False
        self.pool = ThreadPoolExecutor(READERS, "images")
        self.thread = Thread(target=self._work, name="feed", daemon=True)
        self.thread.start()

    def push(self, row: Row) -> None:
        """Let a follow-up take its turn. Its image is opened again: to keep those of all that are in flight
        would take gigabytes."""
        row.opened = self.pool.submit(open_image, row.request.image_path)
        with self.changed:
            self.left += 1
            self.pushed.append(row)
            self.changed.notify_all()

    def take(self, wait: bool) -> Row | None:
        """The next row, or None where it is not ready and `wait` is false."""
        with self.changed:
            while wait and not self.ready:
                self.changed.wait()
            if not self.ready:
                return None
            row = self.ready.popleft()
            self.changed.notify_all()
        if isinstance(row, BaseException):
            raise row
        self.left -= 1
        return row

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()
        self.pool.shutdown(cancel_futures=True)

    def _work(self) -> None:
        try:
            while row := self._next():
                self._make_ready(row)
                with self.changed:
                    self.ready.append(row)
                    self.changed.notify_all()
        except BaseException as error:  # to be raised where the replies are made
            with self.changed:
                self.ready.append(error)
                self.changed.notify_all()

    def _next(self) -> Row | None:
        """The row whose turn it is, once there is room for it; None when closed."""
        for request in itertools.islice(self.coming, AHEAD - len(self.opening)):
            self.opening.append(Row(request, opened=self.pool.submit(open_image, request.image_path)))
        with self.changed:
            while not (self.closed or self.pushed or (self.opening and len(self.ready) < AHEAD)):
                self.changed.wait()
            if self.closed:
                return None
            return self.pushed.popleft() if self.pushed else self.opening.popleft()

    def _make_ready(self, row: Row) -> None:
        try:
            image = row.opened.result()
        except ImageError as error:
            row.error = f"image: {error}"
        else:
            row.processed, row.error = self.prepare(row.request, image)
        row.opened = None
