"""Batches of crops for training; the same seed gives the same batches, however they are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from esvit_core.config import Config
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.data.loading.device_colors import DRAW_COLUMNS, pack_draws
from esvit_core.data.loading.sampler import epoch_order, rank_batches, rank_share, weighted_length
from esvit_core.data.loading.shard_prefetch import AHEAD, ShardPrefetcher, StoredImages, first_uses
from esvit_core.data.loading.workers import Crops, WorkerBatches, choose_workers, shared_memory_line


class ImageDataset(Protocol):
    """A dataset to train on, such as :class:`esvit_core.data.shards.reader.ShardDataset`."""

    @property
    def shard_sizes(self) -> list[int]: ...
    @property
    def weights(self) -> np.ndarray | None: ...
    def __len__(self) -> int: ...
    def image(self, index: int) -> np.ndarray: ...


_Key = tuple[int, np.ndarray]  # epoch, and numbers of a batch's samples


@dataclass
class Batch:
    """The batch of one rank in one step.

    Attributes:
        crops: global crops, then local crops, each (B, 3, S, S) float32; B is this rank's share of the batch. With ``draws``
            their levels, uint8.
        indices: numbers of the samples, (B,); see :func:`~esvit_core.data.loading.sampler.epoch_order`.
        wait_seconds: time that the training waited for this batch.
        draws: what changes the colors of the crops on the GPU, (B, C, 13), see
            :func:`esvit_core.data.loading.device_colors.pack_draws`; None: the crops are complete.
    """

    crops: list[torch.Tensor]
    indices: np.ndarray
    wait_seconds: float
    draws: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on a device; a copy from pinned memory is asynchronous."""
        draws = None if self.draws is None else self.draws.to(device, non_blocking=True)
        return replace(self, crops=[crop.to(device, non_blocking=True) for crop in self.crops], draws=draws)

    def split(self, number: int) -> list[Batch]:
        """Split into ``number`` micro-batches whose sizes differ by at most one; their crops are views of this batch's."""
        if number == 1:
            return [self]
        crops = zip(*(crop.tensor_split(number) for crop in self.crops), strict=True)
        indices = np.array_split(self.indices, number)
        draws = [None] * number if self.draws is None else self.draws.tensor_split(number)
        return [Batch(list(part), own, 0.0, drawn) for part, own, drawn in zip(crops, indices, draws, strict=True)]


