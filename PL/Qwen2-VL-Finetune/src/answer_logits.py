"""Restricts a model's last layer and output layer to the positions that the loss needs."""

import torch

from mpa.models.families import FAMILIES


class AnswerLogits:
    """Computes logits only at selected positions; loss and gradients are those of the full model.

    From the other positions the last decoder layer needs only keys and values. Its queries, output projection and
    feed-forward network therefore skip them (their outputs are zeros), and the output layer returns [1, N, V] for the
    N selected positions. Keep the selection until the backward pass has ended: activation checkpointing runs layers
    again.

    For a model type outside the table of families all logits are computed, and `of` selects.
    """

    def __init__(self, model: torch.nn.Module):
        self.positions, self.shape = None, None
        self.tested = model.config.model_type in FAMILIES
        if self.tested:
            self._register(model)

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """[N, V] at the selected positions, of the model's logits."""
        return logits[0] if self.tested else logits.flatten(0, 1)[self.positions]

    def _register(self, model: torch.nn.Module) -> None:
        model.get_output_embeddings().register_forward_pre_hook(self._gather)
        layer = model.get_decoder().layers[-1]
        attention = getattr(layer, "self_attn", None)  # none in a convolution layer of LFM2
        modules = [(attention, name) for name in ("q_proj", "o_proj", "out_proj")]
        modules += [(layer, name) for name in ("mlp", "feed_forward")]
        for module in (getattr(*path) for path in modules if hasattr(*path)):  # some decoders fuse q, k and v
            module.register_forward_pre_hook(self._gather)
            module.register_forward_hook(self._scatter)

    def select(self, mask: torch.Tensor | None, device: torch.device | None = None) -> None:
        """Select the positions where `mask` [B, T] is True, for the following passes on the device; None selects all."""
        self.positions, self.shape = None, None
        if mask is not None:
            positions = mask.flatten().nonzero()[:, 0]
            self.positions, self.shape = positions.to(device or mask.device, non_blocking=True), mask.shape

    def _gather(self, _, inputs):
        """Hidden states [B, T, H] -> [1, N, H]."""
        return None if self.positions is None else (inputs[0].flatten(0, 1)[self.positions][None], *inputs[1:])

    def _scatter(self, _, __, out):
        """[1, N, H] -> [B, T, H]; a mixture of experts returns more values, which stay as they are."""
        if self.positions is None:
            return None
        hidden, *others = out if isinstance(out, tuple) else (out,)
        zeros = hidden.new_zeros(self.shape.numel(), hidden.shape[-1])
        scattered = zeros.index_copy(0, self.positions, hidden[0]).view(*self.shape, -1)
        return (scattered, *others) if others else scattered
