"""Worker processes of the `hf` engine: forked copies of the engine that work ahead of it."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from mpa.files.records import InputError
from mpa.files.signals import follow_parent, signals_held

BATCHES_AHEAD = 2  # per worker


class WorkerPool:
    """`count` processes, each with a copy of `engine` as it is now. Linux only.

    On a CPU the engine must hold its model by now: the workers share its weights. With a GPU it must not have touched
    the device, since CUDA does not survive a fork.
    """

    def __init__(self, engine, count: int):
        self.count = count
        self.pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start_worker, (engine,))
        with signals_held():
            self.pool.submit(int).result()  # fork them now

    def run_ahead(self, method: Callable, batches: Iterable[list], ahead: int = BATCHES_AHEAD) -> Iterator[tuple]:
        """(batch, method(engine, batch)) in order, `ahead` batches per worker before the caller; `method` is the engine's."""
        submitted = deque()
        try:
            for batch in batches:
                submitted.append((batch, self.pool.submit(_call, method, batch)))
                if len(submitted) > ahead * self.count:
                    first, future = submitted.popleft()
                    yield first, future.result()
            for first, future in submitted:
                yield first, future.result()
        except BrokenProcessPool:
            raise InputError(
                "a worker process died, probably because the memory was full. Try a smaller --batch-size or fewer "
                "--workers. Finished replies are kept."
            ) from None

    def close(self, kill: bool) -> None:
        """End the workers, with `kill` in the middle of a batch that nobody waits for any more."""
        for worker in list((self.pool._processes or {}).values()) if kill else ():
            worker.kill()
        self.pool.shutdown(cancel_futures=True)


# --- in the workers ---------------------------------------------------------------------------------


def _start_worker(engine) -> None:
    global _engine
    _engine = engine
    torch.set_num_threads(1)
    follow_parent()


def _call(method: Callable, batch: list):
    return method(_engine, batch)
