"""How the hf engine chooses a row's next token, and when it ends the row."""

import random

import torch
from transformers import LogitsProcessor, StoppingCriteria

from mpa.engines import Request
from mpa.prompts import STOPS
from mpa.replies import is_reasoning_tag


class Chooser(LogitsProcessor):
    """Chooses each row's next token, greedily or by top-p sampling, and keeps its log-probability.

    A sampled token is found by inverting the distribution at a number drawn from a generator of the
    request's own, so that it does not depend on what else is in the batch. Leaves one token possible.
    """

    def __init__(self, batch: list[Request]):
        # A key may hold a file name that is no Unicode.
        self.draws = [random.Random(f"{r.seed}:{r.key}".encode("utf-8", "surrogatepass")) for r in batch]
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
        precision = torch.float32 if scores.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        draws = torch.tensor([[generator.random()] for generator in self.draws], dtype=torch.float64)
        draws, temperature, top_p = (t.to(scores.device, precision) for t in (draws, self.temperature, self.top_p))
        probabilities = (scores.to(precision) / temperature.where(temperature > 0, 1.0)).softmax(-1)
        ranked, order = probabilities.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        kept = torch.zeros_like(probabilities).scatter_(1, order, ranked * (before < top_p))
        steps = kept.cumsum(-1)
        return torch.searchsorted(steps, draws * steps[:, -1:], right=True).clamp(max=steps.shape[1] - 1)


def line_breaks(tokenizer):  # -> [n]
    """Ids of the tokens with a line break in them, as byte-level ("Ċ") and other vocabularies write it."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([i for i, t in enumerate(tokens) if t and ("Ċ" in t or "\n" in t or t == "<0x0A>")])


class Decoder:
    """Token ids to text, without the special tokens, but for those that open and close reasoning."""

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


class Stopper(StoppingCriteria):
    """Ends a row at the line break that completes what was asked; `lengths` are the tokens kept of each.

    `opened` is the tag with which the chat template has opened the reply's reasoning, or "".
    """

    def __init__(self, batch: list[Request], decoder: Decoder, line_breaks, prompt_length: int, opened: str = ""):
        self.batch, self.decoder, self.prompt_length, self.opened = batch, decoder, prompt_length, opened
        self.line_breaks = line_breaks
        self.lengths = torch.tensor([r.max_new_tokens for r in batch])
        self.complete = [False] * len(batch)

    def __call__(self, input_ids, scores, **_):  # [B, T] -> [B]
        written = input_ids[:, self.prompt_length :]
        broken = torch.isin(written[:, -1], self.line_breaks.to(written.device))
        for row in broken.nonzero()[:, 0].tolist():
            stop = self.batch[row].stop
            if stop and written.shape[1] <= self.lengths[row] and not self.complete[row]:
                self.complete[row] = STOPS[stop](self.opened + self.decoder(written[row]))
                if self.complete[row]:
                    self.lengths[row] = written.shape[1]
        return (self.lengths <= written.shape[1]).to(input_ids.device)