class TrainLoader:
    """Loads the augmented batches of one rank.

    A sample's crops are a function of seed, epoch and number; the samples of a step are a function of seed and epoch.
    Therefore a run that resumes in the middle of an epoch gets exactly the batches it would have got, and the number of
    worker processes changes nothing.

    Args:
        dataset: training split.
        config: configuration of the run.
        seed: seed of order and augmentation.
        rank, world: this process among those that share the batches.
    """

    def __init__(self, dataset: ImageDataset, config: Config, seed: int, rank: int = 0, world: int = 1) -> None:
        self.dataset, self._config = dataset, config
        self._batch_size = config.training.batch_size
        self._auto = config.training.workers == "auto"
        self._workers = 0 if config.training.workers == "auto" else config.training.workers
        self._seed, self._rank, self._world = seed, rank, world
        self._batches = _Batches(dataset, MultiCrop(config.augment), seed)
        self._store_grace = 60 * config.training.store_grace_minutes
        self._worker_batches: WorkerBatches | None = None
        self._prefetcher = ShardPrefetcher(dataset) if isinstance(dataset, StoredImages) else None

    @property
    def steps_per_epoch(self) -> int:
        weights = self.dataset.weights
        return (len(self.dataset) if weights is None else weighted_length(weights)) // self._batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch.

        Args:
            epoch: from 0.
            start_step: number of steps to skip because they were done before.
        """
        batches = self._rank_batches(epoch)[start_step:]
        keys = [(epoch, indices) for indices in batches]
        loaded = self._load_in_workers(keys) if self._workers else self._load_in_process(keys)
        if self._prefetcher is not None:  # after the workers have been forked: no thread may run then
            following = first_uses(self._rank_batches(epoch + 1), self.dataset.shard_sizes)[:AHEAD]
            uses = first_uses(batches, self.dataset.shard_sizes)
            self._prefetcher.plan(uses + [(len(batches) + step, shard) for step, shard in following])
        for position, indices in enumerate(batches):
            start = time.perf_counter()
            if self._prefetcher is not None:
                self._prefetcher.reach(position)
            *crops, last = next(loaded)
            waited = time.perf_counter() - start
            yield (
                Batch(crops, indices, waited, last) if self._batches.levels else Batch([*crops, last], indices, waited)
            )

    def _rank_batches(self, epoch: int) -> list[np.ndarray]:
        order = epoch_order(self._seed, epoch, self.dataset.shard_sizes, weights=self.dataset.weights)
        return rank_batches(order, self._batch_size, self._rank, self._world)

    def use_workers_for_gpu(self, processes: int, cores: int) -> None:
        """With ``training.workers: auto``, use workers, as a GPU would wait for this process; before the first epoch.

        Args:
            processes: training processes on this machine.
            cores: cores that they may use.
        """
        if self._auto:
            self._workers = choose_workers(self._batch_bytes, processes, cores)

    def change_colors_on_gpu(self) -> None:
        """Load levels, and what changes their colors on the GPU; before the first epoch. The policy deit has no such form."""
        self._batches.levels = self._config.augment.policy == "dino"

    @property
    def workers(self) -> int:
        """Worker processes of this training process."""
        return self._workers

    def check_shared_memory(self, processes: int) -> str:
        """Compare the shared memory that the workers need with what is free, as one line; "" without workers.

        Args:
            processes: training processes on this machine.

        Raises:
            UserError: there is too little shared memory.
        """
        if not self._workers:
            return ""
        return shared_memory_line(self._workers, self._batch_bytes, processes)

    @property
    def _batch_bytes(self) -> int:
        share = rank_share(self._batch_size, self._rank, self._world)
        return (share.stop - share.start) * self._batches.bytes_per_sample

    def _load_in_process(self, keys: Sequence[_Key]) -> Iterator[Crops]:
        # No thread: on a CPU it would take time from the network, and both would wait for the GIL.
        return (self._batches[key] for key in keys)

    def _load_in_workers(self, keys: Sequence[_Key]) -> Iterator[Crops]:
        if self._worker_batches is None:
            self._worker_batches = WorkerBatches(self._batches, self._workers, self._store_grace)
        return self._worker_batches.load(keys)


class _Batches(Dataset[Crops]):
    """Batches of crops, by epoch and numbers of the samples."""

    def __init__(self, dataset: ImageDataset, multicrop: MultiCrop, seed: int) -> None:
        self._dataset, self._multicrop, self._seed = dataset, multicrop, seed
        self.levels = False  # yield levels, and as the last tensor what changes their colors

    @property
    def bytes_per_sample(self) -> int:
        value = (torch.uint8 if self.levels else torch.float32).itemsize
        return sum(3 * size**2 * value for size in self._multicrop.sizes)

    def __getitem__(self, key: _Key) -> Crops:
        epoch, indices = key
        dtype = torch.uint8 if self.levels else torch.float32
        crops = [torch.empty(len(indices), 3, size, size, dtype=dtype) for size in self._multicrop.sizes]
        draws = torch.empty(len(indices), len(crops), DRAW_COLUMNS)
        for row, index in enumerate(indices.tolist()):
            rng, image = sample_rng(self._seed, epoch, index), self._dataset.image(index % len(self._dataset))
            of_sample = [crop[row] for crop in crops]
            if self.levels:
                draws[row] = torch.from_numpy(pack_draws(self._multicrop.write_levels(image, rng, of_sample)))
            else:
                self._multicrop.write(image, rng, of_sample)
        return [*crops, draws] if self.levels else crops
