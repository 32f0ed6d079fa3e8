"""The `hf` engine: transformers on one GPU or on the CPU, for any model that its Auto classes load.

The path of a request, in the order of the methods of HFEngine:

    generate         requests are grouped into batches of similar length
    prepare          images are opened, and the processor turns them and the prompts into the model's inputs
    answer_prepared  the batch goes through the model, in halves where it does not fit into memory
    reply            first replies, then the follow-ups that they give rise to, each attached to its reply
    _generate        transformers' generate with the loop of `decoding`; each row stops at the line that ends its answer
    _scored          each row's text and log-probability

On a GPU, worker processes prepare batches while the model runs. On a CPU, the workers run the model too, one core each,
with shared weights. Greedy replies are those of a plain loop over the requests.
"""

import mpa.files.light_imports  # noqa: F401  isort: skip

import gc
import os
import sys
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import partial

import torch
from transformers import DynamicCache

from mpa.engines import Request, first_request, follow_up_request, memory, not_finite, static_cache
from mpa.engines.batch_plan import BatchPlan, rows_of
from mpa.engines.decoding import Decoder, Replies, TokenSampler, decode, line_break_tokens
from mpa.engines.memory import OUT_OF_MEMORY, tokens_that_fit
from mpa.engines.prefix_cache import LastColumn, PrefixCache, reset_rope_deltas
from mpa.engines.preprocessing import PreparedBatch, Preprocessor
from mpa.engines.workers import WorkerPool
from mpa.files import distributed
from mpa.models import families, loading
from mpa.models.device_memory import is_out_of_memory

MAX_GPU_WORKERS = 4


