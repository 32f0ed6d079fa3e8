"""The processes of torchrun on this machine: they end together, and say once why."""

import signal
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))  # the repository, for mpa

from torch.distributed.elastic.multiprocessing import SubprocessContext

from mpa.files import distributed

GRACE = 30.0  # seconds that the others have once the first has ended
LIKELY = {signal.SIGKILL: "memory ran out", signal.SIGABRT: "it waited too long for another rank"}


class Ranks(SubprocessContext):
    """torchrun's processes. Once one has ended, in whatever way, the others have GRACE seconds, and are then killed.

    They may wait for it inside a collective, where they hear no SIGTERM. torchrun alone would go on waiting where one ends normally,
    and where one fails while they save a checkpoint.
    """

    first_end: float | None = None
    told: signal.Signals | None = None  # from outside, to stop

    def _alive(self) -> list:
        alive = [handler for handler in self.subprocess_handlers.values() if handler.proc.poll() is None]
        if len(alive) < self.nprocs and self.first_end is None:
            self.first_end = time.monotonic()
            for rank, handler in self.subprocess_handlers.items():
                self._say_signal(self.envs[rank]["RANK"], -(handler.proc.returncode or 0))
        return alive

    def _say_signal(self, rank: str, number: int) -> None:
        if number > 0 and number != self.told:
            why = f", most likely because {LIKELY[number]}" if number in LIKELY else ""
            self._say(f"error: rank {rank} was ended by signal {number}{why}. Run the same command again to go on.")

    def _say(self, text: str) -> None:
        if distributed.claim(self.error_files[0]):
            print(text, file=sys.stderr)

    def _overdue(self) -> bool:
        return self.first_end is not None and time.monotonic() - self.first_end > GRACE

    def _poll(self):
        if self._alive() and self._overdue():  # else torchrun would have closed them
            self._say(f"error: a rank ended without an error, and the others were still running {GRACE:.0f} s later.")
            super()._close(signal.SIGKILL)
        return super()._poll()

    def _close(self, death_sig: signal.Signals, timeout: float = GRACE) -> None:
        alive, until = self._alive(), time.monotonic() + timeout
        if self.first_end is None:
            self.told = death_sig
        for handler in alive:
            handler.close(death_sig)
        while self._alive() and not self._overdue() and time.monotonic() < until:
            time.sleep(0.1)
        super()._close(signal.SIGKILL)  # those that are left
