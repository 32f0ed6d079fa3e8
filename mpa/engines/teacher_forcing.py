"""What a model gives a text as its answer: prompt and answer in one pass, without generation (teacher forcing)."""

import torch

from mpa.models import families


def append(inputs: dict, answers: list[list[int]], processor) -> dict:
    """The inputs of prompts, which end in the last column, with each row's answer behind, padded on the right."""
    ids, width = inputs["input_ids"], max(map(len, answers))
    rows = torch.full((len(ids), width), processor.tokenizer.pad_token_id, dtype=ids.dtype)
    for row, answer in zip(rows, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    there = (torch.arange(width) < torch.tensor([[len(answer)] for answer in answers])).to(ids.dtype)
    added = {"input_ids": rows, "attention_mask": there}
    if families.attends_both_ways(processor) == "prompts":  # the answer's tokens see only what comes before them
        inputs = inputs | {"token_type_ids": torch.zeros_like(ids)}
        added["token_type_ids"] = torch.ones_like(rows)
    for name in ("mm_token_type_ids", "token_type_ids"):  # of images
        if name in inputs and name not in added:
            added[name] = torch.zeros_like(rows)
    return inputs | {name: torch.cat([inputs[name], new.to(inputs[name])], dim=1) for name, new in added.items()}


def log_probabilities(logits: torch.Tensor, answers: list[list[int]], end_tokens: list[int]) -> list[float]:
    """Of each answer, its tokens and then any end token, from the logits [B, 1 + longest answer, V] that predict them."""
    found = []
    for scores, answer in zip(logits.float().log_softmax(-1), answers, strict=True):
        tokens = scores[range(len(answer)), answer].sum()
        found.append((tokens + scores[len(answer), end_tokens].logsumexp(0)).item())
    return found
