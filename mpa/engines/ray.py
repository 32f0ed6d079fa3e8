"""The `ray` engine: another engine in each actor of a Ray Data pool, over all nodes of a cluster.

Paths and prompts are sent, not images: the actors read them, so repository, images and model must have the same paths
on every node. With $RAY_ADDRESS the engine joins a cluster, else it starts one on this machine.
An actor that dies is started again and its batch is done again. Replies come as batches finish, in any order.
"""

import contextlib
import logging
import os
import pickle
import socket
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mpa.engines import ENGINES, Request, open_engine
from mpa.engines.batch_plan import ROWS
from mpa.engines.budget import Budget
from mpa.files.records import InputError

ROOT = Path(__file__).resolve().parents[2]
MAX_ATTEMPTS = 4  # of a batch whose actors die, before the batch is held to be the cause
CHUNK = 32  # batch sizes sent at a time to an engine that makes its own batches
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # failures are raised as exceptions, too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning
}


class RayEngine:
    """A pool of `actors`, each with an engine called `ray_engine` that takes `settings` and loads the model once.

    An actor has one GPU (with tensor or pipeline parallelism, several) where the cluster has GPUs, else two cores.
    `actors` None: as many as fit; for a model behind a server, one per node.
    """

    def __init__(self, model_path: str, ray_engine: str = "hf", actors: int | None = None, batch_size=None, **settings):
        settings |= {"batch_size": batch_size, "workers": 0}
        self.inner_engine, self.actors, self.batch_size = ray_engine, actors, batch_size
        self.settings = {name: settings[name] for name in ENGINES[ray_engine].settings if name in settings}
        self.settings["model_path"] = os.path.abspath(model_path) if os.path.isdir(model_path) else model_path
        parallel = ("tensor_parallel_size", "pipeline_parallel_size")
        self.gpus_per_actor = self.settings.get(parallel[0], 1) * self.settings.get(parallel[1], 1)
        self.actor_facts: dict[str, dict] = {}  # by host and process
        self.actor_resources, self.started_cluster, self.started = {}, False, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End a cluster that was started here, or leave one that was joined, which ends the actors."""
        if self.started_cluster:
            import ray

            ray.shutdown()
            self.started_cluster = False

    def facts(self) -> dict:
        """The facts of the actors' engines: sums of counts and costs, means of shares."""
        known = [facts for facts in self.actor_facts.values() if facts]  # none where the engine did not open
        combined = dict(known[0]) if known else {}
        for name, value in combined.items():
            if isinstance(value, (int, float)):
                total = sum(facts.get(name) or 0 for facts in known)
                is_share = isinstance(value, float) and name != "cost"
                combined[name] = round(total / len(known), 4) if is_share else total
        return {**combined, "engine": self.inner_engine, "actors": self.actors}

    def status(self) -> str:
        facts, seconds = self.facts(), max(time.perf_counter() - self.started, 1e-9)
        cost = f", cost {facts['cost']:.2f}" if facts.get("cost") else ""
        tokens = facts.get("tokens", facts.get("tokens_out", 0))
        return f"{tokens / seconds:.0f} tokens/s, {len(self.actor_facts)} actors{cost}"

    # --- the cluster ------------------------------------------------------------------------------

    def load(self) -> None:
        """Start or join the cluster, and divide it among the actors."""
        if self.actor_resources:
            return
        import ray

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            local = {"include_dashboard": False, "object_store_memory": 200 * 2**20}  # replies are small
            try:
                with _silent(), contextlib.chdir(ROOT):  # the actors import from the working directory
                    ray.init(
                        address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else local)
                    )
            except ConnectionError as error:
                raise InputError(
                    f"RAY_ADDRESS={address}: no Ray cluster at this address, or its token is not the one in "
                    f"~/.ray/auth_token ({error})."
                ) from None
            self.started_cluster = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._divide_cluster([int(n.get("CPU", 0)) for n in nodes], [int(n.get("GPU", 0)) for n in nodes])

    def _divide_cluster(self, cores: list[int], gpus: list[int]) -> None:
        """Set `actors` and `actor_resources` for nodes with these cores and GPUs. InputError where they do not fit."""
        if not ENGINES[self.inner_engine].local:
            self.actors, most, self.actor_resources = self.actors or len(cores), sum(cores), {"num_cpus": 1}
        elif sum(gpus) and self.settings.get("device") != "cpu":
            most = sum(n // self.gpus_per_actor for n in gpus)
            self.actor_resources = {"num_gpus": self.gpus_per_actor, "num_cpus": 1}
            self.actors = self.actors or most
        else:
            self.actors, most = self.actors or sum(max(1, n // 2) for n in cores if n), sum(cores)
            fits = [n for n in range(1, max(cores) + 1) if sum(node // n for node in cores) >= self.actors]
            self.actor_resources = {"num_cpus": max(fits, default=1)}  # Ray sets OMP_NUM_THREADS to it
        if not 0 < self.actors <= most:
            needs = " and ".join(f"{n} {name[4:]}" for name, n in self.actor_resources.items())
            raise InputError(
                f"--actors {self.actors}: the cluster has room for {most}: {sum(cores)} CPUs and {sum(gpus)} GPUs, "
                f"of which each takes {needs}."
            )

    # --- the path of a request --------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies, a batch at a time. An actor has one batch in work and one queued."""
        left = [replace(r, image_path=os.path.abspath(r.image_path)) for r in requests if r.key not in done]
        if not left:
            return
        self.load()
        size = self.batch_size or ROWS
        if self.inner_engine != "hf" or (self.batch_size is None and "num_gpus" in self.actor_resources):
            size = max(size, min(CHUNK * size, len(left) // (2 * self.actors)))
        # Pickled, as Arrow takes only Unicode text. A batch is one row, one block, and so one task.
        rows = [{"number": i, "packed": pickle.dumps(left[i : i + size])} for i in range(0, len(left), size)]
        attempts = _attempt_counter()
        actors, settings = min(self.actors, len(rows)), dict(self.settings)
        ledger = settings.pop("ledger", None)
        budget = Budget(Path(ledger), f"ray {settings['model_path']}") if ledger else None
        if budget and settings.get("max_cost") is not None:  # each actor gets an equal part of what is left
            settings["max_cost"] = max(0.0, settings["max_cost"] - budget.spent()) / actors
        self.started, failure = time.perf_counter(), ""
        for actor, replies, facts, error in self._results(rows, actors, settings, attempts):
            if budget:
                before = self.actor_facts.get(actor) or {}
                names = ("requests", "tokens_in", "tokens_out", "cost")
                budget.charge(0.0, **{name: facts.get(name, 0) - before.get(name, 0) for name in names})
            self.actor_facts[actor] = facts
            if replies:
                yield replies
            failure = failure or error
            if failure and ENGINES[self.inner_engine].local:
                break
            if failure:  # replies that the other actors wait for may be paid for: let them finish
                attempts.stop.remote()
        if failure:
            raise InputError(failure)

    def _results(self, rows: list[dict], actors: int, settings: dict, attempts) -> Iterator[tuple]:
        """What `Actor` returns for each row, unpickled, as the rows finish."""
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        logging.getLogger("ray.data").setLevel(logging.ERROR)  # its import sets another level
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # none: a batch may take long
        finished = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(
                Actor,
                fn_constructor_args=(self.inner_engine, settings, attempts),
                compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
                **self.actor_resources,
            )
            .iter_batches(batch_size=None, prefetch_batches=0)
        )
        for block in finished:
            yield from map(pickle.loads, block["packed"])


class Actor:
    """Holds one engine, opened with the first batch. An InputError is returned as text, so that Ray does not retry."""

    def __init__(self, name: str, settings: dict, attempts):
        self.name, self.settings, self.attempts, self.engine = name, settings, attempts, None
        self.process = f"{socket.gethostname()}:{os.getpid()}"

    def __call__(self, row: dict) -> dict:
        import ray

        replies, error = [], ""
        attempt = ray.get(self.attempts.begin.remote(int(row["number"])))
        try:
            if attempt > MAX_ATTEMPTS:
                raise InputError(
                    f"a batch's actors died {MAX_ATTEMPTS} times, probably because the memory was full. Try a smaller "
                    "--batch-size. Finished replies are kept. Ray's logs: /tmp/ray/session_latest/logs on each node."
                )
            self.engine = self.engine or open_engine(self.name, **self.settings).__enter__()
            for finished in self.engine.generate(pickle.loads(row["packed"]) if attempt else ()):
                replies += finished
        except InputError as failure:
            error = str(failure)
        facts = self.engine.facts() if self.engine else {}
        return {"packed": pickle.dumps((self.process, replies, facts, error))}


class AttemptCounter:
    """Counts the attempts at each batch: Ray repeats without end what died, and counts a lost connection as a death."""

    def __init__(self):
        self.attempts, self.stopped = Counter(), False

    def begin(self, batch: int) -> int:
        """The number of this attempt; 0: skip the batch."""
        self.attempts[batch] += 1
        return 0 if self.stopped else self.attempts[batch]

    def stop(self) -> None:
        self.stopped = True


def _attempt_counter():
    """An AttemptCounter as a Ray actor on this node, restarted with counts of 0 if it dies."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": this_node, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(AttemptCounter).options(**options).remote()


@contextlib.contextmanager
def _silent():
    """Discards what is written to file descriptor 2: there Ray's C++ code reports that its log level was lowered."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
