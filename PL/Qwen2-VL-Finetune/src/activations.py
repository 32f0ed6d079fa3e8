"""What a step keeps for its backward pass: measured, and less of it where that does not fit.

Three ways (`--activation_checkpointing`): all is kept; the results of matrix products and attention are kept and the
rest, which is quick to make, is worked out again; only what enters a layer is kept and layers are worked out again.
"""

from collections.abc import Callable
from functools import partial

import process_group
import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

ALL, PRODUCTS, INPUTS = "False", "products", "True"  # values of the flag
SAYS = {
    ALL: "all of it is kept",
    PRODUCTS: "matrix products and attention are kept, the rest is worked out again",
    INPUTS: "layers are worked out again",
}
EXPENSIVE = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"}
SHARE = 0.8  # of the free memory may be used: what is counted leaves out what lives for a moment


def _expensive(operation) -> bool:
    name = operation.name().split(".")[0]
    return name in EXPENSIVE or "scaled_dot_product" in name or "flash_att" in name


def _policy(_, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _expensive(operation) else CheckpointPolicy.PREFER_RECOMPUTE


class _Kept(TorchDispatchMode):
    """Sorts what a forward pass keeps, by storage: of whole layers, of their products, what enters them, what is outside."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inside, self.layers, self.products, self.around = False, {}, {}, {}
        found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.hooks = [layer.register_forward_pre_hook(self._enter) for layer in found]
        self.hooks += [layer.register_forward_hook(self._leave) for layer in found]

    def _enter(self, layer, inputs):
        self.inside = inputs[0].requires_grad or any(weight.requires_grad for weight in layer.parameters())
        if self.inside:
            self._note(self.around, inputs[0])

    def _leave(self, *_):
        self.inside = False

    def keep(self, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            self._note(self.layers if self.inside else self.around, tensor)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if self.inside and _expensive(operation):
            self._note(self.products, out[0] if isinstance(out, tuple) else out)
        return out

    @staticmethod
    def _note(where: dict, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        where[StorageWeakRef(storage)] = storage.nbytes()  # whose address is not used again while this is held

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)


def kept_bytes(forward: Callable[[], object], model: torch.nn.Module) -> dict[str, int]:
    """What `forward` would keep for a backward pass, in bytes, by the ways to keep it; weights do not count.

    Nothing is kept meanwhile, so that this fits where the step may not.
    """
    with _Kept(model) as kept, torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda _: None):
        forward()
    around = sum(kept.around.values())
    return {
        ALL: sum((kept.around | kept.layers).values()),
        PRODUCTS: sum((kept.around | kept.products).values()),
        INPUTS: around,
    }


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // process_group.local_world_size()


def choose(kept: dict[str, int], other: int, free: int) -> str:
    """Of these ways the one that keeps the most of what fits into `free` bytes beside `other` ones, or the last resort."""
    return next((way for way, size in kept.items() if size + other <= SHARE * free), INPUTS)


def fitting(kept: dict[str, int], other: int, device: torch.device) -> tuple[str, str]:
    """The way to choose where the fullest rank has these numbers of bytes to find room for, and a sentence about it."""
    figures = torch.tensor([*kept.values(), -free_bytes(device)], device=device)
    if dist.is_initialized():
        dist.all_reduce(figures, dist.ReduceOp.MAX)
    *sizes, free = figures.tolist()
    way = choose(dict(zip(kept, sizes, strict=True)), other, -free)
    rest = max(0, -free - other)
    return way, (
        f"the largest batch has {sizes[0] / 1e9:.3g} GB for its backward pass; beside gradients and optimizer, "
        f"{rest / 1e9:.3g} GB are free: {SAYS[way]}."
    )


def use(model, way: str) -> None:
    """Have the model keep as `way` says, from its next forward pass on."""
    if way != ALL:
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if way == PRODUCTS else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **contexts})
        model.disable_input_require_grads()  # only the other kind needs it; frozen layers would be worked out again
