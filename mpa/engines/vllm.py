"""The `vllm` engine: vLLM in this process, for throughput on one GPU or several. See requirements-vllm.txt.

vLLM batches by itself; what this file adds is the order and the pace. Images are opened and processed
in threads ahead of the model, a bounded number is in flight, a reply is cut at the line that ends it,
and a follow-up takes its turn while the key-values of its image are still cached. Greedy replies in
float32 are those of `hf`.
"""

import contextlib
import gc
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Container, Iterable, Iterator
from importlib.util import find_spec

from PIL import Image

from mpa import distributed, models
from mpa.engines import MARK_IN_IT, Request, follow_up_request
from mpa.engines.decoding import Decoder
from mpa.engines.prefetch import Feed, Row
from mpa.prompts import ANSWER_SUFFIX, STOPS, holds_mark
from mpa.records import InputError
from mpa.replies import opened_reasoning

IN_FLIGHT = {"cpu": 64, "gpu": 256}  # requests that vLLM has at a time
VERIFIED = 4  # images whose visual tokens are counted
STEP_OF_LENGTH = 1024  # what the longest prompt and reply are rounded up to, see `_longest`

INSTALL = (
    "--engine vllm needs vLLM, in an environment of its own: `bash scripts/setup.sh vllm` makes .venv-vllm, in which the "
    "scripts run it; to call a Python file yourself: .venv-vllm/bin/python scripts/PA.py …"
)


