"""What PA, PI and evaluate share: a model, the engine that runs it, the settings that decide the outcome, the result."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from mpa import distributed, records
from mpa.engines import ENGINES, Request, open_engine
from mpa.image_files import image_size
from mpa.journal import Journal, finished
from mpa.models import check_model_path, format_marks, identity, resolved_dtype
from mpa.packages import require
from mpa.records import InputError

# Arguments that decide a stage's outcome, with those of `Model.deciding`. Batch size, workers and the engine of greedy replies do not: they are free.
DECIDING = ("dataset", "limit", "sample", "preset", "seed", "max_new_tokens", "min_pixels", "max_pixels")


class Model:
    """A model as the arguments say to run it: the L-VLM may have an engine of its own."""

    def __init__(self, args, path: str):
        self.args, self.path = args, path
        is_lvlm = path == getattr(args, "model_path_lvlm", None)
        self.engine_name = getattr(args, "engine_lvlm", None) or args.engine if is_lvlm else args.engine
        # With Ray, the engine whose replies these are is that of its actors.
        self.replies_from = args.ray_engine if self.engine_name == "ray" else self.engine_name
        self.local = ENGINES[self.replies_from].local
        self.quantization = args.quantization if is_lvlm else None

    def check(self) -> None:
        """Raise InputError for a folder that holds no whole model, before anything heavy is imported."""
        if self.quantization:
            require(f"--quantization {self.quantization}", "quantization", "bitsandbytes")
        if self.replies_from != "hf" and (self.quantization or self.args.device_map):
            flag = "--quantization" if self.quantization else "--device-map"
            raise InputError(
                f"{flag}: is for --engine hf, and {self.path} runs with {self.replies_from}. With vllm, name an AWQ, GPTQ or "
                "FP8 checkpoint, which needs no flag, and spread it with --tensor-parallel-size."
            )
        if self.local:
            check_model_path(self.path)

    @property
    def identity(self) -> str:
        """A digest of a local model's files; the name of one behind a server."""
        return identity(self.path) if self.local else self.path

    @property
    def dtype(self) -> str:
        """The dtype that "auto" comes down to here: it is another one on another machine."""
        return resolved_dtype(self.args.dtype, self.args.device) if self.local else self.args.dtype

    @property
    def marks(self) -> frozenset[str]:
        """What the model's prompt format takes for its own: no question or answer may hold it."""
        return format_marks(self.path if self.local else None, self.args.trust_remote_code)

    def engine(self):
        """The engine, ready to load the model when it is first asked."""
        self.check()
        settings = {name: getattr(self.args, name) for name in ENGINES[self.engine_name].settings}
        settings |= {"quantization": self.quantization} if "quantization" in settings else {}
        return open_engine(self.engine_name, model_path=self.path, **settings)

    def deciding(self) -> dict:
        """What of the model's settings decides its replies. A model that is not quantised has no such entry."""
        settings = {"model": self.identity, "dtype": self.dtype}
        return settings | ({"quantization": self.quantization} if self.quantization else {})

    def check_memory(self) -> None:
        """Raise InputError for a model of the hf engine whose weights cannot fit into the memory; reads no weights."""
        if self.engine_name == "hf":
            from mpa.engines.memory import check_weights

            check_weights(self.path, self.args, self.quantization)

    def dry_run(self, requests: Sequence[Request], label: str) -> None:
        """Print how much there is to ask and how long it would take, from the pace of a few requests. Keeps nothing."""
        with self.engine() as engine:
            list(engine.generate(requests[:1]))  # loads the model
            at_once = self.args.batch_size * max(1, getattr(engine, "workers", 1) or 1)
            some = requests[1 : 1 + 2 * at_once] or requests[:1]  # two batches for each worker
            before, started = engine.facts(), time.perf_counter()
            n = sum(len(replies) for replies in engine.generate(some))
            seconds, after = time.perf_counter() - started, engine.facts()
            memory = engine.memory_line(requests) if hasattr(engine, "memory_line") else ""
        images = [request.image_path for request in requests]
        print(f"{label}: {len(requests):,} requests about {len(set(images)):,} images.")
        print(f"  visual tokens of Qwen2-VL, some: {visual_tokens(images, self.args):,}")
        if memory:
            print(f"  memory, estimated: {memory}")
        print(f"  time, by the pace of {n}: {timedelta(seconds=round(seconds / n * len(requests)))}")
        if "cost" in after:
            spent = after["cost"] - before["cost"]
            print(f"  cost, by that of {n}: {spent / n * len(requests):.2f} (this trial: {after['cost']:.4f})")


