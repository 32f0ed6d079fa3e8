"""Encoded samples to a batch."""

import torch
from torch.nn import functional as F

from data import IGNORE, OF_TEXT


class Collator:
    """Encoded samples -> a batch, images one after the other.

    Token rows are padded on the right [B, T] with an `attention_mask`; with `packing` they stand one behind
    the other in one row [1, T], with `position_ids` that start again at each sample. `blank` is an encoded
    sample with an image; without labels it joins a batch that has none, and is a batch that has no sample:
    so that all ranks run the same modules.
    """

    def __init__(self, processor, packing: bool = False, blank: dict | None = None):
        self.pad, self.image_token, self.packing = processor.tokenizer.pad_token_id, processor.image_token_id, packing
        self.blank = blank and {**blank, "labels": torch.full_like(blank["labels"], IGNORE), "sample": None}
        self.typed = "mm_token_type_ids" in processor.model_input_names

    def __call__(self, samples: list[dict]) -> dict:
        if self.blank and not any(len(sample) > len(OF_TEXT) for sample in samples):
            samples = [*samples, self.blank]
        rows, labels = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
        if self.packing:
            batch = {"input_ids": torch.cat(rows)[None], "labels": torch.cat(labels)[None]}
            batch["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
        else:
            pad = torch.nn.utils.rnn.pad_sequence
            batch = {"input_ids": pad(rows, batch_first=True, padding_value=self.pad)}
            batch["labels"] = pad(labels, batch_first=True, padding_value=IGNORE)
            lengths = torch.tensor([len(row) for row in rows])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        batch["samples"] = [sample["sample"] for sample in samples]
        return batch | self._images(samples, batch["input_ids"])

    def prompts(self, samples: list[dict]) -> dict:
        """What stands before the first answer, padded on the left: to generate from."""
        rows = [sample["input_ids"][: int((sample["labels"] != IGNORE).int().argmax())] for sample in samples]
        width = max(map(len, rows))
        before = [(width - len(row), 0) for row in rows]
        ids = torch.stack([F.pad(row, pad, value=self.pad) for row, pad in zip(rows, before, strict=True)])
        mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, before, strict=True)])
        return {"input_ids": ids, "attention_mask": mask} | self._images(samples, ids)

    def _images(self, samples: list[dict], ids: torch.Tensor) -> dict:
        names = dict.fromkeys(name for sample in samples for name in sample if name not in OF_TEXT)
        batch = {name: _joined([sample[name] for sample in samples if name in sample]) for name in names}
        return batch | ({"mm_token_type_ids": (ids == self.image_token).int()} if self.typed else {})


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """The tensors along their first dimension; the others padded with zeros, as processors do for tiles of images."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [most - size for most, size in zip(shape, value.shape[1:], strict=True)]
        padded.append(F.pad(value, [side for size in reversed(missing) for side in (0, size)]))
    return torch.cat(padded)
