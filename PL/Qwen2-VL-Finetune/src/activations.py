"""Activation memory: how much a step needs, and which activation checkpointing makes it fit.

Three policies (`--activation_checkpointing`): save all activations; save the results of matrix products and attention
and recompute the rest, which is cheap; or save only each layer's input and recompute the layer.
"""

from collections.abc import Callable
from functools import partial

import process_group
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from mpa.models.device_memory import available_bytes

ALL, PRODUCTS, INPUTS = "False", "products", "True"  # values of the flag
DESCRIPTIONS = {
    ALL: "all activations are saved",
    PRODUCTS: "matrix products and attention are saved, the rest is recomputed",
    INPUTS: "layers are recomputed",
}
EXPENSIVE = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"}
USABLE_SHARE = 0.8  # of the free memory: short-lived tensors are not counted


def _is_expensive(operation) -> bool:
    name = operation.name().split(".")[0]
    return name in EXPENSIVE or "scaled_dot_product" in name or "flash_att" in name


def _save_products(_, operation, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_expensive(operation) else CheckpointPolicy.PREFER_RECOMPUTE


class _SavedStorages(TorchDispatchMode):
    """Records what a forward pass saves, as {storage: bytes}.

    `inside` has what layers save, `products` their matrix products and attention, `outside` the layers' inputs and
    what is saved outside of layers. Layers count only if the backward pass runs through them.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.in_layer, self.inside, self.products, self.outside = False, {}, {}, {}
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.hooks = [layer.register_forward_pre_hook(self._enter_layer) for layer in layers]
        self.hooks += [layer.register_forward_hook(self._leave_layer) for layer in layers]

    def _enter_layer(self, layer, inputs):
        self.in_layer = inputs[0].requires_grad or any(weight.requires_grad for weight in layer.parameters())
        if self.in_layer:
            self._record(self.outside, inputs[0])

    def _leave_layer(self, *_):
        self.in_layer = False

    def pack(self, tensor: torch.Tensor) -> None:
        """Pack hook of saved tensors: records one, and saves nothing."""
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            self._record(self.inside if self.in_layer else self.outside, tensor)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if self.in_layer and _is_expensive(operation):
            self._record(self.products, out[0] if isinstance(out, tuple) else out)
        return out

    @staticmethod
    def _record(sizes: dict, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        sizes[StorageWeakRef(storage)] = storage.nbytes()  # the weak reference keeps its address from being reused

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)


def activation_bytes(forward: Callable[[], object], model: torch.nn.Module) -> dict[str, int]:
    """Bytes that `forward` would save for its backward pass under each policy, without the weights.

    Nothing is saved during the measurement, so it fits in memory even if the step does not.
    """
    with (
        _SavedStorages(model) as saved,
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda _: None),
    ):
        forward()
    return {
        ALL: sum((saved.outside | saved.inside).values()),
        PRODUCTS: sum((saved.outside | saved.products).values()),
        INPUTS: sum(saved.outside.values()),
    }


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may still allocate; on a CPU the ranks of the machine share it. None if it cannot be known."""
    free = available_bytes(str(device))
    if free is None:
        return None
    if device.type == "cuda":
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free // process_group.local_world_size()


def choose_policy(sizes: dict[str, int], other: int, free: int) -> str:
    """The first policy whose bytes, together with `other` bytes, fit into `free`; INPUTS if none does.

    `sizes` are bytes by policy, largest first.
    """
    return next((policy for policy, size in sizes.items() if size + other <= USABLE_SHARE * free), INPUTS)


def fitting_policy(sizes: dict[str, int], other: int, device: torch.device) -> tuple[str, str]:
    """`choose_policy` for the rank with the least memory to spare, and a sentence about it. Collective."""
    figures = torch.tensor([*sizes.values(), -(free_bytes(device) or 0)], device=device)
    if dist.is_initialized():
        dist.all_reduce(figures, dist.ReduceOp.MAX)
    *largest, free = figures.tolist()
    policy = choose_policy(dict(zip(sizes, largest, strict=True)), other, -free)
    rest = max(0, -free - other)
    return policy, (
        f"the largest micro-batch has {largest[0] / 1e9:.3g} GB of activations; after gradients and optimizer state, "
        f"{rest / 1e9:.3g} GB are free: {DESCRIPTIONS[policy]}."
    )


def apply_policy(model, policy: str) -> None:
    """Switch the model's activation checkpointing to a policy, from its next forward pass on."""
    if policy != ALL:
        selective = policy == PRODUCTS
        contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _save_products)} if selective else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **contexts})
        model.disable_input_require_grads()  # needed only if reentrant; frozen layers would be recomputed too
