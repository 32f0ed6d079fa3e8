"""The `vllm` engine: vLLM, for throughput on one GPU or several. See requirements/vllm.txt.

The path of a request, in the order of the methods of VLLMEngine:

    generate     requests about one image stand together, and a Prefetcher makes them ready ahead of the model
    _replies     ready requests are added up to a limit, and vLLM makes a step: it batches by itself
    _add         one request goes to vLLM
    _reply       a row's reply, once it is complete; it is cut at the line that ends its answer
    _finish      its follow-up goes first, while vLLM still has the image's key-values; its reply is attached

In float32 the greedy replies are those of `hf`.
"""

import contextlib
import hashlib
import itertools
import time
from collections.abc import Container, Iterable, Iterator
from importlib.util import find_spec

from mpa.engines import Request, follow_up_request, not_finite
from mpa.engines.decoding import Decoder
from mpa.engines.prefetch import PendingRequest, Prefetcher
from mpa.engines.preprocessing import Preprocessor
from mpa.engines.vllm_inputs import VLLMInputs
from mpa.engines.vllm_model import INSTALL, VLLMModel, reason, too_long
from mpa.files import distributed
from mpa.files.records import InputError
from mpa.method.prompts import STOPS
from mpa.models import families, loading


class VLLMEngine:
    """One model; see `mpa.engines` for what an engine takes and yields.

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
        min_pixels: int = families.MIN_PIXELS,
        max_pixels: int = families.MAX_PIXELS,
        max_tiles: int | None = None,
    ):
        if find_spec("vllm") is None:
            raise InputError(INSTALL)
        if distributed.WORLD > 1:
            raise InputError(
                "--engine vllm distributes the work over GPUs itself: start it once, without accelerate launch, "
                "with --tensor-parallel-size or --pipeline-parallel-size."
            )
        self.model_path, self.trust_remote_code, self.pixels = model_path, trust_remote_code, (min_pixels, max_pixels)
        parallel = tensor_parallel_size, pipeline_parallel_size
        self.model = VLLMModel(model_path, dtype, trust_remote_code, *parallel, gpu_memory_utilization)
        self.max_model_len, self.max_tiles = max_model_len, max_tiles
        self.tokens = self.prompt_tokens = self.cached_tokens = 0  # of replies; of prompts; of prompts, in vLLM's cache
        self.tokens_before = 0  # of replies, before this call of `generate`
        self.model_seconds = self.wait_seconds = self.started = 0.0  # waiting: for images
        self.steps = self.step_rows = 0
        self.preprocessor: Preprocessor | None = None
        self.request_ids = itertools.count()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Free the model, so that the next one has the memory."""
        self.model.unload()
        self.preprocessor = None

    @property
    def marks(self) -> frozenset[str]:
        """The prompt format's own tokens, which no prompt may hold."""
        return self.preprocessor.marks if self.preprocessor else frozenset()

    def facts(self) -> dict:
        """Device, dtype, tokens written, the share of the time in which the model waited for
        images, mean requests per step, and the share of the prompts' tokens found in vLLM's prefix cache."""
        return {
            "device": self.model.device,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tokens": self.tokens,
            "waited": round(self.wait_seconds / max(self.wait_seconds + self.model_seconds, 1e-9), 4),
            "rows": round(self.step_rows / max(self.steps, 1), 1),
            "cached": round(self.cached_tokens / max(self.prompt_tokens, 1), 4),
        }

    def status(self) -> str:
        seconds, facts = max(time.perf_counter() - self.started, 1e-9), self.facts()
        return f"{(self.tokens - self.tokens_before) / seconds:.0f} tokens/s, waited {facts['waited']:.0%}"

    def load(self, requests: list[Request]) -> None:
        """Load processor and model; the model again where these requests are longer than what it was loaded for."""
        if loading.adapted(self.model_path):
            raise InputError(
                f"{self.model_path}: holds LoRA adapters. For vllm, merge them first: "
                "PL/Qwen2-VL-Finetune/scripts/merge_lora.sh; --engine hf loads adapters directly."
            )
        if not self.preprocessor:
            self.preprocessor = Preprocessor(self.model_path, self.pixels, self.trust_remote_code, self.max_tiles)
            self.inputs = VLLMInputs(self.preprocessor, self.model)
            self.decoder = Decoder(self.preprocessor.tokenizer)
        needed = self.max_model_len or self.inputs.needed_length(requests)
        if self.model.llm and needed > self.model.length:
            self.model.unload()
        if not self.model.llm:
            self.model.load(needed, self.inputs.processor_settings())

    # --- the path of a request --------------------------------------------------------------------

    def generate(self, requests: Iterable[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies as they finish."""
        missing = [request for request in requests if request.key not in done]
        self.load(missing)
        self.started, self.tokens_before = time.perf_counter(), self.tokens
        place = {}  # of each image; one image's requests stand together, so that its key-values are still cached
        for request in missing:
            place.setdefault(request.image_path, len(place))
        missing.sort(key=lambda request: place[request.image_path])
        prefetcher, in_flight = Prefetcher(missing, self.inputs.prepare), {}
        try:
            yield from self._replies(prefetcher, in_flight)
        finally:
            prefetcher.close()
            if in_flight and self.model.llm:  # the caller has stopped early
                with contextlib.suppress(Exception):
                    self.model.engine.abort_request(list(in_flight))

    def _replies(self, prefetcher: Prefetcher, in_flight: dict[str, PendingRequest]) -> Iterator[list[dict]]:
        """Replies of each step. `in_flight` holds the requests that vLLM has, by its id for them."""
        while prefetcher.remaining or in_flight:
            replies = []
            while prefetcher.remaining and len(in_flight) < self.model.max_in_flight:
                started = time.perf_counter()
                pending = prefetcher.take(wait=not in_flight and not replies)
                self.wait_seconds += 0 if in_flight else time.perf_counter() - started
                if pending is None:
                    break
                if error := self._add(pending, in_flight):
                    replies += self._finish(pending, error, prefetcher)
            if in_flight:
                started = time.perf_counter()
                try:
                    outputs = self.model.engine.step()
                except Exception as error:
                    raise InputError(f"vLLM failed: {reason(error)}. Finished replies are kept.") from error
                for output in outputs:
                    pending = in_flight.get(output.request_id)
                    if pending and (reply := self._reply(pending, output)):
                        del in_flight[output.request_id]
                        replies += self._finish(pending, reply, prefetcher)
                self.steps, self.step_rows = self.steps + 1, self.step_rows + len(in_flight)
                self.model_seconds += time.perf_counter() - started
            if replies:
                yield replies

    def _add(self, pending: PendingRequest, in_flight: dict[str, PendingRequest]) -> dict | None:
        """Give a request to vLLM; an error reply where it cannot be asked."""
        from vllm.exceptions import VLLMClientError

        if not pending.error:
            request_id = str(next(self.request_ids))  # keys may occur twice, or hold a file name that is not Unicode
            try:
                self.model.engine.add_request(request_id, pending.inputs, self._params(pending.request))
                pending.inputs, in_flight[request_id] = None, pending
                return None
            except VLLMClientError as error:
                pending.error = too_long(error) or f"vLLM refuses it: {reason(error)}"
        permanent = not pending.error.startswith("prompt:")  # a longer --max-model-len may take the prompt
        return {"key": pending.request.key, "error": pending.error, "permanent": permanent}

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
            repetition_penalty=self.model.repetition_penalty,
            logprobs=0,  # of the chosen token alone; without it there is no sum
            output_kind=RequestOutputKind.CUMULATIVE,
        )

    def _reply(self, pending: PendingRequest, output) -> dict | None:
        """The reply, once it is complete: at its end token, at the token limit, or at the line break that ends it."""
        generated, request = output.outputs[0], pending.request
        new, pending.scanned = generated.text[pending.scanned :], len(generated.text)
        tag = self.preprocessor.reasoning_tag
        stopped = bool(request.stop) and "\n" in new and STOPS[request.stop](tag + generated.text)
        if stopped and not output.finished:
            self.model.engine.abort_request([output.request_id])
        if not stopped and not output.finished:
            return None
        tokens = len(generated.token_ids)
        self.tokens += tokens
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens or 0
        failed = {"key": request.key, "permanent": False}
        if generated.finish_reason == "length" and tokens < request.max_new_tokens:
            return failed | {"error": f"its reply does not fit in --max-model-len {self.model.length}"}
        if generated.finish_reason not in ("stop", "length", None):
            return failed | {"error": f"vLLM gave it up ({generated.finish_reason})"}
        if error := not_finite(request.key, generated.cumulative_logprob, self.model.dtype):
            return error
        return {
            "key": request.key,
            # Not generated.text: it lacks a last character that was cut in two.
            "text": tag + self.decoder(generated.token_ids),
            # In float32 the rest of the batch changes the sixth digit: rounded, a resumed run gives the same bytes.
            "logprob": round(generated.cumulative_logprob, 3),
            "tokens": tokens,
            "finish_reason": "length" if generated.finish_reason == "length" and not stopped else "stop",
        }

    def _finish(self, pending: PendingRequest, reply: dict, prefetcher: Prefetcher) -> list[dict]:
        """Replies that are complete now: none while a follow-up is missing, and the parent's once it is attached."""
        if pending.parent_reply:
            pending.parent_reply["follow_up"] = reply
            return [pending.parent_reply]
        follow_up = follow_up_request(pending.request, reply, self.marks)
        if not follow_up:
            return [reply]
        prefetcher.push(PendingRequest(follow_up, parent_reply=reply))
        return []
