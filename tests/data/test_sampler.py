"""The order of an epoch: every sample once with any number of ranks; a function of seed and epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from esvit_core.config.training_settings import TrainingConfig
from esvit_core.data.loading.sampler import epoch_order, rank_batches, rank_share

sizes = st.lists(st.integers(1, 30), min_size=0, max_size=12)


@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 1000), sizes=sizes, window=st.integers(1, 10))
def test_an_epoch_is_a_permutation_and_a_pure_function(seed, epoch, sizes, window):
    order = epoch_order(seed, epoch, sizes, window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert order.dtype == np.int64
    assert np.array_equal(order, epoch_order(seed, epoch, sizes, window))


@given(seed=st.integers(0, 2**32), sizes=sizes, batch=st.integers(1, 40), world=st.integers(1, 7))
def test_the_ranks_together_get_the_global_batches(seed, sizes, batch, world):
    batch = max(batch, world)
    order = epoch_order(seed, 0, sizes)
    ranks = [rank_batches(order, batch, rank, world) for rank in range(world)]
    steps = sum(sizes) // batch
    assert [len(r) for r in ranks] == [steps] * world
    for step in range(steps):
        together = np.concatenate([r[step] for r in ranks])
        assert np.array_equal(together, order[step * batch : (step + 1) * batch])
        assert max(len(r[step]) for r in ranks) - min(len(r[step]) for r in ranks) <= 1


@given(seed=st.integers(0, 1000), samples=st.integers(24, 200))
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(seed, samples):
    order = epoch_order(seed, 3, [samples])
    by_world = [
        [
            np.concatenate(parts)
            for parts in zip(*(rank_batches(order, 24, r, world) for r in range(world)), strict=True)
        ]
        for world in (1, 2, 3, 7, 8)
    ]
    for other in by_world[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(by_world[0], other, strict=True))


@given(seed=st.integers(0, 1000), window=st.integers(1, 4))
def test_samples_mix_within_windows_of_shards_only(seed, window):
    shards = np.repeat(np.arange(12), 10)
    order = epoch_order(seed, 0, [10] * 12, window)
    for begin in range(0, 120, 10 * window):
        assert len(set(shards[order[begin : begin + 10 * window]])) == min(window, 12 - begin // 10)


def test_seeds_and_epochs_differ():
    orders = [tuple(epoch_order(seed, epoch, [50, 50])) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


def test_every_sample_comes_first_about_equally_often():
    first = np.bincount([epoch_order(0, epoch, [3, 3, 2], window=2)[0] for epoch in range(2000)], minlength=8)
    assert first.min() > 150 and first.max() < 370  # 2000 / 8 = 250, 8 standard deviations; shards differ in size


@pytest.mark.parametrize(("batch", "rank", "world"), [(2, 0, 3), (0, 0, 1), (4, 2, 2), (4, -1, 2)])
def test_a_batch_smaller_than_the_world_is_refused(batch, rank, world):
    with pytest.raises(ValueError, match="cannot be divided"):
        rank_batches(np.arange(20), batch, rank, world)


@given(
    seed=st.integers(0, 1000),
    samples=st.integers(20, 120),
    attempts=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=8),
)
def test_an_interrupted_epoch_sees_every_sample_once_with_any_world_sizes(seed, samples, attempts):
    """Each attempt has its own number of ranks and makes a few steps; the last one finishes the epoch."""
    batch, step, seen = 10, 0, []
    for world, steps in [*attempts, (1, samples)]:
        order = epoch_order(seed, 5, [samples // 2, samples - samples // 2])  # recomputed: the only state is the step
        ranks = [rank_batches(order, batch, rank, world)[step : step + steps] for rank in range(world)]
        seen += [number for own in ranks for share in own for number in share.tolist()]
        step += len(ranks[0])
    assert step == samples // batch
    assert sorted(seen) == sorted(order[: step * batch].tolist())


def test_a_rank_reads_few_shards_at_a_time():
    sizes, window, batch, world = [100] * 60, 8, 64, 3
    shard_of = np.repeat(np.arange(60), 100)
    for rank in range(world):
        steps = rank_batches(epoch_order(0, 0, sizes, window), batch, rank, world)
        shards = [set(shard_of[step].tolist()) for step in steps]
        first = {s: next(i for i, read in enumerate(shards) if s in read) for s in range(60)}
        last = {s: max(i for i, read in enumerate(shards) if s in read) for s in range(60)}
        needed = [sum(first[s] <= i <= last[s] for s in range(60)) for i in range(len(steps))]
        assert max(needed) <= 2 * window and np.median(needed) <= window


@given(batch_size=st.integers(1, 300), world=st.integers(1, 9), most=st.none() | st.integers(2, 40))
def test_the_largest_micro_batch_is_that_of_the_largest_share(batch_size, world, most):
    assume(batch_size >= world)
    training = TrainingConfig(batch_size=batch_size, max_images_per_process=most)
    images, number = training.largest_share(world), training.micro_batches(world)
    shares = [rank_share(batch_size, rank, world) for rank in range(world)]
    sizes = [len(part) for share in shares for part in np.array_split(range(share.start, share.stop), number)]
    assert images == max(share.stop - share.start for share in shares)
    assert training.micro_batch(world) == max(sizes) and (most is None or max(sizes) <= most)
