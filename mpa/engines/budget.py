"""What a run has spent on servers: one account on disk for all its stages, calls and processes.

Money is reserved before a request is sent and charged when its reply arrives. So --max-cost is not exceeded, provided
the reservation covers what the server bills. A killed process's reservations count as spent: the server may bill them.
The reservation of a batch (`submitted.py`) belongs to the batch, and outlives the process that submitted it.
"""

import contextlib
import fcntl
import json
import math
import os
import socket
import sys
from pathlib import Path

from mpa.files.records import InputError, read_json, write_json

EMPTY_ACCOUNT = {"requests": 0, "tokens_in": 0, "tokens_out": 0, "cost": 0.0, "seconds": 0.0}
LOST_REPLIES = "requests whose reply was lost"  # the account of killed processes


class Budget:
    """The account of one stage in `path` (None: in memory), and the most that the whole run may cost (None: no limit).

    Costs are in the currency of the prices. Raises InputError where the file is damaged.
    """

    def __init__(self, path: Path | None, stage: str, max_cost: float | None = None):
        self.path, self.stage, self.max_cost = path, stage, max_cost
        self.owner, self.memory = f"{socket.gethostname()}:{os.getpid()}", {"spent": {}, "reserved": {}}
        with self._open() as ledger:
            for owner, amount in list(ledger["reserved"].items()):
                if not _is_running(owner):
                    _add(ledger, LOST_REPLIES, cost=amount)
                    del ledger["reserved"][owner]

    def reserve(self, amount: float, owner: str = "") -> bool:
        """Set `amount` aside, for this process or another `owner`; False where the run may not spend it any more."""
        owner = owner or self.owner
        with self._open() as ledger:
            if self.max_cost is not None and _committed(ledger) + amount > self.max_cost:
                return False
            ledger["reserved"][owner] = ledger["reserved"].get(owner, 0.0) + amount
            return True

    def settle(self, owner: str, peaks: dict | None = None, **spent) -> None:
        """As `charge`, for all that is set aside for `owner`. Without a reservation nothing: it was settled before."""
        with self._open() as ledger:
            if owner in ledger["reserved"]:
                del ledger["reserved"][owner]
                self._spend(ledger, peaks, spent)

    def charge(self, reserved: float, peaks: dict | None = None, **spent) -> None:
        """Give a reservation back and add what was spent (fields of EMPTY_ACCOUNT). `peaks` are figures for `peak`."""
        with self._open() as ledger:
            left = ledger["reserved"].get(self.owner, 0.0) - reserved
            ledger["reserved"][self.owner] = left
            if left <= 1e-12:
                ledger["reserved"].pop(self.owner)
            self._spend(ledger, peaks, spent)

    def _spend(self, ledger: dict, peaks: dict | None, spent: dict) -> None:
        known = ledger.setdefault("most", {})
        for name, value in (peaks or {}).items():
            known[name] = max(value, known.get(name, 0))
        _add(ledger, self.stage, **spent)

    def holds(self, owner: str) -> bool:
        """Whether something is set aside for `owner`."""
        with self._open() as ledger:
            return owner in ledger["reserved"]

    def left(self) -> float:
        """What may still be set aside."""
        with self._open() as ledger:
            return math.inf if self.max_cost is None else self.max_cost - _committed(ledger)

    def refused(self, model: str, more: dict[str, str] | None = None) -> dict[str, str]:
        """The parameters that a model does not take, as in `Parameters.dropped`, with `more` that a stage has found."""
        with self._open() as ledger:
            if more:
                ledger.setdefault("refused", {}).setdefault(model, {}).update(more)
            return dict(ledger.get("refused", {}).get(model, {}))

    def account(self) -> dict:
        """What this stage has asked for and spent, over all its calls."""
        with self._open() as ledger:
            return EMPTY_ACCOUNT | ledger["spent"].get(self.stage, {})

    def peak(self, name: str) -> float:
        """The largest value of a figure that any stage has recorded; 0 for none."""
        with self._open() as ledger:
            return ledger.get("most", {}).get(name, 0)

    def spent(self) -> float:
        """The cost of the whole run."""
        with self._open() as ledger:
            return _total_cost(ledger)

    @contextlib.contextmanager
    def _open(self):
        """The ledger, locked; written back if it was changed, whole or not at all."""
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
            ledger = read_json(self.path) if self.path.exists() else {"spent": {}, "reserved": {}}
            before = json.dumps(ledger)
            if not _is_ledger(ledger):
                raise InputError(f"{self.path}: not a spending file. Repair it, or choose another --run.")
            yield ledger
            if json.dumps(ledger) != before:
                write_json(self.path, ledger)


def _is_ledger(ledger) -> bool:
    """{"spent": {stage: account}, "reserved": {process: amount}, "most": {figure: value}}, all values numbers."""
    try:
        accounts = [EMPTY_ACCOUNT | account for account in ledger["spent"].values()]
        parts = (*accounts, ledger["reserved"], ledger.get("most", {}))
        return all(isinstance(n, int | float) for part in parts for n in part.values())
    except (KeyError, TypeError, AttributeError):
        return False


def _add(ledger: dict, stage: str, **spent) -> None:
    account = ledger["spent"].setdefault(stage, dict(EMPTY_ACCOUNT))
    for name, amount in spent.items():
        account[name] = round(account[name] + amount, 9) if isinstance(amount, float) else account[name] + amount


def _committed(ledger: dict) -> float:
    return _total_cost(ledger) + sum(ledger["reserved"].values())


def _total_cost(ledger: dict) -> float:
    return sum(account["cost"] for account in ledger["spent"].values())


def _is_running(owner: str) -> bool:
    """Whether the process "host:pid" runs; one on another machine is assumed to."""
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
