"""The hf engine's decode loop: how each row's next token is chosen, and where its reply ends.

On a GPU, a step of the loop waits for the device once: for the step's tokens, in one copy.
"""

import contextlib
import random

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from mpa.answers.replies import is_reasoning_tag
from mpa.engines import Request
from mpa.method.prompts import STOPS


class TokenSampler:
    """Chooses each row's next token, greedily or by top-p sampling, and records its log-probability.

    Each request draws from a random generator of its own and inverts the cumulative distribution at the drawn number,
    so that a sampled token does not depend on the rest of the batch. What it needs is on the device before the first step.
    """

    def __init__(self, requests: list[Request], device: str):
        self.logprobs = []  # [B] for each step
        self.sampled = any(request.temperature for request in requests)
        if not self.sampled:
            return
        self.precision = torch.float32 if device.startswith("mps") else torch.float64  # Apple's GPUs have no float64
        # surrogatepass: a key may hold a file name that is not Unicode.
        generators = [random.Random(f"{r.seed}:{r.key}".encode("utf-8", "surrogatepass")) for r in requests]
        steps = range(max(request.max_new_tokens for request in requests))
        draws = torch.tensor([[g.random() for _ in steps] for g in generators], dtype=torch.float64).T[..., None]
        temperature = torch.tensor([[r.temperature] for r in requests], dtype=torch.float64)
        top_p = torch.tensor([[r.top_p] for r in requests], dtype=torch.float64)
        self.draws, self.temperature, self.top_p = (  # [T, B, 1], [B, 1], [B, 1]
            numbers.to(self.precision).to(device) for numbers in (draws, temperature, top_p)
        )

    def __call__(self, scores):  # [B, V] -> [B]
        choice = scores.argmax(-1, keepdim=True)
        if self.sampled:
            choice = torch.where(self.temperature > 0, self._sample(scores), choice)
        self.logprobs.append(scores.log_softmax(-1).gather(1, choice)[:, 0])
        return choice[:, 0]

    def _sample(self, scores):  # [B, V] -> [B, 1]
        draws = self.draws[len(self.logprobs)]
        probabilities = (scores.to(self.precision) / self.temperature.where(self.temperature > 0, 1.0)).softmax(-1)
        ranked, order = probabilities.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.zeros_like(probabilities).scatter_(1, order, ranked * (before < self.top_p))
        cumulative = kept.cumsum(-1)
        return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=kept.shape[1] - 1)


def line_break_tokens(tokenizer) -> frozenset[int]:
    """Ids of the tokens that contain a line break, as byte-level ("Ċ") and other vocabularies write it."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return frozenset(i for i, t in enumerate(tokens) if t and ("Ċ" in t or "\n" in t or t == "<0x0A>"))


class Decoder:
    """Token ids to text, without special tokens except those that open and close reasoning."""

    def __init__(self, tokenizer):
        self.tokenizer, tokens = tokenizer, getattr(tokenizer, "added_tokens_decoder", {})
        self.tags = {i: str(token) for i, token in tokens.items() if token.special and is_reasoning_tag(str(token))}

    def __call__(self, ids: list[int]) -> str:
        parts, start = [], 0
        for at in (at for at, i in enumerate(ids) if i in self.tags):
            parts += [self.tokenizer.decode(ids[start:at], skip_special_tokens=True), self.tags[ids[at]]]
            start = at + 1
        return "".join([*parts, self.tokenizer.decode(ids[start:], skip_special_tokens=True)])


class Replies:
    """The tokens of each row's reply, up to where it ends.

    That is its end token, the line break that completes its answer or annotation (`Request.stop`), or its limit.
    `complete` says which rows ended by themselves. `text` gives a reply after `reasoning_tag`, the tag with which the chat
    template opens a reasoning block, or "".
    """

    def __init__(
        self,
        requests: list[Request],
        decoder: Decoder,
        line_breaks: frozenset[int],
        end_tokens: list[int],
        reasoning_tag: str,
    ):
        self.requests, self.decoder, self.line_breaks = requests, decoder, line_breaks
        self.end_tokens, self.reasoning_tag = end_tokens, reasoning_tag
        self.limits = [request.max_new_tokens for request in requests]
        self.tokens = [[] for _ in requests]
        self.complete = [False] * len(requests)
        self.open = list(range(len(requests)))  # rows

    def text(self, row: int) -> str:
        return self.reasoning_tag + self.decoder(self.tokens[row])

    def add(self, tokens: list[int]) -> None:
        """Take the next token of every row; those of rows that have ended mean nothing."""
        for row in self.open:
            self.tokens[row].append(tokens[row])
            self.complete[row] = tokens[row] in self.end_tokens or self._is_stop(row)
        self.open = [row for row in self.open if not self.complete[row] and len(self.tokens[row]) < self.limits[row]]

    def _is_stop(self, row: int) -> bool:
        stop = self.requests[row].stop
        return bool(stop) and self.tokens[row][-1] in self.line_breaks and STOPS[stop](self.text(row))


@contextlib.contextmanager
def _padding_is_known():
    """Within, transformers makes a step's mask without a look at whether there is padding, which would wait for the device.

    `generate` has looked once: where no row has padding, it leaves the mask out.
    """

    def mask(*, q_length, attention_mask, allow_is_causal_skip=True, **more):
        may_look = allow_is_causal_skip and (q_length > 1 or attention_mask is None)
        return sdpa_mask(q_length=q_length, attention_mask=attention_mask, allow_is_causal_skip=may_look, **more)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@_padding_is_known()
def decode(model, input_ids, logits_processor, generation_config, sampler, replies, static_steps, **inputs):
    """The loop within `model.generate(custom_generate=decode, …)`, for `replies`. Returns the prompt's key-values.

    `logits_processor` is what the checkpoint's own settings ask for. `static_steps`: what computes the steps behind the
    prompt, or None: the model.

    A row that has ended goes on with the others, and what it writes is not read. So only the tokens tell what to do next,
    and they are the one thing that is awaited, after all that can be queued without them.
    """
    outputs = model._prefill(input_ids, generation_config, inputs)
    if static_steps:
        static_steps.take_over(outputs.past_key_values, inputs.get("attention_mask"))
    with model._optimize_model_for_decode():
        while True:
            inputs = model._update_model_kwargs_for_generation(outputs, inputs, is_encoder_decoder=False)
            scores = outputs.logits[:, -1].to(input_ids.device, torch.float32, copy=True)  # [B, V]
            del outputs  # the prompt's logits may be large
            tokens = sampler(logits_processor(input_ids, scores))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            step = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
            replies.add(tokens.tolist())
            if not replies.open:
                return inputs["past_key_values"]
            outputs = (static_steps or model)(**step, return_dict=True)
