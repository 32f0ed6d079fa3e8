"""What a run has spent on servers, kept on disk: one account for all its stages, calls and processes.

Money is reserved before a request is sent and settled when its reply arrives, so that --max-cost is never exceeded, as far as
the reservation covers what the server bills. What a process that was killed had reserved counts as spent: it may be billed.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
from pathlib import Path

from mpa.records import InputError, read_json, write_json

ACCOUNT = {"requests": 0, "tokens_in": 0, "tokens_out": 0, "cost": 0.0, "seconds": 0.0}
CUT_OFF = "requests whose reply was lost"


class Budget:
    """The account of one stage in `path` (None: in memory), and a limit on what all of the run may cost (None: no limit).

    Costs are in the currency of the prices. Raises InputError where the file is damaged.
    """

    def __init__(self, path: Path | None, stage: str, most: float | None = None):
        self.path, self.stage, self.most = path, stage, most
        self.owner, self.memory = f"{socket.gethostname()}:{os.getpid()}", {"spent": {}, "reserved": {}}
        with self._book() as book:
            for owner, amount in list(book["reserved"].items()):
                if not _alive(owner):
                    self._charge(book, CUT_OFF, cost=amount)
                    del book["reserved"][owner]

    def reserve(self, amount: float) -> bool:
        """Whether `amount` may still be spent; then it is set aside."""
        with self._book() as book:
            if self.most is not None and self._total(book) + amount > self.most:
                return False
            book["reserved"][self.owner] = book["reserved"].get(self.owner, 0.0) + amount
            return True

    def settle(self, reserved: float, most: dict | None = None, **spent) -> None:
        """Give a reservation back, and book what was spent of it (fields of ACCOUNT); `most` are figures to `remember`."""
        with self._book() as book:
            seen = book.setdefault("most", {})
            for name, value in (most or {}).items():
                seen[name] = max(value, seen.get(name, 0))
            left = book["reserved"].get(self.owner, 0.0) - reserved
            book["reserved"][self.owner] = left
            if left <= 1e-12:
                book["reserved"].pop(self.owner)
            self._charge(book, self.stage, **spent)

    def account(self) -> dict:
        """What this stage has asked for and spent, over all its calls."""
        with self._book() as book:
            return ACCOUNT | book["spent"].get(self.stage, {})

    def remember(self, name: str) -> float:
        """The most that was ever told of a figure, by any stage; 0 for none."""
        with self._book() as book:
            return book.get("most", {}).get(name, 0)

    def spent(self) -> float:
        """By the whole run."""
        with self._book() as book:
            return sum(account["cost"] for account in book["spent"].values())

    def _charge(self, book: dict, stage: str, **spent) -> None:
        account = book["spent"].setdefault(stage, dict(ACCOUNT))
        for name, amount in spent.items():
            account[name] = round(account[name] + amount, 9) if isinstance(amount, float) else account[name] + amount

    def _total(self, book: dict) -> float:
        return sum(account["cost"] for account in book["spent"].values()) + sum(book["reserved"].values())

    @contextlib.contextmanager
    def _book(self):
        """The book, ours alone; written back, whole or not at all."""
        if self.path is None:
            yield self.memory
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                print(
                    f"warning: {self.path}: cannot be locked ({error.strerror}); run one stage at a time.",
                    file=sys.stderr,
                )
            book = read_json(self.path) if self.path.exists() else {"spent": {}, "reserved": {}}
            before = json.dumps(book)
            try:
                accounts = [ACCOUNT | account for account in book["spent"].values()]
                whole = all(
                    isinstance(n, int | float)
                    for a in (*accounts, book["reserved"], book.get("most", {}))
                    for n in a.values()
                )
            except (KeyError, TypeError, AttributeError):
                whole = False
            if not whole:
                raise InputError(f"{self.path}: no account of a run. Mend it, or choose another --run.")
            yield book
            if json.dumps(book) != before:
                write_json(self.path, book)


def _alive(owner: str) -> bool:
    """Whether the process runs that has reserved; one of another machine is taken to run."""
    host, _, pid = owner.rpartition(":")
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
