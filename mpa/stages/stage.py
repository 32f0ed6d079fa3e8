"""What PA, PI and evaluate share: a model with its engine, and a stage with its settings, journal and result file."""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from mpa.answers.finish_reasons import why_cut
from mpa.engines import ENGINES, Request, finite, open_engine
from mpa.engines.batch_plan import ROWS
from mpa.engines.costs import BATCH_PRICE
from mpa.engines.endpoint import Endpoint
from mpa.files import distributed, records, signals
from mpa.files.earlier_replies import Asked, EarlierReplies, beside_content, journals_of
from mpa.files.journal import Journal, finished, refuse_other_settings
from mpa.files.outputs import inputs_of, refuse_others
from mpa.files.packages import require
from mpa.files.records import InputError
from mpa.models import families
from mpa.models.conversion import converted
from mpa.models.identity import identity
from mpa.models.loading import check_model_path, format_marks, model_type, resolved_dtype
from mpa.models.visual_tokens import Counter as TokenCounter
from mpa.models.visual_tokens import total
from mpa.runs.layout import Cell, RunFiles
from mpa.stages import cli

# Arguments that decide a stage's outcome, with those of `AskedModel.deciding`. Batch size, workers, and the engine of greedy
# replies do not.
DECIDING = ("dataset", "limit", "sample", "preset", "seed", "dtype", "max_new_tokens", "min_pixels", "max_pixels")


def run_files(args) -> RunFiles:
    """The files of the run that the arguments name."""
    models = (records.short_name(getattr(args, f"model_path_{who}", None) or "") for who in ("lvlm", "svlm"))
    return RunFiles(records.run_folder(args.run), Cell(args.dataset, *models))


