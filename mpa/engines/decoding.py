"""How the hf engine chooses each row's next token, and when it ends the row."""

import random

import torch
from transformers import LogitsProcessor, StoppingCriteria

from mpa.answers.replies import is_reasoning_tag
from mpa.engines import Request
from mpa.method.prompts import STOPS


class TokenSampler(LogitsProcessor):
    """Chooses each row's next token, greedily or by top-p sampling, and records its log-probability.

    Each request draws from a random generator of its own and inverts the cumulative distribution at the drawn number,
    so that a sampled token does not depend on the rest of the batch. All other tokens get -inf.
    """

    def __init__(self, requests: list[Request]):
        # surrogatepass: a key may hold a file name that is not Unicode.
        self.generators = [random.Random(f"{r.seed}:{r.key}".encode("utf-8", "surrogatepass")) for r in requests]
        self.temperature = torch.tensor([[r.temperature] for r in requests], dtype=torch.float64)  # [B, 1]
        self.top_p = torch.tensor([[r.top_p] for r in requests], dtype=torch.float64)
        self.logprobs = []  # [B] for each step

    def __call__(self, input_ids, scores):  # [B, T], [B, V]
        choice = scores.argmax(-1, keepdim=True)
        if self.temperature.any():
            choice = torch.where(self.temperature.to(scores.device) > 0, self._sample(scores), choice)
        self.logprobs.append(scores.float().log_softmax(-1).gather(1, choice)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, choice, 0.0)

    def _sample(self, scores):  # [B, V] -> [B, 1]
        precision = torch.float32 if scores.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        draws = torch.tensor([[generator.random()] for generator in self.generators], dtype=torch.float64)
        draws, temperature, top_p = (t.to(scores.device, precision) for t in (draws, self.temperature, self.top_p))
        probabilities = (scores.to(precision) / temperature.where(temperature > 0, 1.0)).softmax(-1)
        ranked, order = probabilities.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.zeros_like(probabilities).scatter_(1, order, ranked * (before < top_p))
        cumulative = kept.cumsum(-1)
        return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=kept.shape[1] - 1)


def line_break_tokens(tokenizer):  # -> [n]
    """Ids of the tokens that contain a line break, as byte-level ("Ċ") and other vocabularies write it."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([i for i, t in enumerate(tokens) if t and ("Ċ" in t or "\n" in t or t == "<0x0A>")])


class Decoder:
    """Token ids to text, without special tokens except those that open and close reasoning."""

    def __init__(self, tokenizer):
        self.tokenizer, tokens = tokenizer, getattr(tokenizer, "added_tokens_decoder", {})
        self.tags = {i: str(token) for i, token in tokens.items() if token.special and is_reasoning_tag(str(token))}

    def __call__(self, ids) -> str:
        ids = [int(i) for i in ids]
        parts, start = [], 0
        for at in (at for at, i in enumerate(ids) if i in self.tags):
            parts += [self.tokenizer.decode(ids[start:at], skip_special_tokens=True), self.tags[ids[at]]]
            start = at + 1
        return "".join([*parts, self.tokenizer.decode(ids[start:], skip_special_tokens=True)])


class LineStopper(StoppingCriteria):
    """Ends a row at the line break that completes its answer or annotation (`Request.stop`).

    `lengths` are the tokens kept of each row; `complete` says which rows ended at such a line break. `reasoning_tag`
    is the tag with which the chat template opens a reasoning block, or "".
    """

    def __init__(self, requests: list[Request], decoder: Decoder, line_breaks, prompt_length: int, reasoning_tag: str):
        self.requests, self.decoder, self.line_breaks = requests, decoder, line_breaks
        self.prompt_length, self.reasoning_tag = prompt_length, reasoning_tag
        self.lengths = torch.tensor([r.max_new_tokens for r in requests])
        self.complete = [False] * len(requests)

    def __call__(self, input_ids, scores, **_):  # [B, T] -> [B]
        generated = input_ids[:, self.prompt_length :]
        length = generated.shape[1]
        at_line_break = torch.isin(generated[:, -1], self.line_breaks.to(generated.device))
        for row in at_line_break.nonzero()[:, 0].tolist():
            stop = self.requests[row].stop
            if stop and length <= self.lengths[row] and not self.complete[row]:
                self.complete[row] = STOPS[stop](self.reasoning_tag + self.decoder(generated[row]))
                if self.complete[row]:
                    self.lengths[row] = length
        return (self.lengths <= length).to(input_ids.device)