class Stage:
    """One model's replies in one result file, resumably.

    if stage.finished(): return
    with stage.running() as engine:
        ask(engine, requests, stage.journal, stage.label)
    stage.write(result, passing=…, usable=…)

    `content` is all that goes into the records beside the replies, as JSON can hold it; `choices` are further settings
    that decide the outcome. Raises InputError where `out` or its journal was made with other settings.
    """

    def __init__(self, model: Model, out: Path, label: str, content: list, **choices):
        self.model, self.out, self.label, self.started = model, out, label, time.time()
        self.settings = {name: getattr(model.args, name) for name in DECIDING} | model.deciding()
        self.settings |= {**choices, "content": records.digest(json.dumps(content))}
        self.journal: Journal | None = None
        self.facts = {}

    def finished(self) -> bool:
        """Whether the result is there, made with these settings; said to the user."""
        there = finished(self.out, self.settings, self.model.args.restart)
        if there:
            print(f"{self.label}: {self.out} is there already, made with these settings (--restart makes it anew).")
        return there

    @contextlib.contextmanager
    def running(self) -> Iterator:
        """The engine; and `journal`, which keeps each reply as it comes."""
        with self.model.engine() as engine:
            self.journal = Journal(self.out, self.settings, self.model.args.restart)
            yield engine
            self.facts = engine.facts()

    def write(self, result: list[dict], passing: int, usable: int, **facts) -> None:
        """Write the result and its meta file. The journal goes when nothing is left to ask.

        `passing` is how many replies failed for reasons that may pass, `usable` how many did not fail.
        """
        unfinished = passing or (0 if usable else len(result))
        facts = {"model_path": self.model.path, **self.facts, **facts, "unfinished": unfinished}
        seconds = round(time.time() - self.started, 1)
        records.write_result(self.out, result, self.settings, **facts, seconds=seconds)
        if account := account_line(self.facts):
            print(f"{self.label}: {account}")
        if cut := short_replies(result):
            print(f"{self.label}: {cut}.")
        if passing:
            print(f"{self.label}: {passing} replies failed for reasons that may pass. The same command asks again.")
        if self.journal:
            self.journal.close(remove=distributed.FIRST and not unfinished)


def account_line(facts: dict) -> str:
    """What a server was asked for and what it cost; "" where nothing is counted."""
    if "tokens_in" not in facts:
        return ""
    cost = f", cost {facts['cost']:.4f}" if facts["cost"] else ""
    return f"{facts['requests']:,} replies, {facts['tokens_in']:,} tokens in and {facts['tokens_out']:,} out{cost}."


def short_replies(result: list[dict]) -> str:
    """ "2 answers cut off at the token limit, 1 stopped by the content filter": of records whose answer was cut."""
    why = {"length": "cut off at the token limit (--max-new-tokens)", "content_filter": "stopped by the content filter"}
    reasons = Counter(r["finish_reason"] for r in result if "predictions" in r and r.get("finish_reason"))
    return ", ".join(f"{n} answers {why.get(reason, f'ended by {reason!r}')}" for reason, n in reasons.most_common())


def counted(reasons) -> str:
    """ "3 left out: 2 no answer, 1 two questions", or "" for no reasons."""
    reasons = Counter(reasons)
    causes = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return f"{reasons.total()} left out: {causes}" if reasons else ""


def visual_tokens(paths: list[str], args) -> int:
    """Qwen2-VL's, from the images' headers; an image that cannot be read counts for none."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    total, known = 0, {}
    for path in paths:
        if path not in known:
            width, height = image_size(path)
            with contextlib.suppress(ValueError, ZeroDivisionError):  # a shape that the processor refuses
                high, wide = smart_resize(height, width, 28, args.min_pixels, args.max_pixels)
                known[path] = high * wide // 28**2
        total += known.get(path, 0)
    return total
