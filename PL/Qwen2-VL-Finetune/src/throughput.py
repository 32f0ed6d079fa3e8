"""Floating-point operations of a training step, and the peak rate of this device."""

import time

import torch


def peak_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measured operations per second of a large matrix product: the best of five runs after a warm-up."""
    size = 8192 if device.type == "cuda" else 1024
    matrix, best = torch.ones(size, size, device=device, dtype=dtype), 0.0  # not random: keeps the RNG state
    for _ in range(6):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


class FlopCounter:
    """Counts a step's operations in matrix products with weights, while its forward pass runs.

    Per weight and position: two for the forward pass, two for the gradient of the input, and two for the gradient of
    the weight if that is trained. Attention scores do not count, nor does recomputation by activation checkpointing.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.total, self.seen = model, 0, set()

    def __enter__(self):
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
        modules = (module for module in self.model.modules() if isinstance(module, kinds))
        self.hooks = [module.register_forward_hook(self._count) for module in modules]
        return self

    def _count(self, module, inputs, out) -> None:
        if module not in self.seen:  # a module runs again where activations are recomputed
            self.seen.add(module)
            # A linear layer's input, since its output may be scattered to more positions than were computed.
            is_linear = isinstance(module, torch.nn.Linear)
            values, channels = (inputs[0], -1) if is_linear else (out, 1)
            positions = values.numel() // values.shape[channels]
            # Not the numel of a linear weight: in 4 bits, a byte holds two.
            weights = module.in_features * module.out_features if is_linear else module.weight.numel()
            self.total += 2 * weights * positions * (2 + module.weight.requires_grad)

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
