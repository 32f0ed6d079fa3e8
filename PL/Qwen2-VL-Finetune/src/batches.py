"""From samples to batches: which go together, and how they are put together."""

import random
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.nn import functional as F

from data import IGNORE, OF_TEXT


class Batches(torch.utils.data.Sampler):
    """This rank's share of each optimizer step's samples, as lists of indices: one list is what a device takes at once.

    A step's samples, `size` of them, depend on `seed` and epoch alone, not on how many devices share them. They are
    sorted by length and cut into `pieces` a device, so that the largest piece is as small as can be; which
    changes padding and nothing that is learnt. Where the last step has too few samples, some get an empty list.
    """

    def __init__(self, lengths, size: int, pieces: int, rank: int, world: int, seed: int, shuffle: bool):
        self.lengths, self.size, self.pieces, self.rank, self.world = lengths, size, pieces, rank, world
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.size)
        return whole * self.pieces + self._pieces_of(rest)

    def __iter__(self):
        return self.of(self.epoch)

    def of(self, epoch: int) -> Iterator[list[int]]:
        for step in self.steps(epoch):
            step = sorted(step, key=self.lengths.__getitem__)
            lengths = [self.lengths[i] for i in step]
            ends = cut(lengths, self._pieces_of(len(step)) * self.world)
            pieces = [step[start:end] for start, end in pairwise([0, *ends])]
            yield from pieces[self.rank :: self.world]

    def steps(self, epoch: int) -> list[list[int]]:
        """The samples of each of an epoch's steps, on all devices."""
        order = list(range(len(self.lengths)))
        if self.shuffle:
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    @property
    def steps_an_epoch(self) -> int:
        return -(-len(self.lengths) // self.size)

    def _pieces_of(self, samples: int) -> int:
        """Pieces a device for a step of so many samples."""
        return min(self.pieces, -(-samples // self.world))


def cut(lengths: list[int], count: int) -> list[int]:
    """Where to cut ascending lengths into `count` pieces, so that the largest has the fewest tokens, padding included."""
    low, high = lengths[-1], lengths[-1] * len(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_ends(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    ends = _ends(lengths, low)
    while len(ends) < min(count, len(lengths)):  # no piece is to be empty
        sizes = [end - start for start, end in pairwise([0, *ends])]
        i = sizes.index(max(sizes))
        ends.insert(i, ends[i] - sizes[i] // 2)
    return ends + [len(lengths)] * (count - len(ends))


def _ends(lengths: list[int], tokens: int) -> list[int]:
    """Ends of the pieces where each takes as many samples as `tokens` hold, from the longest sample on."""
    ends, end = [], len(lengths)
    while end > 0:
        ends.append(end)
        end -= max(1, tokens // lengths[end - 1])
    return ends[::-1]


def pieces_within(batches: Batches, tokens: int, epochs: int) -> int:
    """The fewest pieces a device with which no piece of these epochs has more than so many tokens, padding included."""
    most = 1
    for epoch in range(epochs):
        for step in batches.steps(epoch):
            lengths = sorted(batches.lengths[i] for i in step)
            most = max(most, -(-len(_ends(lengths, max(tokens, lengths[-1]))) // batches.world))
    return most


class Collator:
    """Encoded samples -> a batch, pictures one after the other.

    Token rows are padded on the right [B, T] with an `attention_mask`; with `packing` they stand one behind
    the other in one row [1, T], with `position_ids` that start again at each sample. `blank` is an encoded
    sample with a picture; without labels it joins a batch that has none, and is a batch that has no sample:
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
        return batch | self._pictures(samples, batch["input_ids"])

    def prompts(self, samples: list[dict]) -> dict:
        """What stands before the first answer, padded on the left: to generate from."""
        rows = [sample["input_ids"][: int((sample["labels"] != IGNORE).int().argmax())] for sample in samples]
        width = max(map(len, rows))
        before = [(width - len(row), 0) for row in rows]
        ids = torch.stack([F.pad(row, pad, value=self.pad) for row, pad in zip(rows, before, strict=True)])
        mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, before, strict=True)])
        return {"input_ids": ids, "attention_mask": mask} | self._pictures(samples, ids)

    def _pictures(self, samples: list[dict], ids: torch.Tensor) -> dict:
        names = dict.fromkeys(name for sample in samples for name in sample if name not in OF_TEXT)
        batch = {name: _joined([sample[name] for sample in samples if name in sample]) for name in names}
        return batch | ({"mm_token_type_ids": (ids == self.image_token).int()} if self.typed else {})


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """The tensors along their first dimension; the others padded with zeros, as processors do for tiles of pictures."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [most - size for most, size in zip(shape, value.shape[1:], strict=True)]
        padded.append(F.pad(value, [side for size in reversed(missing) for side in (0, size)]))
    return torch.cat(padded)