class AskedModel:
    """A model and the engine that the arguments select for it; the L-VLM may have its own engine."""

    def __init__(self, args, path: str):
        self.args, self.path = args, path
        is_lvlm = path == getattr(args, "model_path_lvlm", None)
        self.engine_name = getattr(args, "engine_lvlm", None) or args.engine if is_lvlm else args.engine
        # With Ray, the engine whose replies these are is that of its actors.
        self.replies_from = args.ray_engine if self.engine_name == "ray" else self.engine_name
        self.local = ENGINES[self.replies_from].local
        self.has_endpoint = "base_url" in ENGINES[self.replies_from].settings
        self.quantization = args.quantization if is_lvlm else None

    def check(self) -> None:
        """Raise InputError if the model's folder is incomplete, before anything slow is imported."""
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
        if self.has_endpoint:
            Endpoint(self.args.base_url, self.args.request_json)

    @property
    def identity(self) -> str:
        """A digest of a local model's files; the name of one behind a server."""
        return identity(self.path) if self.local else self.path

    @property
    def dtype(self) -> str:
        """The dtype; "auto" is resolved for this machine's device."""
        return resolved_dtype(self.args.dtype, self.args.device, self.path) if self.local else self.args.dtype

    @property
    def max_tiles(self) -> int | None:
        """The limit of tiles that decides the replies: the argument, or the family's default; None if there is none."""
        return families.tile_limit(model_type(self.path), self.args.max_tiles) if self.local else None

    def say_limits(self) -> None:
        """Say what is not tested for this model, and which of the given limits it does not know."""
        limits = self.args.min_pixels, self.args.max_pixels, self.args.max_tiles
        kind, lines = model_type(self.path) if self.local else None, []
        if kind:
            lines = [families.said_of_unknown(kind), families.said_of_limits(kind, *limits)]
        elif self.args.max_tiles and not self.local:
            lines = [f"--max-tiles has no effect for {self.path}: its server decides."]
        for line in filter(None, lines if distributed.FIRST else ()):
            print(line, file=sys.stderr)

    @property
    def marks(self) -> frozenset[str]:
        """The special tokens of the model's prompt format. No question or answer may hold one."""
        return format_marks(self.folder if self.local else None, self.args.trust_remote_code)

    @property
    def folder(self) -> str:
        """What is loaded: an original checkpoint's conversion, which is made when it is first needed, or `path` itself."""
        return converted(self.path) if self.local else self.path

    def engine(self):
        """The engine. It loads the model at the first request."""
        self.check()
        self.say_limits()
        settings = {name: getattr(self.args, name) for name in ENGINES[self.engine_name].settings}
        settings |= {"quantization": self.quantization} if "quantization" in settings else {}
        settings |= {"batch": False} if self.args.dry_run else {}  # a trial does not wait
        return open_engine(self.engine_name, model_path=self.folder, **settings)

    def deciding(self) -> dict:
        """What of the model's settings decides its replies. Tiles, quantization and request_json are entries only where given."""
        limits = {"max_tiles": self.max_tiles, "quantization": self.quantization}
        limits["request_json"] = self.args.request_json if self.has_endpoint else None
        settings = {"dtype": self.dtype, "model": self.identity}
        return settings | {name: value for name, value in limits.items() if value}

    def check_memory(self) -> None:
        """Raise InputError for a model of the hf engine whose weights cannot fit into the memory; reads no weights."""
        if self.engine_name == "hf":
            from mpa.engines.memory import check_weights

            check_weights(self.folder, self.args, self.quantization)

    def dry_run(self, requests: Sequence[Request], label: str) -> None:
        """Run a few requests; print the number of all and their estimated time and cost, as text or JSON. Writes nothing."""
        with self.engine() as engine:
            list(finite(engine.generate(requests[:1])))  # loads the model
            signals.stop_if_asked()
            at_once = getattr(engine, "at_once", self.args.batch_size or ROWS)
            some = requests[1 : 1 + 2 * at_once] or requests[:1]  # two batches for each worker
            before, started = engine.facts(), time.perf_counter()
            n = sum(len(replies) for replies in engine.generate(some))
            seconds, after = time.perf_counter() - started, engine.facts()
            memory = engine.memory_line(requests) if hasattr(engine, "memory_line") else ""
        of_all, images = len(requests) / n, [request.image_path for request in requests]
        if self.args.dry_run == "json":
            print(json.dumps({"label": label, "requests": len(requests), "seconds": round(seconds * of_all, 3)}))
            return
        print(f"{label}: {len(requests):,} requests about {len(set(images)):,} images.")
        limits = self.args.min_pixels, self.args.max_pixels, self.args.max_tiles, self.args.trust_remote_code
        count = TokenCounter(self.folder if self.local else None, *limits)
        print(f"  visual tokens of {count.whose}: {total(images, count):,}")
        if memory:
            print(f"  memory, estimated: {memory}")
        print(f"  time, by the pace of {n}: {timedelta(seconds=round(seconds * of_all))}")
        if "cost" in after:
            spent = after["cost"] - before["cost"]
            all_cost, trial = spent * of_all, after["cost"]
            print(
                f"  cost, by that of {n}: {all_cost:.2f}; with --batch {BATCH_PRICE * all_cost:.2f} (this trial: {trial:.4f})"
            )


