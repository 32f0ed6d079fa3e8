"""The loss: the likelihood of the answers, as in the paper (section 3.3), with two options beyond it.

`--sample_weights` multiplies each sample's loss by its record's `weight`. `--anchor_kl` keeps the model near to what it answered
before the training on the records whose `kind` is anchor (Li and Hoiem 2016, Learning without Forgetting).
"""

import copy
import math

import torch
from answer_logits import AnswerLogits
from torch.nn import functional as F

from data import DataError


def sample_losses(samples: list[dict], args) -> list[dict]:
    """Each sample's `weight`, scaled to a mean of 1, and whether it is an `anchor`; without both options, nothing.

    Raises DataError where the options have nothing to work with, with the first such record.
    """
    unused = sum(sample["weight"] is not None for sample in samples)
    if not args.sample_weights and unused and args.process_index == 0:
        print(f"PL: {unused:,} samples have a weight, which is not used. See --sample_weights.", flush=True)
    if not (args.sample_weights or args.anchor_kl):
        return [{} for _ in samples]
    anchors = [sample["kind"] == "anchor" for sample in samples]
    if args.anchor_kl and not any(anchors):
        raise DataError(
            f"--anchor_kl {args.anchor_kl:g}: no record of the train files is an anchor (its `kind`). Run PI.sh with --anchors."
        )
    weights = [_weight(sample) for sample in samples] if args.sample_weights else [1.0] * len(samples)
    mean = sum(weights) / len(weights)
    if not mean:
        raise DataError("--sample_weights: all weights are 0, so there is nothing to learn.")
    return [{"weight": w / mean, "anchor": anchor} for w, anchor in zip(weights, anchors, strict=True)]


def _weight(sample: dict) -> float:
    weight = sample["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise DataError(
            f"{sample['where']}: 'weight' should be a number from 0 on: {str(weight)[:60]}. PI.sh --weights writes it; or leave out "
            "--sample_weights."
        )
    return float(weight)


class Reference:
    """The model before the training. Where it has LoRA, that is itself without its adapters; else a frozen copy in `dtype`."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        self.model = None
        if not hasattr(model, "disable_adapter"):
            self.model = copy.deepcopy(model).to(dtype).requires_grad_(False).eval()
            self.answer_logits = AnswerLogits(self.model)

    def to(self, device: torch.device) -> "Reference":
        self.model = self.model and self.model.to(device)
        return self

    @torch.no_grad()
    def logits(self, trained: torch.nn.Module, inputs: dict, mask: torch.Tensor) -> torch.Tensor:
        """[N, V] at the N positions where `mask` is True. `trained` has selected these already (`AnswerLogits`)."""
        if self.model is None:
            with trained.disable_adapter():
                return trained(**inputs, use_cache=False).logits[0]  # LoRA is for tested families
        self.answer_logits.select(mask)
        return self.answer_logits.of(self.model(**inputs, use_cache=False).logits)


def answer_loss(logits, targets, args, weight=None, anchor=None, before=None) -> torch.Tensor:
    """The sum over N labelled tokens of `logits` [N, V]: cross-entropy with `targets` [N]; of anchors KL(before || now), if given.

    `weight` and `anchor` [N] are those of the tokens' samples, `before` [N, V] the logits of the model before the training.
    """
    logits, smoothing = logits.float(), args.label_smoothing_factor
    if weight is None:
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    if before is not None:
        now, before = logits.log_softmax(-1), before.float().log_softmax(-1)
        divergence = F.kl_div(now, before, reduction="none", log_target=True).sum(-1)
        losses = torch.where(anchor, args.anchor_kl * divergence, losses)
    return (losses * weight).sum()


def total_weight(targets, args, weight=None, anchor=None, before=None) -> float:
    """The sum of the factors in `answer_loss`, by which its result is a mean of nats per token; 1 if all are 0."""
    if weight is None:
        return max(1, len(targets))
    if before is not None:
        weight = torch.where(anchor, args.anchor_kl * weight, weight)
    return weight.sum().item() or 1.0
