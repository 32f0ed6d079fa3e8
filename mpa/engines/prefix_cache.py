"""The hf engine's shortcuts: what prompts begin with is computed once, and of the last layer what is read.

For the families in `models.SHORTCUTS`, each tested to give the plain loop's replies.
"""

import torch
from transformers import DynamicCache


class Prefixes:
    """Key-values that serve more than one prompt: of the system text for all images, of an image for two questions."""

    def __init__(self, model, processor):
        self.model, self.processor, self.head = model, processor, None

    def with_head(self, inputs: dict) -> tuple[dict, DynamicCache | None]:
        """The inputs with their system text in front of the padding, and its key-values, computed once.

        None and the inputs as they are where the rows differ there.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        starts = mask.argmax(1).tolist()
        size = int((ids[0] == self.model.config.image_token_id).int().argmax()) - starts[0]
        heads = torch.stack([row[start : start + size] for row, start in zip(ids, starts, strict=True)])
        if not size or (heads != heads[0]).any():
            return inputs, None
        if self.head is None or not torch.equal(self.head[0], heads[0]):
            self.head = heads[0], self.model(input_ids=heads[:1], use_cache=True).past_key_values
        moved = {name: value.clone() for name, value in inputs.items() if value.shape == ids.shape}
        for name, value in moved.items():
            for row, start in enumerate(starts):
                value[row, :size] = inputs[name][row, start : start + size]
                value[row, size : size + start] = inputs[name][row, :start]
        cache = DynamicCache()
        for index, layer in enumerate(self.head[1].layers):
            cache.update(*(part.expand(len(ids), -1, -1, -1) for part in (layer.keys, layer.values)), index)
        forget_positions(self.model)
        return inputs | moved, cache

    def continued(
        self, inputs: dict, cache, rows: list[int], before: str, texts: list[str]
    ) -> tuple[dict, DynamicCache] | None:
        """Inputs and cache to put other prompts, `texts`, about the images of `rows` of the batch to the model.

        The key-values of each row's system text and image are kept, moved to the right edge of a common
        width; the new prompts follow, each with its padding before it. Positions come from the mask. None
        where the tokens after the first row's image are not those of its text, `before`.
        """
        ids, image_token = inputs["input_ids"], self.model.config.image_token_id
        ends = [int((ids[row] == image_token).nonzero()[-1]) + 1 for row in rows]
        heads = [inputs["attention_mask"][row, :end].nonzero()[:, 0] for row, end in zip(rows, ends, strict=True)]
        # What the processor puts between the image and the template's text, such as "</img>".
        whole, tail = ids[rows[0], ends[0] :].tolist(), self._tail(before)
        closing = whole[: len(whole) - len(tail)]
        if closing + tail != whole:
            return None
        tails = [closing + self._tail(text) for text in texts]
        width = max(map(len, heads))
        total = width + max(map(len, tails))

        new_ids = ids.new_full((len(rows), total), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(new_ids)
        for i, (row, head, tail) in enumerate(zip(rows, heads, tails, strict=True)):
            new_ids[i, width - len(head) : width] = ids[row, head]
            new_ids[i, total - len(tail) :] = ids.new_tensor(tail)
            mask[i, width - len(head) : width] = mask[i, total - len(tail) :] = 1
        kept = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys_values = []
            for source in (layer.keys, layer.values):  # [B, heads, columns, size]
                moved = source.new_zeros(len(rows), source.shape[1], width, source.shape[3])
                for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
                    moved[i, :, width - len(head) :] = source[row, :, head]
                keys_values.append(moved)
            kept.update(*keys_values, index)
        forget_positions(self.model)
        new = {"input_ids": new_ids, "attention_mask": mask}
        if "mm_token_type_ids" in inputs:
            new["mm_token_type_ids"] = (new_ids == image_token).to(inputs["mm_token_type_ids"].dtype)
        if "image_grid_thw" in inputs:
            new["image_grid_thw"] = inputs["image_grid_thw"][rows]
        return new, kept

    def _tail(self, text: str) -> list[int]:
        """The tokens of what a rendered prompt has after its image."""
        tail = text.rsplit(self.processor.image_token, 1)[1]
        return self.processor.tokenizer(tail, add_special_tokens=False).input_ids


def forget_positions(model) -> None:
    """Rotary offsets of the call before, kept by Qwen's models for its rows, are to be computed anew."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None


def spare_last_layer(layer: torch.nn.Module) -> None:
    """Have the last layer work out the last column alone: of what it says of the others, only keys and values are read.

    A prompt ends in the last column of every row, and `generate` takes its logits from there. The other
    columns get zeros from the modules that work on each column by itself.
    """

    def of_last_column(module):
        whole = module.forward

        def forward(hidden):  # [B, T, H] -> [B, T, H']
            return torch.nn.functional.pad(whole(hidden[:, -1:]), (0, 0, hidden.shape[1] - 1, 0))

        module.forward = forward

    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    for module, name in ((attention, "q_proj"), (attention, "o_proj"), (mlp, "down_proj")):
        if hasattr(module, name):
            of_last_column(mlp if module is mlp else getattr(module, name))
