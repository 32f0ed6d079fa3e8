"""The `hf` engine: transformers on one GPU or on the CPU, any model that its Auto classes load.

Faster than the plain loop, with the same greedy replies: pictures are decoded and processed in
worker processes while the model runs, requests of near-equal length share a batch, and a row stops
at the line that ends its answer.
"""

import gc
import multiprocessing
import random
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from mpa import models
from mpa.engines import Request
from mpa.pictures import PictureError, open_picture, picture_size
from mpa.prompts import annotation_is_complete, answer_is_complete

STOPS = {"annotation": annotation_is_complete, "answer": answer_is_complete}
WINDOW = 64  # batches within which requests are sorted by length


class HFEngine:
    """`generate` for one model; see `mpa.engines` for what it takes and yields.

    `workers` processes prepare batches ahead of the model, at most two batches each; 0 prepares
    them in this process.
    """

    def __init__(
        self,
        model_path: str,
        batch_size: int = 8,
        device: str = "auto",
        dtype: str = "auto",
        workers: int = 1,
        min_pixels: int = models.MIN_PIXELS,
        max_pixels: int = models.MAX_PIXELS,
        trust_remote_code: bool = False,
    ):
        self.model_path, self.batch_size, self.workers = model_path, batch_size, workers
        self.device, self.dtype, self.trust = device, dtype, trust_remote_code
        self.pixels = (min_pixels, max_pixels)
        self.model = self.processor = self.pool = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Free the model and the workers, so that the next model has the memory."""
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
        self.model = self.processor = self.pool = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load(self) -> None:
        """Processor, workers, model, in this order: workers start before the model takes memory."""
        if self.model:
            return
        self.processor = models.load_processor(self.model_path, *self.pixels, self.trust)
        if self.workers:
            # Forked, so that a worker has the processor at once; it never touches the device.
            context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
            self.pool = ProcessPoolExecutor(self.workers, context, _start_worker, (self.processor,))
            self.pool.submit(int).result()
        self.device = models.pick_device(self.device)
        self.dtype = models.pick_dtype(self.dtype, self.device)
        self.model = models.load_model(self.model_path, self.device, self.dtype, self.trust)

    def generate(self, requests: list[Request], done: Container[str] = ()) -> Iterator[list[dict]]:
        """Replies a batch at a time. Batches are planned over all requests and those without any work
        left are passed over, so that a resumed run forms the batches that an uninterrupted one would.
        """
        self.load()
        batches = (b for b in self._plan(requests) if any(r.key not in done for r in b))
        for batch, (good, inputs, replies) in self._prepare(batches):
            if good:
                replies = replies + self._run([batch[i] for i in good], inputs)
            yield replies

    def _plan(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Batches of near-equal length: long pictures and prompts with long ones, within a window."""
        size = WINDOW * self.batch_size
        for start in range(0, len(requests), size):
            window = sorted(requests[start : start + size], key=self._length)
            for first in range(0, len(window), self.batch_size):
                yield window[first : first + self.batch_size]

    def _length(self, request: Request) -> float:
        """A stand-in for the prompt's length in tokens: pixels of the picture as resized, and characters."""
        width, height = picture_size(request.image_path)
        return min(max(width * height, self.pixels[0]), self.pixels[1]) / 28**2 + len(request.prompt) / 4

    def _prepare(self, batches):
        """Each batch with what `prepare` makes of it, prepared ahead and handed on in order."""
        if not self.pool:
            for batch in batches:
                yield batch, prepare(self.processor, _content(batch))
            return
        waiting = deque()
        for batch in batches:
            waiting.append((batch, self.pool.submit(_prepare_in_worker, _content(batch))))
            if len(waiting) > 2 * self.workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    @torch.inference_mode()
    def _run(self, batch: list[Request], inputs: dict) -> list[dict]:
        inputs = {name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()}
        floating = {n: v.to(self.dtype) for n, v in inputs.items() if v.is_floating_point()}
        prompt_length = inputs["input_ids"].shape[1]
        chooser = Chooser(batch)
        stopper = Stopper(batch, self.processor.tokenizer, prompt_length)
        out = self.model.generate(
            **{**inputs, **floating},
            max_new_tokens=max(r.max_new_tokens for r in batch),
            do_sample=False,  # `chooser` has chosen; what the checkpoint's generation_config says of sampling is void
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([stopper]),
        )
        written = out[:, prompt_length:]
        # A row that ended early is padded; its length counts the end token.
        ends = self.model.generation_config.eos_token_id
        ends = self.processor.tokenizer.eos_token_id if ends is None else ends
        is_end = torch.isin(written, torch.tensor(ends, device=written.device))
        first_end = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, written.shape[1])
        lengths = torch.minimum(first_end, stopper.lengths.to(written.device)).tolist()
        logprobs = torch.stack(chooser.logprobs, dim=1).cpu()  # [B, T]
        return [
            {
                "key": request.key,
                "text": self.processor.tokenizer.decode(row[:n], skip_special_tokens=True),
                "logprob": round(values[:n].sum().item(), 4),
                "tokens": n,
            }
            for request, row, n, values in zip(batch, written, lengths, logprobs, strict=True)
        ]


