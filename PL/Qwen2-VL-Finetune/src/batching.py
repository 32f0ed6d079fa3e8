"""Which samples go together: the batches of each optimizer step."""

import random
from collections.abc import Iterator
from itertools import pairwise

import torch


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
