"""What a loss on answers alone needs of a model's end: worked out at those positions, and nowhere else."""

import torch


class AnswerLogits:
    """Has a model's last layer and output layer work on chosen positions, from whose logits the loss is made.

    Of what the last decoder layer says of the other positions only keys and values are read: its queries,
    output projection and feed-forward network leave them out (zeros in their place), and the output layer
    gives logits [N, V] of the N chosen ones. Loss and gradients are those of the whole model. The choice
    must stand until the backward pass has ended, since activation checkpointing runs layers again.
    """

    def __init__(self, model: torch.nn.Module):
        self.at, self.size = None, None
        model.get_output_embeddings().register_forward_pre_hook(self._choose)
        layer = model.get_decoder().layers[-1]
        parts = ((layer.self_attn, "q_proj"), (layer.self_attn, "o_proj"), (layer, "mlp"))
        for module in (getattr(*part) for part in parts if hasattr(*part)):  # a decoder may have one for q, k and v
            module.register_forward_pre_hook(self._choose)
            module.register_forward_hook(self._spread)

    def choose(self, mask: torch.Tensor | None) -> None:
        """The positions [B, T] from now on; None: all."""
        self.at, self.size = (None, None) if mask is None else (mask.flatten().nonzero()[:, 0], mask.shape)

    def _choose(self, _, inputs):
        """Hidden states [B, T, H] -> [1, N, H]."""
        return None if self.at is None else (inputs[0].flatten(0, 1)[self.at][None], *inputs[1:])

    def _spread(self, _, __, out):
        """[1, N, H] -> [B, T, H]; of a mixture of experts with what else it says."""
        if self.at is None:
            return None
        hidden, *more = out if isinstance(out, tuple) else (out,)
        zeros = hidden.new_zeros(self.size.numel(), hidden.shape[-1])
        whole = zeros.index_copy(0, self.at, hidden[0]).view(*self.size, -1)
        return (whole, *more) if more else whole
