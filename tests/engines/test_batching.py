"""How samples come together in steps and micro-batches."""

import random
from itertools import combinations_with_replacement, pairwise, product

import pytest
from batching import StepBatchSampler, balanced_ends, micro_batches_within


@pytest.mark.parametrize(
    ("n", "size", "micro_batches"), [(50, 8, 2), (33, 8, 1), (9, 8, 2), (17, 8, 2), (3, 1, 1), (50, 8, 3)]
)
def test_a_steps_samples_do_not_depend_on_the_number_of_ranks(n, size, micro_batches):
    lengths = [random.Random(i).randrange(20, 90) for i in range(n)]

    def steps(world: int, micro_batches: int) -> list[set]:
        ranks = []
        for rank in range(world):
            batches = StepBatchSampler(lengths, size, micro_batches, rank, world, 3, True)
            batches.set_epoch(2)
            ranks.append(list(batches))
            assert len(ranks[-1]) == len(batches)
            assert world > 1 or all(ranks[-1])  # one device alone gets no empty batch
        assert len(set(map(len, ranks))) == 1  # or one would wait for ever
        rows = [[i for rank in ranks for i in rank[k]] for k in range(len(ranks[0]))]
        return [{i for row in rows[k : k + micro_batches] for i in row} for k in range(0, len(rows), micro_batches)]

    alone = steps(1, micro_batches)
    assert sorted(i for step in alone for i in step) == list(range(n))
    assert steps(2, micro_batches) == steps(3, micro_batches) == steps(1, min(size, micro_batches + 1)) == alone


def test_a_step_is_split_so_that_its_largest_micro_batch_is_smallest():
    rng = random.Random(5)
    for _ in range(50):
        lengths = sorted(rng.randrange(1, 60) for _ in range(rng.randrange(1, 8)))
        for count in (1, 2, 3):
            ends = balanced_ends(lengths, count)
            assert len(ends) == count and ends[-1] == len(lengths) and ends == sorted(ends)
            every = combinations_with_replacement(range(len(lengths) + 1), count - 1)
            assert largest(lengths, ends) == min(largest(lengths, [*splits, len(lengths)]) for splits in every)


def largest(lengths: list[int], ends: list[int]) -> int:
    """Tokens of the largest micro-batch, padding included."""
    return max((lengths[end - 1] * (end - start) for start, end in pairwise([0, *ends]) if end > start), default=0)


@pytest.mark.parametrize("world", [1, 2])
def test_no_batch_has_more_tokens_than_the_budget_and_one_batch_less_would(world):
    lengths = [random.Random(i).choice((40, 60, 500)) for i in range(100)]
    samplers = [StepBatchSampler(lengths, 16, 1, rank, world, 3, True) for rank in range(world)]
    fewest = micro_batches_within(samplers[0], 1000, epochs=2)

    def most(micro_batches: int) -> int:
        found = []
        for sampler, epoch in product(samplers, range(2)):
            sampler.micro_batches = micro_batches
            sampler.set_epoch(epoch)
            found += [max(lengths[i] for i in batch) * len(batch) for batch in sampler if batch]
        return max(found)

    assert most(fewest) <= 1000 < most(fewest - 1)
