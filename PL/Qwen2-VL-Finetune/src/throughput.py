"""Floating-point operations of a step, and of this device."""

import time

import torch


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here: the best of five."""
    size = 8192 if device.type == "cuda" else 2048
    matrix, best = torch.ones(size, size, device=device, dtype=dtype), 0.0  # no random numbers: they are training's
    for _ in range(6):
        started = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


class Operations:
    """Floating-point operations of a step's matrix products with weights, counted as its forward pass runs.

    Two for each weight and position, as many again for the gradient of the input, and of the weight where it is
    trained. Attention itself is left out, and what activation checkpointing does twice counts once.
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.total, self.seen = model, 0, set()

    def __enter__(self):
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
        modules = (module for module in self.model.modules() if isinstance(module, kinds))
        self.hooks = [module.register_forward_hook(self._count) for module in modules]
        return self

    def _count(self, module, inputs, out) -> None:
        if module not in self.seen:
            self.seen.add(module)
            # Of a linear layer the input, since what is done at few positions may be spread over all afterwards.
            values, channels = (inputs[0], -1) if isinstance(module, torch.nn.Linear) else (out, 1)
            positions = values.numel() // values.shape[channels]
            self.total += 2 * module.weight.numel() * positions * (2 + module.weight.requires_grad)

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()
