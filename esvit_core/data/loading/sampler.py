"""Order of the training samples: pure functions of the seed, so no state has to be saved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_GOLDEN = 0.6180339887498949  # its multiples are spread evenly over [0, 1)
_ORDER_STREAM = 0  # separates these random numbers from those of the augmentation, which uses the same seed


def epoch_order(
    seed: int, epoch: int, shard_sizes: Sequence[int], window: int = 8, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the order of an epoch: shards are shuffled, then samples within windows of shards.

    Only the shards of one window are needed at a time, so reading stays sequential for data larger than the disk cache.
    Samples are already stored in pseudo-random order (see :mod:`esvit_core.data.ingest.prepare`).

    Args:
        seed: seed of the run.
        epoch: from 0.
        shard_sizes: number of samples in each shard.
        window: number of shards whose samples are mixed.
        weights: how often each sample occurs in an epoch, on average over the epochs, (N,); None: once.

    Returns:
        Every sample's number exactly once, (sum of the sizes,) int64. With weights, the k-th further occurrence of sample i
        is the number ``i + k * N``, so that its crops differ, and the length is the sum of the weights, rounded down.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    rng = np.random.default_rng((seed, _ORDER_STREAM, epoch))
    starts = np.concatenate([[0], np.cumsum(np.asarray(shard_sizes, dtype=np.int64))])
    shards = rng.permutation(len(shard_sizes))
    parts = []
    for begin in range(0, len(shards), window):
        numbers = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[begin : begin + window]])
        if weights is not None:
            numbers = _repeated(numbers, weights, epoch)
        parts.append(rng.permutation(numbers))
    order = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return order if weights is None else np.resize(order, weighted_length(weights))


def weighted_length(weights: np.ndarray) -> int:
    """Return the number of samples in an epoch of weighted samples."""
    return max(1, int(weights.sum(dtype=np.float64) + 1e-6))


def _repeated(numbers: np.ndarray, weights: np.ndarray, epoch: int) -> np.ndarray:
    """Repeat samples by their weights; fractions are spread over the epochs, at different ones for different samples."""
    weight = weights[numbers].astype(np.float64)
    phase = numbers * _GOLDEN % 1.0
    counts = (np.floor((epoch + 1) * weight + phase) - np.floor(epoch * weight + phase)).astype(np.int64)
    occurrence = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    repeated: np.ndarray = np.repeat(numbers, counts) + occurrence * len(weights)
    return repeated


def rank_share(batch_size: int, rank: int, world: int) -> slice:
    """Return the part of the global batch that a rank takes; the parts differ in size by at most one.

    Args:
        batch_size: size of the global batch, at least one sample per rank.
        rank: from 0.
        world: number of ranks.
    """
    if not 0 <= rank < world <= batch_size:
        raise ValueError(f"a batch of {batch_size} cannot be divided: rank {rank} of {world}")
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


def rank_batches(order: np.ndarray, batch_size: int, rank: int, world: int) -> list[np.ndarray]:
    """Return the samples of one rank for each step.

    The global batch of a step does not depend on the number of ranks; each rank takes its contiguous part. Samples that do
    not fill a last batch are left out of the epoch.

    Args:
        order: order of the epoch, from :func:`epoch_order`.
        batch_size, rank, world: see :func:`rank_share`.

    Returns:
        One array (share of the rank,) per step.
    """
    share = rank_share(batch_size, rank, world)
    steps = len(order) // batch_size
    return list(order[: steps * batch_size].reshape(steps, batch_size)[:, share])
