"""The `hf` engine: transformers on one GPU or on the CPU, any model that its Auto classes load.

Faster than the plain loop, with the same greedy replies. On a GPU, worker processes decode and
process the images while the model runs; on a CPU, they run the model too, each on a core of its
own, with the weights shared. Requests of near-equal length share a batch, and a row stops at the
line that ends its answer.
"""

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import sys
import time
import weakref
from collections import deque
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

import torch
from PIL import Image
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

from mpa import distributed, models
from mpa.engines import MARK_IN_IT, Request, following
from mpa.engines.decoding import Chooser, Decoder, Stopper, line_breaks
from mpa.engines.prefix_cache import Prefixes, forget_positions, spare_last_layer
from mpa.image_files import ImageError, image_size, open_image
from mpa.prompts import holds_mark
from mpa.records import InputError
from mpa.replies import opened_reasoning

WINDOW = 64  # batches within which requests are sorted by length
OUT_OF_MEMORY = "out of memory; try a smaller --max-pixels"
OF_MEMORY = 0.8  # the share of a GPU's free memory that batches may fill


class HFEngine:
    """`generate` for one model; see `mpa.engines` for what it takes and yields.

    `workers` processes share the work: on a GPU they prepare batches ahead of the model, on a CPU
    they answer them, one core each. With 0, this process does it all, on all cores; None is as many
    as there are cores on a CPU, and at most 4 beside a GPU. A batch has at most `batch_size` rows and
    `batch_tokens` tokens, padding and replies included; None is what fits in a GPU's memory, by trying.
    """

    def __init__(
        self,
        model_path: str,
        batch_size: int = 8,
        batch_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        workers: int | None = 0,
        min_pixels: int = models.MIN_PIXELS,
        max_pixels: int = models.MAX_PIXELS,
        trust_remote_code: bool = False,
    ):
        self.model_path, self.batch_size, self.trust = model_path, batch_size, trust_remote_code
        self.workers, self.batch_tokens = workers, batch_tokens
        self.tokens, self.worked, self.waited, self.started = 0, 0.0, 0.0, 0.0  # of replies; seconds
        self.device, self.dtype, self.pixels = device, dtype, (min_pixels, max_pixels)
        self.model = self.processor = self.pool = self.prefixes = None

    def __enter__(self):
        return self

    def __exit__(self, failure, *_):
        """Free the model and the workers, so that the next model has the memory."""
        if self.pool:
            for worker in list((self.pool._processes or {}).values()) if failure else ():
                worker.kill()  # nobody waits for its batch any more
            self.pool.shutdown(cancel_futures=True)
        model = weakref.ref(self.model) if self.model else lambda: None
        self.model = self.processor = self.pool = self.prefixes = None
        if model() is not None:  # held by a cycle
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load(self) -> None:
        """Load processor and model, and start the workers."""
        if self.model:
            return
        self.device = models.pick_device(self.device)
        if sys.platform != "linux":
            self.workers = 0  # workers are forked
        elif self.workers is None:
            cores = max(1, len(os.sched_getaffinity(0)) // distributed.LOCAL_WORLD)
            self.workers = cores if self.device == "cpu" else min(4, cores)
        self.processor = models.load_processor(self.model_path, *self.pixels, self.trust)
        self.line_breaks, self.decoder = line_breaks(self.processor.tokenizer), Decoder(self.processor.tokenizer)
        self.marks = models.processor_marks(self.processor)
        self._check_processor()
        self.opened = opened_reasoning(self._texts(["?"])[0])
        # A worker of a CPU is forked with the model in it; one of a GPU before the device is touched.
        if self.workers and self.device == "cpu":
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # OpenMP does not survive a fork once it has started threads
            self._load_model()
            self._start_workers()
            torch.set_num_threads(threads)
        else:
            if self.workers:
                self._start_workers()
            self._load_model()

    def _load_model(self) -> None:
        self.dtype = getattr(torch, models.resolved_dtype(str(self.dtype).removeprefix("torch."), self.device))
        self.model = models.load_model(self.model_path, self.device, self.dtype, self.trust)
        if self.model.config.model_type in models.SHORTCUTS:
            spare_last_layer(self.model.get_decoder().layers[-1])
            self.prefixes = Prefixes(self.model, self.processor)
        if self.batch_tokens is None and self.device.startswith("cuda"):
            self.batch_tokens = self._probe()

    def _probe(self) -> int:
        """How many tokens of a batch fit in the GPU's memory, from the peaks of batches of one and of three rows."""
        edge = int(self.pixels[1] ** 0.5)
        image, request = Image.new("RGB", (edge, edge)), Request("", "", "What is it?", max_new_tokens=8)
        peaks = {}
        for rows in (1, 3):
            inputs = self._process([image] * rows, [request.prompt] * rows)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._run([request] * rows, list(range(rows)), inputs, [])
            peaks[rows] = torch.cuda.max_memory_allocated(self.device)
        a_token = max(1, peaks[3] - peaks[1]) / (2 * (inputs["input_ids"].shape[1] + 8))
        torch.cuda.empty_cache()
        return max(1, int(OF_MEMORY * torch.cuda.mem_get_info(self.device)[0] / a_token))

    def facts(self) -> dict:
        """Where it ran, tokens written, and the share of the model's time that went by waiting for images."""
        of_time = self.waited / max(self.waited + self.worked, 1e-9)
        dtype = str(self.dtype).removeprefix("torch.")
        return {"device": self.device, "dtype": dtype, "tokens": self.tokens, "waited": round(of_time, 4)}

    def status(self) -> str:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return f"{self.tokens / seconds:.0f} tokens/s, waited {self.facts()['waited']:.0%}"

    def _start_workers(self) -> None:
        self.pool = ProcessPoolExecutor(self.workers, multiprocessing.get_context("fork"), _start_worker, (self,))
        self.pool.submit(int).result()

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies a batch at a time. Batches are planned over all requests and those without any work
        left are passed over, so that a resumed run forms the batches that an uninterrupted one would.
        """
        self.load()
        self.started = time.perf_counter()
        batches = (b for b in self._plan(requests) if any(r.key not in done for r in b))
        if not self.pool:
            answered = (self._timed_answer(batch) for batch in batches)
        elif self.device == "cpu":
            answered = (answer for _, answer in self._ahead(_answer, batches))
        else:
            answered = self._beside_workers(batches)
        for replies, waited, worked in answered:
            self.waited, self.worked = self.waited + waited, self.worked + worked
            self.tokens += sum(written(reply) for reply in replies)
            yield replies

    def _beside_workers(self, batches: Iterable[list[Request]]) -> Iterator[tuple[list[dict], float, float]]:
        clock = time.perf_counter
        started = clock()
        for batch, prepared in self._ahead(_prepare, batches):
            ready = clock()
            replies = self._run_in_memory(batch, *prepared)
            yield replies, ready - started, clock() - ready
            started = clock()

    def _timed_answer(self, batch: list[Request]) -> tuple[list[dict], float, float]:
        """(replies, seconds of preparing the images, seconds of the model)."""
        started = time.perf_counter()
        prepared = self.prepare(batch)
        ready = time.perf_counter()
        return self._run_in_memory(batch, *prepared), ready - started, time.perf_counter() - ready

    def _plan(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Batches of near-equal length: long images and prompts with long ones, within a window."""
        requests = iter(requests)
        while window := list(islice(requests, WINDOW * self.batch_size)):
            batch, lengths = [], [self._length(request) for request in window]
            for index in sorted(range(len(window)), key=lengths.__getitem__):
                request = window[index]
                # Sorted: this one is the longest so far, to which the others are padded.
                tokens = (len(batch) + 1) * (lengths[index] + request.max_new_tokens)
                if batch and (len(batch) == self.batch_size or tokens > (self.batch_tokens or math.inf)):
                    yield batch
                    batch = []
                batch.append(request)
            yield batch

    def _length(self, request: Request) -> float:
        """A stand-in for the prompt's length in tokens: the area of the image as resized, and characters."""
        least, most = self.pixels
        width, height = (0, 0) if least == most else image_size(request.image_path)
        return min(max(width * height, least), most) / 28**2 + len(request.prompt) / 4

    def _ahead(self, work, batches):
        """(batch, work(batch)) in order, done by the workers at most two batches each ahead."""
        waiting = deque()
        try:
            for batch in batches:
                waiting.append((batch, self.pool.submit(work, batch)))
                if len(waiting) > 2 * self.workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for first, future in waiting:
                yield first, future.result()
        except BrokenProcessPool:
            raise InputError(
                "a worker process died, most likely for want of memory. Try a smaller --batch-size or fewer "
                "--workers; what is finished is kept."
            ) from None

    def answer(self, batch: list[Request]) -> list[dict]:
        return self._run_in_memory(batch, *self.prepare(batch))

    def _run_in_memory(self, batch: list[Request], good: list[int], inputs: dict, errors: list[dict]) -> list[dict]:
        """`_run`, in halves where the memory does not suffice; a request too large alone is an error of its own."""
        try:
            return self._run(batch, good, inputs, errors)
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is a CPU's
            if not out_of_memory(error):
                raise
        if len(good) == 1:
            return [*errors, {"key": batch[good[0]].key, "error": OUT_OF_MEMORY, "permanent": False}]
        forget_positions(self.model)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = [batch[row] for row in good]
        if self.batch_tokens:
            self.batch_tokens //= 2
        halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
        return errors + [reply for half in halves for reply in self.answer(half)]

    def prepare(self, batch: list[Request]) -> tuple[list[int], dict, list[dict]]:
        """(rows that can be used, the processor's output for them as numpy arrays, replies for the others)."""
        images, errors = {}, []  # by row

        def refuse(row: int, why: str, permanent: bool = True) -> None:
            errors.append({"key": batch[row].key, "error": why, "permanent": permanent})

        for row, request in enumerate(batch):
            if holds_mark(request.prompt, self.marks):
                refuse(row, MARK_IN_IT)
                continue
            try:
                images[row] = open_image(request.image_path)
            except ImageError as error:
                refuse(row, f"image: {error}")
            except MemoryError:
                refuse(row, OUT_OF_MEMORY, permanent=False)

        def process(rows):
            return self._process([images[row] for row in rows], [batch[row].prompt for row in rows])

        try:
            return list(images), process(images), errors
        except Exception:  # one image may have spoilt the batch: an extreme shape, say
            good = []
            for row in images:
                try:
                    process([row])
                    good.append(row)
                except Exception as error:
                    if isinstance(error, MemoryError | RuntimeError) and out_of_memory(error):
                        refuse(row, OUT_OF_MEMORY, permanent=False)
                    else:
                        refuse(row, f"{self._at_fault(images[row])}: the processor refuses it ({error})")
        try:
            return good, process(good), errors
        except MemoryError:  # one by one they fit
            for row in good[1:]:
                refuse(row, OUT_OF_MEMORY, permanent=False)
            return good[:1], process(good[:1]), errors

    def _at_fault(self, image: Image.Image) -> str:
        """Whether a request that the processor refuses is so for its image or for its question."""
        self._check_processor()
        try:
            self._process([image], ["What is it?"])
            return "question"
        except Exception:
            return "image"

    def _check_processor(self) -> None:
        """Raise InputError where the processor fails on a plain image: then no image is to blame."""
        try:
            self._process([Image.new("RGB", (64, 64))], ["What is it?"])
        except Exception as error:
            raise InputError(f"{self.model_path}: its processor fails on a plain image: {error}") from None

    def _process(self, images: list, prompts: list[str]) -> dict:
        """The processor's output as numpy arrays, which travel through a pipe: shared memory is scarce in containers."""
        if not images:
            return {}
        inputs = self.processor(
            text=self._texts(prompts), images=[[p] for p in images], padding=True, return_tensors="pt"
        )
        return {name: tensor.numpy() for name, tensor in inputs.items()}

    def _texts(self, prompts) -> list[str]:
        """Each prompt after an image, in the model's chat template."""
        texts, prompts = {}, list(prompts)
        for prompt in set(prompts):
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
            texts[prompt] = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return [texts[prompt] for prompt in prompts]

    @torch.inference_mode()
    def _run(self, batch: list[Request], good: list[int], inputs: dict, errors: list[dict]) -> list[dict]:
        """Replies of the good rows, whose `inputs` these are, and the others' errors."""
        if not good:
            return errors
        batch = [batch[row] for row in good]
        inputs = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        inputs |= {name: value.to(self.dtype) for name, value in inputs.items() if value.is_floating_point()}
        inputs, cache = self.prefixes.with_head(inputs) if self.prefixes else (inputs, None)
        replies, cache = self._generate(batch, inputs, cache)

        asked = [following(r, reply, self.marks) for r, reply in zip(batch, replies, strict=True)]
        rows, asked = [row for row, request in enumerate(asked) if request], [request for request in asked if request]
        if rows:
            shared = None
            if self.prefixes:
                before, *texts = self._texts([batch[rows[0]].prompt, *(request.prompt for request in asked)])
                shared = self.prefixes.continued(inputs, cache, rows, before, texts)
            answers = self._generate(asked, *shared)[0] if shared else self.answer(asked)
            answers = {answer["key"]: answer for answer in answers}
            for row in rows:
                replies[row]["follow_up"] = answers[batch[row].key]
        return errors + replies

    def _generate(self, batch: list[Request], inputs: dict, cache=None) -> tuple[list[dict], DynamicCache]:
        """Replies to a batch and the cache they leave; `cache` holds the key-values of the inputs' first columns."""
        prompt_length = inputs["input_ids"].shape[1]
        chooser = Chooser(batch)
        stopper = Stopper(batch, self.decoder, self.line_breaks, prompt_length, self.opened)
        out = self.model.generate(
            **inputs,
            **({"past_key_values": cache} if cache else {}),
            max_new_tokens=max(r.max_new_tokens for r in batch),
            do_sample=False,  # `chooser` has chosen; what the checkpoint's generation_config says of sampling is void
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([stopper]),
            return_dict_in_generate=True,
        )
        written = out.sequences[:, prompt_length:]
        # A row that ended early is padded; its length counts the end token.
        ends = self.model.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        is_end = torch.isin(written, torch.tensor(ends, device=written.device))
        first_end = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, written.shape[1])
        lengths = torch.minimum(first_end, stopper.lengths.to(written.device)).tolist()
        ends_at = torch.where(is_end.any(1), first_end, written.shape[1] + 1).tolist()
        logprobs = torch.stack(chooser.logprobs, dim=1).cpu()  # [B, T]
        replies = [
            {
                "key": request.key,
                "text": self.opened + self.decoder(row[:n]),
                "logprob": round(values[:n].sum().item(), 4),
                "tokens": n,
                "finish_reason": "stop" if complete or end <= n else "length",
            }
            for request, row, n, values, complete, end in zip(
                batch, written, lengths, logprobs, stopper.complete, ends_at, strict=True
            )
        ]
        return replies, out.past_key_values


def out_of_memory(error: BaseException) -> bool:
    """In the words of torch on GPUs and CPUs, and of the libraries below it."""
    words = ("out of memory", "not enough memory", "allocate memory", "alloc_failed", "bad_alloc", "unable to allocate")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def written(reply: dict) -> int:
    """Tokens of a reply and of what followed it."""
    return reply.get("tokens", 0) + reply.get("follow_up", {}).get("tokens", 0)


# --- in the workers ---------------------------------------------------------------------------------


def _start_worker(engine: HFEngine) -> None:
    global _engine
    _engine = engine
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's to deal with
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent, however it ends


def _prepare(batch: list[Request]):
    return _engine.prepare(batch)


def _answer(batch: list[Request]) -> tuple[list[dict], float, float]:
    return _engine._timed_answer(batch)