class Chooser(LogitsProcessor):
    """Chooses each row's next token, greedily or by top-p sampling, and keeps its log-probability.

    A sampled token is found by inverting the distribution at a number drawn from a generator of the
    request's own, so that it does not depend on what else is in the batch. Leaves one token possible.
    """

    def __init__(self, batch: list[Request]):
        self.draws = [random.Random(f"{r.seed}:{r.key}") for r in batch]
        self.temperature = torch.tensor([[r.temperature] for r in batch], dtype=torch.float64)  # [B, 1]
        self.top_p = torch.tensor([[r.top_p] for r in batch], dtype=torch.float64)
        self.logprobs = []  # a [B] each step

    def __call__(self, input_ids, scores):  # [B, T], [B, V]
        choice = scores.argmax(-1, keepdim=True)
        if self.temperature.any():
            choice = torch.where(self.temperature.to(scores.device) > 0, self._sample(scores), choice)
        self.logprobs.append(scores.float().log_softmax(-1).gather(1, choice)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, choice, 0.0)

    def _sample(self, scores):  # [B, V] -> [B, 1]
        draws = torch.tensor([[generator.random()] for generator in self.draws], dtype=torch.float64)
        draws, temperature, top_p = (t.to(scores.device) for t in (draws, self.temperature, self.top_p))
        probabilities = (scores.double() / temperature.where(temperature > 0, 1.0)).softmax(-1)
        ranked, order = probabilities.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.zeros_like(probabilities).scatter_(1, order, ranked * (before < top_p))
        steps = kept.cumsum(-1)
        return torch.searchsorted(steps, draws * steps[:, -1:], right=True).clamp(max=steps.shape[1] - 1)


class Stopper(StoppingCriteria):
    """Ends a row at the line break that completes what was asked; `lengths` are the tokens kept of each."""

    def __init__(self, batch: list[Request], tokenizer, prompt_length: int):
        self.batch, self.tokenizer, self.prompt_length = batch, tokenizer, prompt_length
        self.lengths = torch.tensor([r.max_new_tokens for r in batch])

    def __call__(self, input_ids, scores, **_):  # [B, T] -> [B]
        written = input_ids[:, self.prompt_length :]
        if any(request.stop for request in self.batch):
            last = self.tokenizer.batch_decode(written[:, -1:])
            for row, request in enumerate(self.batch):
                if request.stop and "\n" in last[row] and written.shape[1] < self.lengths[row]:
                    text = self.tokenizer.decode(written[row], skip_special_tokens=True)
                    if STOPS[request.stop](text):
                        self.lengths[row] = written.shape[1]
        return (self.lengths <= written.shape[1]).to(input_ids.device)


# --- in the workers ---------------------------------------------------------------------------------


def _content(batch: list[Request]) -> list[tuple[str, str]]:
    return [(request.key, request.image_path, request.prompt) for request in batch]


def prepare(processor, content: list[tuple[str, str, str]]) -> tuple[list[int], dict, list[dict]]:
    """(rows that can be used, the processor's output for them as numpy arrays, replies for the others)."""
    good, pictures, errors = [], [], []
    for row, (key, path, _) in enumerate(content):
        try:
            pictures.append(open_picture(path))
            good.append(row)
        except PictureError as error:
            errors.append({"key": key, "error": f"picture: {error}"})
    try:
        return good, _process(processor, pictures, [content[row][2] for row in good]), errors
    except Exception:  # one picture may have spoilt the batch: an extreme shape, say
        for row, picture in zip(good[:], pictures[:], strict=True):
            try:
                _process(processor, [picture], [content[row][2]])
            except Exception as error:
                errors.append({"key": content[row][0], "error": f"picture: the processor refuses it ({error})"})
                good.remove(row)
                pictures.remove(picture)
        return good, _process(processor, pictures, [content[row][2] for row in good]), errors


def _process(processor, pictures: list, prompts: list[str]) -> dict:
    """The processor's output as numpy arrays, which travel through a pipe: shared memory is scarce in containers."""
    if not pictures:
        return {}
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]} for prompt in prompts
    ]
    texts = [processor.apply_chat_template([m], add_generation_prompt=True, tokenize=False) for m in messages]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    return {name: tensor.numpy() for name, tensor in inputs.items()}


def _start_worker(processor) -> None:
    global _processor
    _processor = processor
    torch.set_num_threads(1)


def _prepare_in_worker(content):
    return prepare(_processor, content)
