"""`--static-cache`: decode steps on key-values of a fixed size, on a CUDA GPU as a CUDA graph, which is one launch for each step."""

import sys

import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from mpa.models.device_memory import is_out_of_memory

COLUMNS = 128  # the size is a multiple of it, so that batches of similar length share a graph


def steps(engine) -> "StaticSteps | None":
    """The steps for the engine's model; None where it has none. Says why, or why there will be no graph."""
    obstacle = _obstacle(engine)
    made = None if obstacle else StaticSteps(engine.model)
    if obstacle:
        print(f"--static-cache is left out: {obstacle}", file=sys.stderr)
    elif made.graph_error:
        print(f"--static-cache: no CUDA graph: {made.graph_error}", file=sys.stderr)
    return made


def _obstacle(engine) -> str:
    """Why the engine's model cannot decode on a static cache; "" if it can."""
    kind = engine.model.config.model_type
    if not engine.family or not engine.family.shortcuts:
        return f"not every layer of {kind} is known to keep plain key-values"
    if not engine.prefix_cache:
        return "the model is not on one device"
    if hasattr(engine.model, "hf_quantizer"):
        return "it is not tested with quantised weights"
    if not engine.model.get_decoder()._can_compile_fullgraph:
        return f"transformers has none for {kind}"
    return ""


class StaticSteps:
    """Decode steps of one model, for one batch after the other: `make_room`, `take_over` the prompt's key-values, call for each token.

    A graph fits all batches of the same shape. For another shape the first step is computed as usual, and the second one
    captures a new graph. `graph_error` is why there are none.
    """

    def __init__(self, model):
        self.model, device = model, model.device.type
        self.graph_error = "" if device == "cuda" else f"the device is {device}"
        self.shape = self.cache = self.mask = self.inputs = self.logits = self.graph = None
        self.length = 0  # columns in use
        self.tried = False  # whether a step of this shape was computed

    def make_room(self, rows: int, columns: int) -> None:
        """Called before a batch's prompt is computed. Frees what was for another shape."""
        shape = rows, columns + -columns % COLUMNS
        if shape != self.shape:
            self.shape, self.inputs, self.logits, self.graph, self.tried = shape, None, None, None, False
            self.cache = StaticCache(self.model.config, max_cache_len=shape[1])
            self.mask = torch.zeros(rows, 1, 1, shape[1], dtype=torch.bool, device=self.model.device)

    def take_over(self, prompt: DynamicCache, mask) -> None:
        """Start behind these key-values. `mask` [B, T] is 0 at padding; None: there is no padding."""
        self.length = prompt.get_seq_length()
        self.cache.reset()
        for index, layer in enumerate(prompt.layers):
            self.cache.update(layer.keys, layer.values, index)
        self.mask.zero_()
        self.mask[:, 0, 0, : self.length] = True if mask is None else mask

    def __call__(self, input_ids, position_ids, **_) -> CausalLMOutputWithPast:  # [B, 1], [..., B, 1]
        """The logits [B, 1, V] of one column, in a buffer that the next call writes to."""
        self.mask[..., self.length].fill_(True)
        self.length += 1
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        if self.tried and not (self.graph or self.graph_error):
            self._capture(inputs)
        self.tried = True
        if not self.graph:
            return CausalLMOutputWithPast(logits=self._logits(**inputs))
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        with torch.cuda.device(self.model.device):
            self.graph.replay()
        return CausalLMOutputWithPast(logits=self.logits)

    def _logits(self, **inputs):
        return self.model(**inputs, attention_mask=self.mask, past_key_values=self.cache, use_cache=True).logits

    def _capture(self, inputs: dict) -> None:
        """Record the kernels of a step. Nothing is computed by this."""
        self.inputs, graph = {name: value.clone() for name, value in inputs.items()}, torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self.model.device),
                torch.cuda.stream(torch.cuda.current_stream()),  # current again also after a capture that failed
                torch.cuda.graph(graph),
            ):
                self.logits = self._logits(**self.inputs)
            self.graph = graph
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.graph_error = str(error).strip().split("\n", 1)[0]
            print(f"--static-cache: no CUDA graph: {self.graph_error}", file=sys.stderr)