class Stage:
    """One model's replies in one result file, resumably.

    with stage.to_do() as to_do:
        if not to_do: return
        with stage.running() as engine:
            ask(engine, requests, stage.journal, stage.label)
        stage.write(result, temporary=…, usable=…)

    `content` is what the records hold besides the replies, as JSON; `choices` are further settings that decide the
    outcome; `asked` lets replies of earlier calls be taken over. Raises InputError if `out` or its journal was made with other settings.
    """

    kind = "PA"  # a key of records.FIELDS

    def __init__(self, model: AskedModel, out: Path, label: str, content: list, asked: Asked | None = None, **choices):
        self.model, self.out, self.label, self.started = model, out, label, time.time()
        self.settings = {name: getattr(model.args, name) for name in DECIDING} | model.deciding()
        self.settings |= {**choices, "content": records.digest(json.dumps(content))}
        self.asked, self.journal = asked, None
        self.facts = {}

    def check(self, content: bool = True, ready: Mapping[str, dict] | None = None) -> bool:
        """Whether the result exists, made with these settings. Raises InputError if it, or its journal, has others, and if
        another command made it.

        One about other images or questions is made anew where replies of it can be taken over, or some are `ready`. Without
        `content`, what the records hold besides the replies is not compared.
        """
        refuse_others(self.out, self.kind, inputs_of(self.model.args))
        settings = self.settings if content else beside_content(self.settings)
        restart, answered = self.model.args.restart, any("error" not in reply for reply in (ready or {}).values())

        def taken_over() -> bool:
            earlier = EarlierReplies(self.out, self.settings)
            return answered or (self.asked is not None and earlier.replace(self.asked, journals_of(self.out)))

        there = finished(self.out, settings, restart, taken_over)
        if not there:
            refuse_other_settings(self.out, settings, restart, self.asked)
        return there

    def finished(self, ready: Mapping[str, dict] | None = None) -> bool:
        """As `check`; prints a line if the result exists."""
        there = self.check(ready=ready)
        if there:
            print(f"{self.label}: {self.out} already exists, made with these settings (--restart makes it anew).")
        return there

    @contextlib.contextmanager
    def to_do(self, wait: bool = False, ready: Mapping[str, dict] | None = None) -> Iterator[bool]:
        """Whether the result is still to be made; while this is open, no other process makes it.

        Raises InputError where another does now; `wait`: waits for it instead. `ready`: see `check`.
        """
        signals.stop_if_asked()
        if self.finished(ready):
            yield False
            return
        with records.locked(self.out, wait) if distributed.FIRST else contextlib.nullcontext():
            cli.open_log(self.model.args, writes=True)
            distributed.wait()  # where the first process is refused, the others are ended
            yield not self.finished(ready)  # another process may have made it meanwhile

    @contextlib.contextmanager
    def running(self) -> Iterator:
        """The engine, with an open `journal`, which stores each reply as it arrives."""
        with self.model.engine() as engine:
            self.journal = Journal(self.out, self.settings, self.model.args.restart, self.asked, late=True)
            if self.asked and len(self.journal.earlier) and distributed.FIRST:
                told = self.journal.earlier.told(self.asked.hashes)
                print(f"{self.label}: {told}; replies to the same requests are taken over.")
            try:
                yield engine
            except BaseException:
                self.journal.abandon()
                raise
            self.facts = engine.facts()

    def write(self, result: list[dict], temporary: int, usable: int, **facts) -> None:
        """Write the result and its meta file. The journal is removed when no request is left.

        `temporary` is the number of replies that failed with a temporary error, `usable` of those that did not fail.
        """
        unfinished = temporary or (0 if usable else len(result))
        facts = {"model_path": self.model.path, **self.facts, **facts, "unfinished": unfinished}
        seconds = round(time.time() - self.started, 1)
        if self.journal and distributed.FIRST and not unfinished:
            self.journal.keep()
        records.write_result(self.out, result, self.settings, **facts, seconds=seconds)
        if account := account_line(self.facts):
            print(f"{self.label}: {account}")
        if cut := short_replies(result):
            print(f"{self.label}: {cut}.")
        if self.journal and self.journal.taken_over:
            n = self.journal.taken_over
            print(f"{self.label}: {n} {'reply was' if n == 1 else 'replies were'} taken over from earlier calls.")
        if temporary:
            print(f"{self.label}: {temporary} replies failed with a temporary error. The same command asks again.")
        if self.journal:
            self.journal.close(remove=distributed.FIRST and not unfinished)


def account_line(facts: dict) -> str:
    """Requests, tokens and cost of a server's replies; "" for an engine that does not count them."""
    if "tokens_in" not in facts:
        return ""
    cost = f", cost {facts['cost']:.4f}" if facts["cost"] else ""
    return f"{facts['requests']:,} replies, {facts['tokens_in']:,} tokens in and {facts['tokens_out']:,} out{cost}."


def short_replies(result: list[dict]) -> str:
    """ "2 answers cut off at the token limit, 1 stopped by the content filter": for the records whose answer was cut."""
    reasons = Counter(why_cut(r.get("finish_reason")) for r in result if "predictions" in r)
    said = [(reason, n) for reason, n in reasons.most_common() if reason]
    return ", ".join(
        f"{n} answers {reason.replace('token limit', 'token limit (--max-new-tokens)')}" for reason, n in said
    )


def counted(reasons) -> str:
    """ "3 left out: 2 no answer, 1 two questions", or "" for no reasons."""
    reasons = Counter(reasons)
    causes = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
    return f"{reasons.total()} left out: {causes}" if reasons else ""