class VLLMEngine:
    """`generate` for one model; see `mpa.engines` for what it takes and yields.

    `max_model_len` bounds prompt, image and reply together; None: what the requests need.
    """

    def __init__(
        self,
        model_path: str,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        min_pixels: int = models.MIN_PIXELS,
        max_pixels: int = models.MAX_PIXELS,
    ):
        if find_spec("vllm") is None:
            raise InputError(INSTALL)
        if distributed.WORLD > 1:
            raise InputError(
                "--engine vllm shares the work among GPUs by itself: start it once, without accelerate launch, "
                "with --tensor-parallel-size or --pipeline-parallel-size."
            )
        self.model_path, self.trust, self.pixels = model_path, trust_remote_code, (min_pixels, max_pixels)
        self.parallel = tensor_parallel_size, pipeline_parallel_size
        self.of_memory, self.max_model_len = gpu_memory_utilization, max_model_len
        self.device, self.dtype = "auto", dtype
        self.tokens, self.prompted, self.cached = 0, 0, 0  # written; of prompts; of these, found in the cache
        self.earlier = 0  # tokens written before this call of generate
        self.worked, self.waited, self.started = 0.0, 0.0, 0.0  # seconds
        self.steps = self.rows = 0
        self.llm = self.processor = None
        self.length = 0  # that the model was loaded for
        self.texts: dict[str, str] = {}  # prompts that recur, in the chat template
        self.ids = itertools.count()
        self.verified: set[tuple[int, int]] = set()  # sizes of images

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Free the model, so that the next one has the memory."""
        self._unload()
        self.processor = None

    def facts(self) -> dict:
        """Where it ran, tokens written, the share of the time in which the model had nothing to do for want of
        images, mean requests a step, and the share of the prompts' tokens found in the prefix cache."""
        return {
            "device": self.device,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokens": self.tokens,
            "waited": round(self.waited / max(self.waited + self.worked, 1e-9), 4),
            "rows": round(self.rows / max(self.steps, 1), 1),
            "cached": round(self.cached / max(self.prompted, 1), 4),
        }

    def status(self) -> str:
        seconds, facts = max(time.perf_counter() - self.started, 1e-9), self.facts()
        return f"{(self.tokens - self.earlier) / seconds:.0f} tokens/s, waited {facts['waited']:.0%}"

    # --- the model --------------------------------------------------------------------------------

    def load(self, requests: Iterable[Request]) -> None:
        """Load processor and model; the model anew where these requests are longer than those it was loaded for."""
        if models.adapted(self.model_path):
            raise InputError(
                f"{self.model_path}: holds LoRA adapters. For vllm, merge them first: "
                "PL/Qwen2-VL-Finetune/scripts/merge_lora.sh; --engine hf takes them as they are."
            )
        if not self.processor:
            self.processor = models.load_processor(self.model_path, *self.pixels, self.trust)
            self._check_processor()
            self.decoder, self.marks = Decoder(self.processor.tokenizer), models.processor_marks(self.processor)
            self.opened = opened_reasoning(self._text("?"))
        needed = self.max_model_len or self._longest(requests)
        if self.llm and needed > self.length:
            self._unload()
        if not self.llm:
            self.length = needed
            self._load_model()

    def _load_model(self) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.parallel == (1, 1):  # no process but this one: none to outlive it, and none to be forked
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        else:
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise InputError(f"vLLM is there, but cannot be imported: {error}. {INSTALL}") from None
        on_cpu = current_platform.is_cpu()
        gpus = self.parallel[0] * self.parallel[1]
        self.device = current_platform.device_type + (f" x {gpus}" if gpus > 1 else "")
        if on_cpu:
            self.dtype = models.resolved_dtype(str(self.dtype).removeprefix("torch."), "cpu")
        elif self.dtype == "auto":
            self.dtype = "bfloat16" if current_platform.has_device_capability(80) else "float16"
        self.in_flight = IN_FLIGHT["cpu" if on_cpu else "gpu"]
        try:
            self.llm = LLM(
                model=self.model_path,
                dtype=self.dtype,
                trust_remote_code=self.trust,
                tensor_parallel_size=self.parallel[0],
                pipeline_parallel_size=self.parallel[1],
                gpu_memory_utilization=self.of_memory,
                max_model_len=self.length,
                max_num_seqs=self.in_flight,
                enable_prefix_caching=True,
                mm_processor_cache_gb=1 if on_cpu else 4,
                limit_mm_per_prompt={"image": 1, "video": 0},
                mm_processor_kwargs=self._limits(),
                generation_config="vllm",  # what the checkpoint says of sampling is void
                use_tqdm_on_load=sys.stderr.isatty(),
                **({"enforce_eager": True, "block_size": 32} if on_cpu else {}),
            )
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            self._unload()
            raise InputError(f"{self.model_path}: vLLM cannot load it: {_reason(error)}") from error
        self.repetition_penalty = _repetition_penalty(self.model_path)

    def _unload(self) -> None:
        if not self.llm:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        engine, self.llm = self.llm.llm_engine, None
        engine.renderer.shutdown()
        engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()

    def _limits(self) -> dict | None:
        """The pixel limits as the processor takes them; None where it does not (see `models.load_processor`)."""
        if not hasattr(self.processor.image_processor, "merge_size"):
            return None
        return {"size": {"shortest_edge": self.pixels[0], "longest_edge": self.pixels[1]}}

    def _longest(self, requests: Iterable[Request]) -> int:
        """Tokens for the longest of the requests: image, prompt and reply, or its follow-up.

        The image counts with the most visual tokens of some extreme shapes, so that none need be opened
        for it. Rounded up: it costs nothing, as vLLM's memory is shared by all requests, and spares loading the
        model again when the next call's prompts are a little longer. At most what the model can take.
        """
        edge = max(2000, int(self.pixels[1] ** 0.5) + 28)
        images = 0
        for size in ((edge, edge), (edge, edge * 3 // 4), (edge, edge // 4), (2, 380), (380, 2)):
            with contextlib.suppress(Exception):  # a shape that this processor refuses
                images = max(images, self._prompt_length("", Image.new("RGB", size)))
        if not requests:
            return STEP_OF_LENGTH
        reply = max(r.max_new_tokens for r in requests)
        prompts = {r.prompt.encode("utf-8", "replace").decode() for r in requests} | {ANSWER_SUFFIX}
        counts = dict(zip(prompts, map(len, self.processor.tokenizer(list(prompts)).input_ids), strict=True))
        prompt = max(counts.values())
        if any(r.follow_up for r in requests):  # the question is a part of the reply
            prompt = max(prompt, reply + counts[ANSWER_SUFFIX])
        needed = images + prompt + reply + 8  # where texts are joined, tokens may split in another way
        rounded = -(-needed // STEP_OF_LENGTH) * STEP_OF_LENGTH
        return min(rounded, _most_positions(self.model_path, self.trust) or rounded)

    def _prompt_length(self, prompt: str, image) -> int:
        return len(self.processor(text=[self._text(prompt)], images=[image]).input_ids[0])

    def _check_processor(self) -> None:
        """Raise InputError where the processor fails on a plain image: then no image is to blame."""
        try:
            self._prompt_length("What is it?", Image.new("RGB", (64, 64)))
            if self.llm:
                self._processed("What is it?", Image.new("RGB", (64, 64)))
        except Exception as error:
            raise InputError(f"{self.model_path}: its processor fails on a plain image: {error}") from None

    # --- making requests ready, in the feed's thread ----------------------------------------------

    def _text(self, prompt: str) -> str:
        """The prompt after an image, in the model's chat template."""
        if prompt not in self.texts:
            if len(self.texts) > 1000:
                self.texts.clear()
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
            self.texts[prompt] = self.processor.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False
            )
        return self.texts[prompt]

    def _processed(self, prompt: str, image) -> dict:
        """What vLLM makes of prompt and image: the token ids, the image's patches."""
        asked = {"prompt": self._text(prompt), "multi_modal_data": {"image": image}}
        return self.llm.llm_engine.renderer.render_cmpl([asked])[0]

    def prepare(self, request: Request, image) -> tuple[dict | None, str]:
        """(what vLLM takes, ""), or (None, why it cannot be asked)."""
        if holds_mark(request.prompt, self.marks):
            return None, MARK_IN_IT
        try:
            processed = self._processed(request.prompt, image)
        except Exception as error:
            if too_long := _too_long(error):
                return None, too_long
            self._check_processor()
            try:
                self._processed("What is it?", image)
                return None, f"question: the processor refuses it ({_reason(error)})"
            except Exception:
                return None, f"image: the processor refuses it ({_reason(error)})"
        length = len(processed["prompt_token_ids"])
        if length >= self.length:
            # vLLM holds for sent what it has processed, and would not send this image with a shorter prompt.
            for digest in processed.get("mm_hashes", {}).get("image", ()):
                self.llm.llm_engine.renderer.mm_processor_cache.invalidate(digest)
            return None, f"prompt: {length} tokens with the image are too long for --max-model-len {self.length}"
        if len(self.verified) < VERIFIED and image.size not in self.verified:
            self.verified.add(image.size)
            self._verify(request, image, processed["prompt_token_ids"])
        return processed, ""

    def _verify(self, request: Request, image, ids: list[int]) -> None:
        """Raise InputError where vLLM sees this image in more or fewer visual tokens than the processor makes of it."""
        expected = self.processor(text=[self._text(request.prompt)], images=[image]).input_ids[0]
        mark = getattr(self.processor, "image_token_id", None)
        ours, theirs = ([i for i in row if mark is None or i == mark] for row in (expected, ids))
        if len(ours) != len(theirs):
            raise InputError(
                f"{self.model_path}: vLLM makes {len(theirs)} visual tokens of {request.image_path}, its processor "
                f"{len(ours)} with --min-pixels {self.pixels[0]} --max-pixels {self.pixels[1]}. Use --engine hf."
            )

    # --- asking -----------------------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies as they finish. Those about one image are asked one after the other."""
        missing = [request for request in requests if request.key not in done]
        self.load(missing)
        self.started, self.earlier = time.perf_counter(), self.tokens
        place = {}
        for request in missing:
            place.setdefault(request.image_path, len(place))
        missing.sort(key=lambda request: place[request.image_path])
        feed, live = Feed(missing, self.prepare), {}
        try:
            yield from self._replies(feed, live)
        finally:
            feed.close()
            if live and self.llm:  # the caller has had enough
                with contextlib.suppress(Exception):
                    self.llm.llm_engine.abort_request(list(live))

    def _replies(self, feed: Feed, live: dict[str, Row]) -> Iterator[list[dict]]:
        from vllm.exceptions import VLLMClientError

        clock, engine = time.perf_counter, self.llm.llm_engine
        while feed.left or live:
            replies = []
            while feed.left and len(live) < self.in_flight:
                started = clock()
                row = feed.take(wait=not live and not replies)
                self.waited += 0 if live else clock() - started
                if row is None:
                    break
                if not row.error:
                    number = str(next(self.ids))  # a key may be there twice, or hold a file name that is no Unicode
                    try:
                        engine.add_request(number, row.processed, self._params(row.request))
                        row.processed, live[number] = None, row
                    except VLLMClientError as error:
                        row.error = _too_long(error) or f"vLLM refuses it: {_reason(error)}"
                if row.error:
                    permanent = not row.error.startswith("prompt:")  # which a longer --max-model-len may take
                    replies += self._finish(
                        row, {"key": row.request.key, "error": row.error, "permanent": permanent}, feed
                    )
            if live:
                started = clock()
                try:
                    outputs = engine.step()
                except Exception as error:
                    raise InputError(f"vLLM failed: {_reason(error)}. What is finished is kept.") from error
                for output in outputs:
                    if row := live.get(output.request_id):
                        reply = self._reply(row, output)
                        if reply:
                            del live[output.request_id]
                            replies += self._finish(row, reply, feed)
                self.steps, self.rows = self.steps + 1, self.rows + len(live)
                self.worked += clock() - started
            if replies:
                yield replies

    def _params(self, request: Request):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        seed = hashlib.sha256(f"{request.seed}:{request.key}".encode("utf-8", "surrogatepass")).digest()
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p if request.temperature else 1.0,
            top_k=0,
            max_tokens=request.max_new_tokens,
            seed=int.from_bytes(seed[:7], "big") if request.temperature else None,
            repetition_penalty=self.repetition_penalty,
            logprobs=0,  # of the chosen token alone; without it there is no sum
            output_kind=RequestOutputKind.CUMULATIVE,
        )

    def _reply(self, row: Row, output) -> dict | None:
        """The reply, once it is complete: at its end token, at the longest, or at the line break that ends it."""
        written, request = output.outputs[0], row.request
        new, row.seen = written.text[row.seen :], len(written.text)
        stopped = bool(request.stop) and "\n" in new and STOPS[request.stop](self.opened + written.text)
        if stopped and not output.finished:
            self.llm.llm_engine.abort_request([output.request_id])
        if not stopped and not output.finished:
            return None
        self.tokens += len(written.token_ids)
        self.prompted += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens or 0
        n, short = len(written.token_ids), len(written.token_ids) < request.max_new_tokens
        failed = {"key": request.key, "permanent": False}
        if written.finish_reason == "length" and short:
            return failed | {"error": f"its reply does not fit in --max-model-len {self.length}"}
        if written.finish_reason not in ("stop", "length", None):
            return failed | {"error": f"vLLM gave it up ({written.finish_reason})"}
        return {
            "key": request.key,
            # Not written.text: it lacks a last character that was cut in two.
            "text": self.opened + self.decoder(written.token_ids),
            # What else was in the batch shows from the sixth digit on in float32: a resumed run gives the same bytes.
            "logprob": round(written.cumulative_logprob, 3),
            "tokens": n,
            "finish_reason": "length" if written.finish_reason == "length" and not stopped else "stop",
        }

    def _finish(self, row: Row, reply: dict, feed: Feed) -> list[dict]:
        """What can be handed on: the reply; nothing where its follow-up comes first; of that, the reply it followed."""
        if row.follows:
            row.follows["follow_up"] = reply
            return [row.follows]
        asked = follow_up_request(row.request, reply, self.marks)
        if not asked:
            return [reply]
        feed.push(Row(asked, follows=reply))
        return []


def _reason(error: BaseException) -> str:
    """The first line of what lies behind an error; a validation error's opens with words about itself."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else repr(error))
    return said.removeprefix("Value error, ").split(" [type=", 1)[0]


def _too_long(error: Exception) -> str:
    """Why a prompt is too long, if that is what the error says."""
    said = _reason(error)
    return f"prompt: {said}" if "maximum context length" in said or "maximum model length" in said else ""


def _most_positions(path: str, trust_remote_code: bool) -> int | None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _repetition_penalty(path: str) -> float:
    """The checkpoint's, as transformers' greedy search applies it."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path).repetition_penalty or 1.0
    except OSError:
        return 1.0
