"""The `ray` engine: another engine in every actor of a Ray Data pool, over all nodes of a cluster.

Paths and prompts travel, no pixels: the actors read the images, so that repository, images and model lie at the
same places on every node. With $RAY_ADDRESS it joins a cluster, else it starts one of this machine alone.
A dead actor is started anew and its batch done again; replies come as batches finish, in any order.
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
from mpa.engines.budget import Budget
from mpa.records import InputError

ROOT = Path(__file__).resolve().parents[2]
TRIES = 4  # of a batch whose actors die, before it is held to be the cause
AT_ONCE = 32  # times the batch size is what an engine gets that makes its own batches
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send nothing home
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # what fails is raised, too
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning
}


class RayEngine:
    """`generate` by `actors` engines `ray_engine`, which take `settings` and load the model once each.

    An actor has a GPU to itself (with tensor parallelism, several) where the cluster has GPUs, else two cores. None is
    as many actors as that gives; for a model behind a server, one a node.
    """

    def __init__(self, model_path: str, ray_engine: str = "hf", actors: int | None = None, batch_size=8, **settings):
        settings |= {"batch_size": batch_size, "workers": 0}
        self.inner, self.actors, self.batch_size = ray_engine, actors, batch_size
        self.settings = {name: settings[name] for name in ENGINES[ray_engine].settings if name in settings}
        self.settings["model_path"] = os.path.abspath(model_path) if os.path.isdir(model_path) else model_path
        self.gpus = self.settings.get("tensor_parallel_size", 1) * self.settings.get("pipeline_parallel_size", 1)
        self.told: dict[str, dict] = {}  # by host and process: the facts of its engine
        self.share, self.ours, self.started = {}, False, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """End the cluster that was started here; from one that was joined, take the actors away."""
        if self.ours:
            import ray

            ray.shutdown()
            self.ours = False

    def load(self) -> None:
        """Start or join the cluster, and see how many actors fit in it."""
        if self.share:
            return
        import ray

        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS")
            alone = {"include_dashboard": False, "object_store_memory": 200 * 2**20}  # replies are small
            try:
                with _silent(), contextlib.chdir(ROOT):  # the actors import from where it was called
                    ray.init(
                        address or "local", log_to_driver=False, logging_level="ERROR", **({} if address else alone)
                    )
            except ConnectionError as error:
                raise InputError(
                    f"RAY_ADDRESS={address}: no Ray cluster there, or it wants another token than ~/.ray/auth_token ({error})."
                ) from None
            self.ours = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._divide([int(n.get("CPU", 0)) for n in nodes], [int(n.get("GPU", 0)) for n in nodes])

    def _divide(self, cores: list[int], gpus: list[int]) -> None:
        """`actors`, and what each takes of the nodes that have these cores and GPUs. Raises InputError if too little."""
        if not ENGINES[self.inner].local:
            self.actors, most, self.share = self.actors or len(cores), sum(cores), {"num_cpus": 1}
        elif sum(gpus) and self.settings.get("device") != "cpu":
            most, self.share = sum(n // self.gpus for n in gpus), {"num_gpus": self.gpus, "num_cpus": 1}
            self.actors = self.actors or most
        else:
            self.actors, most = self.actors or sum(max(1, n // 2) for n in cores if n), sum(cores)
            fits = [n for n in range(1, max(cores) + 1) if sum(here // n for here in cores) >= self.actors]
            self.share = {"num_cpus": max(fits, default=1)}  # Ray sets OMP_NUM_THREADS to it
        if not 0 < self.actors <= most:
            raise InputError(
                f"--actors {self.actors}: the cluster has room for {most}, with {sum(cores)} CPUs and {sum(gpus)} GPUs "
                f"of which each takes {' and '.join(f'{n} {name[4:]}' for name, n in self.share.items())}."
            )

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies a batch at a time. An actor has one batch under way and one to follow."""
        left = [replace(r, image_path=os.path.abspath(r.image_path)) for r in requests if r.key not in done]
        if not left:
            return
        self.load()
        import ray
        from ray.data import ActorPoolStrategy, DataContext
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        n = self.batch_size
        if self.inner != "hf":
            n = max(n, min(AT_ONCE * n, len(left) // (2 * self.actors)))
        # Pickled, as Arrow takes no text that is no Unicode. One batch is one block, and so one task.
        rows = [{"number": i, "packed": pickle.dumps(left[i : i + n])} for i in range(0, len(left), n)]
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        alive = {"max_restarts": -1, "max_task_retries": -1}  # begun anew with its counts at 0
        tries = ray.remote(Tries).options(num_cpus=0, scheduling_strategy=here, **alive).remote()
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # none: a batch may take long
        size, settings = min(self.actors, len(rows)), dict(self.settings)
        ledger = settings.pop("ledger", None)
        budget = Budget(Path(ledger), f"ray {settings['model_path']}") if ledger else None
        if budget and settings.get("max_cost") is not None:  # to each its part of what is left of the run's
            settings["max_cost"] = max(0.0, settings["max_cost"] - budget.spent()) / size
        finished = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(
                Actor,
                fn_constructor_args=(self.inner, settings, tries),
                compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
                **self.share,
            )
            .iter_batches(batch_size=None, prefetch_batches=0)
        )
        self.started, failure = time.perf_counter(), ""
        for block in finished:
            for packed in block["packed"]:
                actor, replies, facts, error = pickle.loads(packed)
                if budget:
                    before = self.told.get(actor) or {}
                    names = ("requests", "tokens_in", "tokens_out", "cost")
                    budget.charge(0.0, **{name: facts.get(name, 0) - before.get(name, 0) for name in names})
                self.told[actor] = facts
                if replies:
                    yield replies
                failure = failure or error
            if failure and ENGINES[self.inner].local:
                break
            if failure:  # what the other actors have asked a server for may have been paid for
                tries.stop.remote()
        if failure:
            raise InputError(failure)

    def facts(self) -> dict:
        """What the actors' engines tell: counts and cost summed up, the mean of shares."""
        told = [facts for facts in self.told.values() if facts]  # an actor whose engine did not open has none
        of_all = dict(told[0]) if told else {}
        for name, value in of_all.items():
            if isinstance(value, (int, float)):
                total = sum(facts.get(name) or 0 for facts in told)
                share = isinstance(value, float) and name != "cost"
                of_all[name] = round(total / len(told), 4) if share else total
        return {**of_all, "engine": self.inner, "actors": self.actors}

    def status(self) -> str:
        facts, seconds = self.facts(), max(time.perf_counter() - self.started, 1e-9)
        cost = f", cost {facts['cost']:.2f}" if facts.get("cost") else ""
        tokens = facts.get("tokens", facts.get("tokens_out", 0))
        return f"{tokens / seconds:.0f} tokens/s, {len(self.told)} actors{cost}"


class Actor:
    """Holds one engine, opened with the first batch. What a user can mend comes back as text, so that Ray does not retry."""

    def __init__(self, name: str, settings: dict, tries):
        self.name, self.settings, self.tries, self.engine = name, settings, tries, None
        self.place = f"{socket.gethostname()}:{os.getpid()}"

    def __call__(self, row: dict) -> dict:
        import ray

        replies, error = [], ""
        tried = ray.get(self.tries.begin.remote(int(row["number"])))
        try:
            if tried > TRIES:
                raise InputError(
                    f"a batch's actors died {TRIES} times, most likely for want of memory. Try a smaller --batch-size; "
                    "what is finished is kept. Ray's logs: /tmp/ray/session_latest/logs on each node."
                )
            self.engine = self.engine or open_engine(self.name, **self.settings).__enter__()
            for finished in self.engine.generate(pickle.loads(row["packed"]) if tried else ()):
                replies += finished
        except InputError as failure:
            error = str(failure)
        facts = self.engine.facts() if self.engine else {}
        return {"packed": pickle.dumps((self.place, replies, facts, error))}


class Tries:
    """How often each batch has been begun: Ray repeats what died without end, and counts a lost connection, too."""

    def __init__(self):
        self.begun, self.stopped = Counter(), False

    def begin(self, batch: int) -> int:
        """Which try of the batch this is; 0: leave it."""
        self.begun[batch] += 1
        return 0 if self.stopped else self.begun[batch]

    def stop(self) -> None:
        self.stopped = True


@contextlib.contextmanager
def _silent():
    """Nothing reaches file descriptor 2: Ray's C++ tells there that it has been told to log less."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
