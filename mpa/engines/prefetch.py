"""Requests made ready in threads ahead of the model, for the `vllm` engine."""

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition, Thread

from mpa.engines import Request
from mpa.files.image_files import ImageError, open_image

READERS = 4  # threads that open images
AHEAD = 8  # requests made ready beyond those in flight; as many more images are open


@dataclass
class PendingRequest:
    """A request, from its image file to the end of its reply."""

    request: Request
    parent_reply: dict | None = None  # of a follow-up: the reply that it follows
    image: Future | None = None
    inputs: dict | None = None  # vLLM's
    error: str = ""
    scanned: int = 0  # characters of the reply that were searched for its last line


class Prefetcher:
    """Makes requests ready in their order, at most AHEAD of them; a follow-up goes first.

    Threads open the images. One thread calls `prepare(request, image) -> (inputs, error)`, and `take` returns the
    requests in that thread's order, which vLLM's cache of images relies on. `remaining` counts those not yet taken.
    """

    def __init__(self, requests: list[Request], prepare: Callable):
        self.remaining, self.prepare = len(requests), prepare
        self.unopened, self.opening = iter(requests), deque()
        self.follow_ups, self.ready = deque(), deque()
        self.changed, self.closed = Condition(), False
        self.readers = ThreadPoolExecutor(READERS, "images")
        self.thread = Thread(target=self._prepare_all, name="prefetcher", daemon=True)
        self.thread.start()

    def push(self, follow_up: PendingRequest) -> None:
        """Add a follow-up. Its image is opened again: to keep the images of all requests in flight takes gigabytes."""
        follow_up.image = self.readers.submit(open_image, follow_up.request.image_path)
        with self.changed:
            self.remaining += 1
            self.follow_ups.append(follow_up)
            self.changed.notify_all()

    def take(self, wait: bool) -> PendingRequest | None:
        """The next request; None where it is not ready and `wait` is false."""
        with self.changed:
            while wait and not self.ready:
                self.changed.wait()
            if not self.ready:
                return None
            pending = self.ready.popleft()
            self.changed.notify_all()
        if isinstance(pending, BaseException):
            raise pending
        self.remaining -= 1
        return pending

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.thread.join()
        self.readers.shutdown(cancel_futures=True)

    # --- in the thread ----------------------------------------------------------------------------

    def _prepare_all(self) -> None:
        try:
            while pending := self._next():
                self._prepare(pending)
                self._add_ready(pending)
        except BaseException as error:  # raised by `take`, in the caller's thread
            self._add_ready(error)

    def _add_ready(self, pending: PendingRequest | BaseException) -> None:
        with self.changed:
            self.ready.append(pending)
            self.changed.notify_all()

    def _next(self) -> PendingRequest | None:
        """The next request to prepare, once there is room for it; None when closed."""
        for request in itertools.islice(self.unopened, AHEAD - len(self.opening)):
            self.opening.append(PendingRequest(request, image=self.readers.submit(open_image, request.image_path)))
        with self.changed:
            while not (self.closed or self.follow_ups or (self.opening and len(self.ready) < AHEAD)):
                self.changed.wait()
            if self.closed:
                return None
            return self.follow_ups.popleft() if self.follow_ups else self.opening.popleft()

    def _prepare(self, pending: PendingRequest) -> None:
        try:
            image = pending.image.result()
        except ImageError as error:
            pending.error = f"image: {error}"
        else:
            pending.inputs, pending.error = self.prepare(pending.request, image)
        pending.image = None