class HFEngine:
    """One model; see `mpa.engines` for what an engine takes and yields.

    `workers` processes share the work; 0: this process does it all, on all cores; None: one per core on a CPU, at most
    MAX_GPU_WORKERS with a GPU. `batch_size` is the most rows of a batch (None: `rows_of` the device), `batch_tokens` the
    most tokens, padding and replies included; None: what fits into a GPU's memory, found by a probe. `quantization` and
    `device_map`: see `loading.load_model`. `static_cache`: see `mpa.engines.static_cache`; follow-ups, a few tokens each,
    go without.
    """

    def __init__(
        self,
        model_path: str,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        workers: int | None = 0,
        min_pixels: int = families.MIN_PIXELS,
        max_pixels: int = families.MAX_PIXELS,
        max_tiles: int | None = None,
        trust_remote_code: bool = False,
        quantization: str | None = None,
        device_map: str | None = None,
        static_cache: bool = False,
    ):
        self.max_tiles = max_tiles
        self.model_path, self.trust_remote_code = model_path, trust_remote_code
        self.device, self.dtype, self.workers, self.pixels = device, dtype, workers, (min_pixels, max_pixels)
        self.quantization, self.device_map = quantization, device_map
        self.static_cache, self.static_steps = static_cache, None
        self.plan = BatchPlan(batch_size, batch_tokens, self.pixels)
        self.tokens = 0  # of all replies
        self.model_seconds = self.wait_seconds = self.started = 0.0  # waiting: for images
        self.model = self.preprocessor = self.pool = self.prefix_cache = self.last_column = None
        self.tried = False  # whether a model type outside the table of families was compared with plain `generate`

    def __enter__(self):
        return self

    def __exit__(self, _, failure, __):
        """Free the model and end the workers, so that the next model has the memory.

        Also while a failure is told: the variables of the calls that it has left, which hold the model and its tensors, go.
        """
        if self.pool:
            self.pool.close(kill=bool(failure))
        while failure:
            traceback.clear_frames(failure.__traceback__)
            failure = failure.__context__
        loaded = self.model is not None
        self.model = self.preprocessor = self.pool = self.prefix_cache = self.last_column = None
        self.static_steps = None
        if loaded:
            gc.collect()  # of the model at least the layer that `LastColumn` changed is part of a reference cycle
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @property
    def family(self) -> families.Family | None:
        """The model's entry in the table of families."""
        return families.FAMILIES.get(loading.model_type(self.model_path))

    @property
    def marks(self) -> frozenset[str]:
        """The prompt format's own tokens, which no prompt may hold."""
        return self.preprocessor.marks if self.preprocessor else frozenset()

    def facts(self) -> dict:
        """Device, dtype, tokens written, and the share of the time in which the model waited for images."""
        waited = self.wait_seconds / max(self.wait_seconds + self.model_seconds, 1e-9)
        dtype = str(self.dtype).removeprefix("torch.")
        facts = {"device": self.device, "dtype": dtype, "tokens": self.tokens, "waited": round(waited, 4)}
        if self.static_cache:
            steps = self.static_steps
            facts["static_cache"] = "left out" if not steps else "no graph" if steps.graph_error else "CUDA graph"
        return facts

    def status(self) -> str:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return f"{self.tokens / seconds:.0f} tokens/s, waited {self.facts()['waited']:.0%}"

    @property
    def at_once(self) -> int:
        """How many requests are in work at a time, at most; known once the model is loaded."""
        return self.plan.batch_size * (max(1, self.workers) if self.device == "cpu" else 1)

    def memory_line(self, requests: Sequence[Request]) -> str:
        """The estimate of the memory that these requests need, for a dry run."""
        return memory.line(self, requests)

    # --- loading ----------------------------------------------------------------------------------

    def load(self, requests: Sequence[Request] = ()) -> None:
        """Load processor and model, and start the workers.

        Raises InputError if the weights cannot fit into the memory; warns if the `requests` may not.
        """
        if self.model:
            return
        self.device = loading.pick_device(self.device)
        self.plan.batch_size = self.plan.batch_size or rows_of(self.device)
        if sys.platform != "linux":
            self.workers = 0  # workers are forked
        elif self.workers is None:
            cores = max(1, len(os.sched_getaffinity(0)) // distributed.LOCAL_WORLD)
            self.workers = cores if self.device == "cpu" else min(MAX_GPU_WORKERS, cores)
        self.preprocessor = Preprocessor(self.model_path, self.pixels, self.trust_remote_code, self.max_tiles)
        if not hasattr(self.preprocessor.processor.image_processor, "merge_size"):  # it knows no limits of pixels
            self.plan.visual_tokens = partial(families.visual_tokens, self.preprocessor.processor)
        tokenizer = self.preprocessor.tokenizer
        self.line_breaks, self.decoder = line_break_tokens(tokenizer), Decoder(tokenizer)
        memory.check(self, requests)
        # Workers on a CPU are forked with the model in them; workers of a GPU before the device is touched.
        if self.workers and self.device == "cpu":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # OpenMP does not survive a fork once it has started threads
            self._load_model()
            self.pool = WorkerPool(self, self.workers)
            torch.set_num_threads(threads)
        else:
            if self.workers:
                self.pool = WorkerPool(self, self.workers)
            self._load_model()

    def _load_model(self) -> None:
        named = str(self.dtype).removeprefix("torch.")
        self.dtype = getattr(torch, loading.resolved_dtype(named, self.device, self.model_path))
        self.model = loading.load_model(
            self.model_path, self.device, self.dtype, self.trust_remote_code, self.quantization, self.device_map
        )
        families.match_config(self.model.config, self.preprocessor.processor)
        if self.device_map:
            self.device = str(self.model.device)  # of the first layers, which take the inputs
        # The shortcuts index key-values with the inputs' positions: both must be on one device.
        on_one_device = len({weight.device for weight in self.model.parameters()}) == 1
        if self.family and self.family.shortcuts and on_one_device:
            self.last_column = LastColumn(self.model.get_decoder().layers[-1])
            self.prefix_cache = PrefixCache(self.model, self.preprocessor.processor)
        if self.static_cache:
            self.static_steps = static_cache.steps(self)
        if self.plan.batch_tokens is None and self.device.startswith("cuda"):
            self.plan.batch_tokens, self.plan.row_tokens = tokens_that_fit(self)
            if distributed.FIRST:
                limits = f"{self.plan.batch_size} rows and {self.plan.batch_tokens} tokens"
                print(f"{self.model_path}: batches of at most {limits}, by the GPU's free memory", file=sys.stderr)

    # --- the path of a request --------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies, a batch at a time.

        Batches are planned over all requests, and batches whose replies are all `done` are skipped: a resumed run
        forms the same batches as an uninterrupted one.
        """
        requests = list(requests)
        with first_request.tried(self):
            self.load(requests)
            if not (self.family or self.tried):
                first_request.check(self, requests)
                self.tried = True
        self.started = time.perf_counter()
        batches = (batch for batch in self.plan.batches(requests) if any(r.key not in done for r in batch))
        if not self.pool:
            answered = map(self.answer_timed, batches)
        elif self.device == "cpu":
            answered = (answer for _, answer in self.pool.run_ahead(HFEngine.answer_timed, batches))
        else:
            answered = self._answer_while_workers_prepare(batches)
        for replies, wait_seconds, model_seconds in answered:
            self.wait_seconds, self.model_seconds = self.wait_seconds + wait_seconds, self.model_seconds + model_seconds
            self.tokens += sum(r.get("tokens", 0) + r.get("follow_up", {}).get("tokens", 0) for r in replies)
            yield replies

    def answer_timed(self, batch: list[Request]) -> tuple[list[dict], float, float]:
        """(replies, seconds of preparing the images, seconds of the model)."""
        started = time.perf_counter()
        prepared = self.prepare(batch)
        ready = time.perf_counter()
        return self.answer_prepared(prepared), ready - started, time.perf_counter() - ready

    def _answer_while_workers_prepare(self, batches) -> Iterator[tuple[list[dict], float, float]]:
        started = time.perf_counter()
        for _, prepared in self.pool.run_ahead(HFEngine.prepare, batches, ahead=1):  # large batches
            ready = time.perf_counter()
            replies = self.answer_prepared(prepared)
            yield replies, ready - started, time.perf_counter() - ready
            started = time.perf_counter()

    def answer(self, batch: list[Request]) -> list[dict]:
        return self.answer_prepared(self.prepare(batch))

    def prepare(self, batch: list[Request]) -> PreparedBatch:
        """Images opened and processed with their prompts; requests that cannot be used have become error replies."""
        return self.preprocessor.prepare(batch)

    def answer_prepared(self, prepared: PreparedBatch) -> list[dict]:
        """Replies to a prepared batch, errors included. A request that does not fit into memory alone gets an error."""
        requests, inputs, errors = prepared
        if not requests:
            return errors
        try:
            return errors + self.reply(requests, inputs)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is a CPU's
            if not is_out_of_memory(error):
                raise
        if len(requests) == 1:
            return [*errors, {"key": requests[0].key, "error": OUT_OF_MEMORY, "permanent": False}]
        reset_rope_deltas(self.model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest = max(request.max_new_tokens for request in requests)
        self.plan.does_not_fit(self.plan.tokens(len(requests), inputs["input_ids"].shape[1], longest))
        half = len(requests) // 2
        return errors + self.answer(requests[:half]) + self.answer(requests[half:])

    @torch.inference_mode()
    def reply(self, requests: list[Request], inputs: dict) -> list[dict]:
        """A reply for each request, with the reply to its follow-up attached under "follow_up"."""
        inputs = {name: torch.from_numpy(array) for name, array in inputs.items()}
        inputs, cache = self.prefix_cache.reuse_system_text(inputs) if self.prefix_cache else (inputs, None)
        replies, cache = self._generate(requests, inputs, cache, self.static_steps)

        follow_ups = {}  # by row
        for row, (request, reply) in enumerate(zip(requests, replies, strict=True)):
            if follow_up := follow_up_request(request, reply, self.marks):
                follow_ups[row] = follow_up
        for row, answer in zip(follow_ups, self._answer_follow_ups(requests, follow_ups, inputs, cache), strict=True):
            replies[row]["follow_up"] = answer
        return replies

    def _answer_follow_ups(self, requests, follow_ups: dict[int, Request], inputs: dict, cache) -> list[dict]:
        """Replies to the follow-ups of these rows, in their order; without encoding the images again where possible."""
        if not follow_ups:
            return []
        shared = None
        if self.prefix_cache:
            before = self.preprocessor.chat_text(requests[next(iter(follow_ups))].prompt)
            texts = [self.preprocessor.chat_text(follow_up.prompt) for follow_up in follow_ups.values()]
            shared = self.prefix_cache.reuse_images(inputs, cache, list(follow_ups), before, texts)
        if shared:
            return self._generate(list(follow_ups.values()), *shared)[0]
        answers = {answer["key"]: answer for answer in self.answer(list(follow_ups.values()))}
        return [answers[follow_up.key] for follow_up in follow_ups.values()]

    @property
    def end_tokens(self) -> list[int]:
        """The tokens that end a reply."""
        known = self.model.generation_config.eos_token_id
        known = self.preprocessor.tokenizer.eos_token_id if known is None else known
        return known if isinstance(known, list) else [known]

    def _generate(
        self, requests: list[Request], inputs: dict, cache=None, static_steps=None
    ) -> tuple[list[dict], DynamicCache]:
        """Replies, and the key-values that they leave; `cache` holds the key-values of the inputs' first columns."""
        longest = max(request.max_new_tokens for request in requests)
        if static_steps:
            static_steps.make_room(len(requests), inputs["input_ids"].shape[1] + longest)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        inputs |= {name: value.to(self.dtype) for name, value in inputs.items() if value.is_floating_point()}
        replies = Replies(requests, self.decoder, self.line_breaks, self.end_tokens, self.preprocessor.reasoning_tag)
        sampler = TokenSampler(requests, self.device)
        cache = self.model.generate(
            **inputs,
            **({"past_key_values": cache} if cache else {}),
            max_new_tokens=longest,
            do_sample=False,  # `sampler` does; the sampling settings of the checkpoint's generation_config are ignored
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            custom_generate=decode,
            sampler=sampler,
            replies=replies,
            static_steps=static_steps,
        )
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu()  # [B, T]
        return self._scored(replies, logprobs), cache

    def _scored(self, replies: Replies, logprobs) -> list[dict]:
        """The replies with the sums of their tokens' `logprobs` [B, T].

        One logit that is NaN or infinite makes its token's log-probability NaN, so the sum tells of all of them.
        """
        scored = []
        for row, request in enumerate(replies.requests):
            tokens = len(replies.tokens[row])
            logprob = logprobs[row, :tokens].sum().item()
            scored.append(
                not_finite(request.key, logprob, self.dtype)
                or {
                    "key": request.key,
                    "text": replies.text(row),
                    "logprob": round(logprob, 4),
                    "tokens": tokens,
                    "finish_reason": "stop" if replies.complete[row] else "length",
                }
            )
        return scored
