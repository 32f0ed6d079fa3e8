"""Collates encoded samples into batches."""

import torch
from torch.nn import functional as F

from data import IGNORE, TEXT_FIELDS
from mpa.models.families import attends_both_ways, image_token_id


class Collator:
    """Encoded samples -> a batch; the images of all samples are concatenated.

    By default rows are padded on the right: `input_ids`, `labels` and `attention_mask` are [B, T]. With `packing` all
    samples share one row [1, T], and `position_ids` start again at each sample. `samples` lists the samples' ids.

    `blank` is an encoded sample with an image. It joins each batch without images, an empty batch too, and has no
    labels (its id is None). So every rank runs the vision tower; a distributed step hangs otherwise.
    """

    def __init__(self, processor, packing: bool = False, blank: dict | None = None):
        self.pad, self.image_token, self.packing = processor.tokenizer.pad_token_id, image_token_id(processor), packing
        self.blank = blank and {**blank, "labels": torch.full_like(blank["labels"], IGNORE), "sample": None}
        self.has_token_types = "mm_token_type_ids" in processor.model_input_names
        self.attends_both_ways = attends_both_ways(processor)

    def __call__(self, samples: list[dict]) -> dict:
        if self.blank and not any(name not in TEXT_FIELDS for sample in samples for name in sample):
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
        return batch | self._images(samples, batch["input_ids"], batch["labels"])

    def prompts(self, samples: list[dict]) -> dict:
        """The samples up to their first answer, padded on the left [B, T], to generate from."""
        rows = [sample["input_ids"][: int((sample["labels"] != IGNORE).int().argmax())] for sample in samples]
        width = max(map(len, rows))
        padding = [(width - len(row), 0) for row in rows]
        ids = torch.stack([F.pad(row, pad, value=self.pad) for row, pad in zip(rows, padding, strict=True)])
        mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, padding, strict=True)])
        return {"input_ids": ids, "attention_mask": mask} | self._images(samples, ids, torch.full_like(ids, IGNORE))

    def _images(self, samples: list[dict], ids: torch.Tensor, labels: torch.Tensor) -> dict:
        names = dict.fromkeys(name for sample in samples for name in sample if name not in TEXT_FIELDS)
        batch = {name: _concatenated([sample[name] for sample in samples if name in sample]) for name in names}
        if self.attends_both_ways == "images":
            batch["token_type_ids"] = (ids == self.image_token).int()
        if self.attends_both_ways == "prompts":
            batch["token_type_ids"] = ((labels != IGNORE).cumsum(1) > 0).int()
        return batch | ({"mm_token_type_ids": (ids == self.image_token).int()} if self.has_token_types else {})


def packed_rope_positions(batch: dict, rope_index) -> torch.Tensor:
    """Position ids [4, 1, T] of a packed row for models with multimodal RoPE.

    The first row is the position within the sample, the others are the three that `rope_index`, the model's
    `get_rope_index`, gives for each sample alone.
    """
    within = batch["position_ids"][0]
    sizes = torch.diff((within == 0).nonzero()[:, 0], append=torch.tensor([len(within)], device=within.device))
    rows = {}
    for name in ("input_ids", "mm_token_type_ids"):
        by_sample = batch[name][0].split(sizes.tolist())
        rows[name] = torch.nn.utils.rnn.pad_sequence(by_sample, batch_first=True)
    mask = (torch.arange(rows["input_ids"].shape[1], device=within.device) < sizes[:, None]).long()
    rope, _ = rope_index(**rows, image_grid_thw=batch.get("image_grid_thw"), attention_mask=mask)
    return torch.cat([within[None], rope[:, mask.bool()].to(within)])[:, None]


def _concatenated(values: list[torch.Tensor]) -> torch.Tensor:
    """The tensors concatenated along dimension 0; the other dimensions are zero-padded, as processors do for tiles."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [most - size for most, size in zip(shape, value.shape[1:], strict=True)]
        padded.append(F.pad(value, [side for size in reversed(missing) for side in (0, size)]))
    return torch.cat(padded)
