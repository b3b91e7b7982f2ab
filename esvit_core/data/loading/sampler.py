"""In which order a training run sees its samples: pure functions of the seed, so that nothing has to be saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ORDER_STREAM = 0  # keeps these random numbers apart from those of the augmentation, which has the same seed


def epoch_order(seed: int, epoch: int, shard_sizes: Sequence[int], window: int = 8) -> np.ndarray:
    """The order of an epoch: shards shuffled, then samples shuffled within windows of shards.

    Only the shards of one window are needed at a time, so reading stays sequential on data that is larger than a
    disk cache. Samples lie in the shards in an order without meaning already (see :mod:`esvit_core.data.ingest.prepare`).

    Args:
        seed: of the run.
        epoch: from 0.
        shard_sizes: samples in each shard.
        window: shards whose samples are mixed.

    Returns:
        Every sample's number exactly once, (sum of the sizes,) int64.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    rng = np.random.default_rng((seed, _ORDER_STREAM, epoch))
    starts = np.concatenate([[0], np.cumsum(np.asarray(shard_sizes, dtype=np.int64))])
    shards = rng.permutation(len(shard_sizes))
    parts = []
    for begin in range(0, len(shards), window):
        numbers = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[begin : begin + window]])
        parts.append(rng.permutation(numbers))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def rank_share(batch_size: int, rank: int, world: int) -> slice:
    """The places in the global batch that a rank takes; the shares differ by one at most.

    Args:
        batch_size: of all ranks together, at least one for each.
        rank: from 0.
        world: number of ranks.
    """
    if not 0 <= rank < world <= batch_size:
        raise ValueError(f"batch of {batch_size} cannot be shared by rank {rank} of {world}")
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


def rank_batches(order: np.ndarray, batch_size: int, rank: int, world: int) -> list[np.ndarray]:
    """The samples of one rank, step by step.

    The global batch of a step is the same whatever the number of ranks; each takes its contiguous part. Samples that
    do not fill a last batch are left out of the epoch.

    Args:
        order: of the epoch, from :func:`epoch_order`.
        batch_size, rank, world: see :func:`rank_share`.

    Returns:
        One array (share of the rank,) a step.
    """
    share = rank_share(batch_size, rank, world)
    steps = len(order) // batch_size
    return list(order[: steps * batch_size].reshape(steps, batch_size)[:, share])
