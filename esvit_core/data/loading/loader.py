"""Batches of crops for training, the same ones for the same seed however they are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from esvit_core.config import Config
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.data.loading.sampler import epoch_order, rank_batches, rank_share
from esvit_core.data.loading.workers import Crops, WorkerBatches, shared_memory_line


class Images(Protocol):
    """What is trained on; :class:`esvit_core.data.shards.reader.ShardDataset` is one."""

    @property
    def shard_sizes(self) -> list[int]: ...
    def __len__(self) -> int: ...
    def image(self, index: int) -> np.ndarray: ...


_Key = tuple[int, np.ndarray]  # the epoch, and the numbers of a batch's samples


@dataclass
class Batch:
    """What one rank sees in one step.

    Attributes:
        crops: global crops, then local ones, each (B, 3, S, S) float32; B is this rank's share of the batch.
        indices: numbers of the samples, (B,).
        wait_seconds: how long the training waited for this batch.
    """

    crops: list[torch.Tensor]
    indices: np.ndarray
    wait_seconds: float

    def split(self, number: int) -> list[Batch]:
        """In so many micro-batches, whose sizes differ by one at most and whose crops are views of these."""
        if number == 1:
            return [self]
        crops = zip(*(crop.tensor_split(number) for crop in self.crops), strict=True)
        indices = np.array_split(self.indices, number)
        return [Batch(list(part), own, 0.0) for part, own in zip(crops, indices, strict=True)]


class TrainLoader:
    """Augmented batches of one rank.

    What a sample looks like is a function of seed, epoch and number; which samples make a step is one of seed and
    epoch. So a run that goes on in the middle of an epoch sees exactly what it would have seen, and the number of
    worker processes changes nothing.

    Args:
        dataset: the training split.
        config: of the run.
        seed: of order and augmentation.
        rank, world: this process among those that share the batches.
    """

    def __init__(self, dataset: Images, config: Config, seed: int, rank: int = 0, world: int = 1) -> None:
        self.dataset = dataset
        self._batch_size, self._workers = config.training.batch_size, config.training.workers
        self._seed, self._rank, self._world = seed, rank, world
        self._batches = _Batches(dataset, MultiCrop(config.augment), seed)
        self._patience = 60 * config.training.store_grace_minutes
        self._in_workers: WorkerBatches | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset) // self._batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch.

        Args:
            epoch: from 0.
            start_step: steps of the epoch to leave out because they were done before.
        """
        order = epoch_order(self._seed, epoch, self.dataset.shard_sizes)
        batches = rank_batches(order, self._batch_size, self._rank, self._world)[start_step:]
        keys = [(epoch, indices) for indices in batches]
        loaded = self._from_workers(keys) if self._workers else self._here(keys)
        for indices in batches:
            start = time.perf_counter()
            crops = next(loaded)
            yield Batch(crops, indices, time.perf_counter() - start)

    def check_shared_memory(self, processes: int) -> str:
        """Compare the shared memory that the workers need with what there is, in one line; "" without workers.

        Args:
            processes: training processes of this machine.

        Raises:
            UserError: there is too little.
        """
        if not self._workers:
            return ""
        share = rank_share(self._batch_size, self._rank, self._world)
        batch_bytes = (share.stop - share.start) * self._batches.bytes_per_sample
        return shared_memory_line(self._workers, batch_bytes, processes)

    def _here(self, keys: Sequence[_Key]) -> Iterator[Crops]:
        # No thread: on a CPU it would take its time from the network's, and both would wait for the interpreter.
        return (self._batches[key] for key in keys)

    def _from_workers(self, keys: Sequence[_Key]) -> Iterator[Crops]:
        if self._in_workers is None:
            self._in_workers = WorkerBatches(self._batches, self._workers, self._patience)
        return self._in_workers.load(keys)


class _Batches(Dataset[Crops]):
    """Batches of crops, by epoch and numbers of the samples."""

    def __init__(self, dataset: Images, multicrop: MultiCrop, seed: int) -> None:
        self._dataset, self._multicrop, self._seed = dataset, multicrop, seed

    @property
    def bytes_per_sample(self) -> int:
        return sum(3 * size**2 * torch.float32.itemsize for size in self._multicrop.sizes)

    def __getitem__(self, key: _Key) -> Crops:
        epoch, indices = key
        crops = [torch.empty(len(indices), 3, size, size) for size in self._multicrop.sizes]
        for row, index in enumerate(indices.tolist()):
            rng = sample_rng(self._seed, epoch, index)
            self._multicrop.write(self._dataset.image(index), rng, [crop[row] for crop in crops])
        return crops
