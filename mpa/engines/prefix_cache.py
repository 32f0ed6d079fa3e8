"""The hf engine's shortcuts: common prompt prefixes are computed once, and the last layer only where it is read.

For the families in `families.FAMILIES` that have them; each is tested to give a plain loop's replies.
"""

import torch
from transformers import DynamicCache


class PrefixCache:
    """Reuses key-values: those of the system text for all images, those of an image for its follow-up.

    It takes and returns inputs on the host, where they can be looked into without a wait for the device.
    """

    def __init__(self, model, processor):
        self.model, self.processor, self.system_text = model, processor, None

    def reuse_system_text(self, inputs: dict) -> tuple[dict, DynamicCache | None]:
        """The inputs with their system text moved in front of the padding, and the system text's key-values.

        The inputs as they are, and None, where the rows' system texts differ.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        starts = mask.argmax(1).tolist()
        size = int((ids[0] == self.model.config.image_token_id).int().argmax()) - starts[0]
        heads = torch.stack([row[start : start + size] for row, start in zip(ids, starts, strict=True)])
        if not size or (heads != heads[0]).any():
            return inputs, None
        if self.system_text is None or not torch.equal(self.system_text[0], heads[0]):
            system_text = heads[:1].to(self.model.device)
            self.system_text = heads[0], self.model(input_ids=system_text, use_cache=True).past_key_values
        moved = {name: value.clone() for name, value in inputs.items() if value.shape == ids.shape}
        for name, value in moved.items():
            for row, start in enumerate(starts):
                value[row, :size] = inputs[name][row, start : start + size]
                value[row, size : size + start] = inputs[name][row, :start]
        cache = DynamicCache()
        for index, layer in enumerate(self.system_text[1].layers):
            cache.update(*(part.expand(len(ids), -1, -1, -1) for part in (layer.keys, layer.values)), index)
        reset_rope_deltas(self.model)
        return inputs | moved, cache

    def reuse_images(
        self, inputs: dict, cache, rows: list[int], before: str, texts: list[str]
    ) -> tuple[dict, DynamicCache] | None:
        """Inputs and cache for new prompts, `texts`, about the images of these `rows` of the batch.

        The key-values of each row's system text and image are kept, aligned at the right edge of a common width. The
        new prompts follow, each with its padding in front. Positions come from the mask. `cache` is used up layer by layer,
        so that nothing is in memory twice. None where the tokens after the first row's image are not those of its text,
        `before`: then the processor does something unknown here.
        """
        ids, image_token = inputs["input_ids"], self.model.config.image_token_id
        ends = [int((ids[row] == image_token).nonzero()[-1]) + 1 for row in rows]
        heads = [inputs["attention_mask"][row, :end].nonzero()[:, 0] for row, end in zip(rows, ends, strict=True)]
        # Tokens that the processor puts between the image and the template's text, such as "</img>".
        whole, tail = ids[rows[0], ends[0] :].tolist(), self._tail(before)
        closing = whole[: len(whole) - len(tail)]
        if closing + tail != whole:
            return None
        tails = [closing + self._tail(text) for text in texts]
        width = max(map(len, heads))
        total = width + max(map(len, tails))

        new_ids = ids.new_full((len(rows), total), self.processor.tokenizer.pad_token_id)
        mask = torch.zeros_like(new_ids)
        columns = torch.zeros(len(rows), width, dtype=torch.long)  # of the cache; any one for padding
        for i, (row, head, tail) in enumerate(zip(rows, heads, tails, strict=True)):
            new_ids[i, width - len(head) : width] = ids[row, head]
            new_ids[i, total - len(tail) :] = ids.new_tensor(tail)
            mask[i, width - len(head) : width] = mask[i, total - len(tail) :] = 1
            columns[i, width - len(head) :] = head
        kept, device = DynamicCache(), self.model.device
        row_index, columns = torch.tensor(rows, device=device)[:, None], columns.to(device)
        for index, layer in enumerate(cache.layers):
            parts = (layer.keys, layer.values)  # [B, heads, columns, size]
            moved = [part[row_index, :, columns].transpose(1, 2) for part in parts]
            layer.keys = layer.values = parts = None
            kept.update(*moved, index)
        reset_rope_deltas(self.model)
        new = {"input_ids": new_ids, "attention_mask": mask}
        if "mm_token_type_ids" in inputs:
            new["mm_token_type_ids"] = (new_ids == image_token).to(inputs["mm_token_type_ids"].dtype)
        if "image_grid_thw" in inputs:
            new["image_grid_thw"] = inputs["image_grid_thw"][rows]
        return new, kept

    def _tail(self, text: str) -> list[int]:
        """The tokens after the image in a prompt in the chat template."""
        tail = text.rsplit(self.processor.image_token, 1)[1]
        return self.processor.tokenizer(tail, add_special_tokens=False).input_ids


def reset_rope_deltas(model) -> None:
    """Qwen's models keep the rotary offsets of the previous call's rows; have them computed again."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None


class LastColumn:
    """Has the last layer compute its output for the last column alone; keys and values are computed for all.

    Every row's prompt ends in it, and `generate` takes its logits there. The modules that work on each column separately give
    zeros for the others.
    """

    def __init__(self, layer: torch.nn.Module):
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        for module, name in ((attention, "q_proj"), (attention, "o_proj"), (mlp, "down_proj")):
            if hasattr(module, name):
                self._patch(mlp if module is mlp else getattr(module, name))

    def _patch(self, module: torch.nn.Module) -> None:
        original = module.forward

        def forward(hidden):  # [B, T, H] -> [B, T, H']
            return torch.nn.functional.pad(original(hidden[:, -1:]), (0, 0, hidden.shape[1] - 1, 0))

        module.forward = forward
