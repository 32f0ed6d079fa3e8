"""Which samples each optimizer step trains on, and how they are split into micro-batches."""

import math
import random
from collections.abc import Iterator
from itertools import pairwise

import torch


class StepBatchSampler(torch.utils.data.Sampler):
    """This rank's micro-batches, each a list of sample indices.

    A step's `step_size` samples depend on `seed` and epoch only, not on the world size. They are sorted by length and
    split into `micro_batches` per rank so that the largest micro-batch has the fewest tokens. This changes only the
    padding, not the gradients. If the last step has too few samples, some ranks get an empty list.
    """

    def __init__(
        self, lengths: list[int], step_size: int, micro_batches: int, rank: int, world: int, seed: int, shuffle: bool
    ):
        self.lengths, self.step_size, self.micro_batches = lengths, step_size, micro_batches
        self.rank, self.world, self.seed, self.shuffle, self.epoch = rank, world, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full_steps, rest = divmod(len(self.lengths), self.step_size)
        return full_steps * self.micro_batches + self._micro_batches_of(rest)

    def __iter__(self):
        return self.epoch_batches(self.epoch)

    def epoch_batches(self, epoch: int) -> Iterator[list[int]]:
        """This rank's micro-batches of an epoch."""
        for step in self.epoch_steps(epoch):
            step = sorted(step, key=self.lengths.__getitem__)
            ends = balanced_ends([self.lengths[i] for i in step], self._micro_batches_of(len(step)) * self.world)
            batches = [step[start:end] for start, end in pairwise([0, *ends])]
            yield from batches[self.rank :: self.world]

    def epoch_steps(self, epoch: int) -> list[list[int]]:
        """The samples of each step of an epoch, over all ranks."""
        order = list(range(len(self.lengths)))
        if self.shuffle:
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return [order[start : start + self.step_size] for start in range(0, len(order), self.step_size)]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.step_size)

    def _micro_batches_of(self, samples: int) -> int:
        """Micro-batches per rank for a step of this many samples."""
        return min(self.micro_batches, -(-samples // self.world))


def step_sampler(lengths: list[int], args, batch_tokens: int = 0) -> tuple[StepBatchSampler, int]:
    """(the sampler of a training with these arguments, its number of epochs). See `micro_batches_within` for `batch_tokens`."""
    sampler = StepBatchSampler(
        lengths,
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        args.gradient_accumulation_steps,
        args.process_index,
        args.world_size,
        args.seed if args.data_seed is None else args.data_seed,
        shuffle=args.train_sampling_strategy != "sequential",
    )
    epochs = math.ceil(args.max_steps / sampler.steps_per_epoch if args.max_steps > 0 else args.num_train_epochs)
    if batch_tokens:
        sampler.micro_batches = micro_batches_within(sampler, batch_tokens, epochs)
    return sampler, epochs


def balanced_ends(lengths: list[int], count: int) -> list[int]:
    """End indices that split ascending lengths into `count` batches, so that the largest has the fewest tokens.

    Tokens include padding: a batch costs its longest length times its size. Uses a binary search over this cost.
    """
    low, high = lengths[-1], lengths[-1] * len(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(_greedy_ends(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    ends = _greedy_ends(lengths, low)
    while len(ends) < min(count, len(lengths)):  # halve the largest batch until none is empty
        sizes = [end - start for start, end in pairwise([0, *ends])]
        i = sizes.index(max(sizes))
        ends.insert(i, ends[i] - sizes[i] // 2)
    return ends + [len(lengths)] * (count - len(ends))


def _greedy_ends(lengths: list[int], tokens: int) -> list[int]:
    """End indices of batches of at most `tokens` tokens, padding included, filled from the longest sample on."""
    ends, end = [], len(lengths)
    while end > 0:
        ends.append(end)
        end -= max(1, tokens // lengths[end - 1])
    return ends[::-1]


def micro_batches_within(sampler: StepBatchSampler, tokens: int, epochs: int) -> int:
    """The fewest micro-batches per rank with at most `tokens` tokens each, padding included, over all `epochs`."""
    needed = 1
    for epoch in range(epochs):
        for step in sampler.epoch_steps(epoch):
            lengths = sorted(sampler.lengths[i] for i in step)
            needed = max(needed, -(-len(_greedy_ends(lengths, max(tokens, lengths[-1]))) // sampler.world))
    return needed
