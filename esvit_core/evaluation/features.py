"""Frozen features of the trained backbone and of the baseline.

The baseline is the same network at step 0; every figure is compared with it.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from esvit_core.config import Config
from esvit_core.config.training_settings import WORKERS_PER_GPU
from esvit_core.data.loading.augment import EvalTransform
from esvit_core.data.loading.workers import WorkerBatches, choose_workers
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.monitoring.progress_line import ProgressLine
from esvit_core.runs.environment import available_cores
from esvit_core.runs.gpus import accelerators_setting, computing_devices
from esvit_core.storage import ObjectStore, join_uri

SPLITS = ("train", "val")
STORE_GRACE_SECONDS = 600.0  # that a worker may wait for the store
# Prefix of each model in the run.
_PREFIXES = {"trained": "backbone", "baseline": "baseline"}


class Images(Protocol):
    """Dataset of labeled images, such as :class:`esvit_core.data.shards.reader.ShardDataset`."""

    @property
    def labels(self) -> np.ndarray: ...

    def __len__(self) -> int: ...
    def image(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Features:
    """Features of N images in the order of the dataset.

    Attributes:
        view: view features, (N, D) float32.
        blocks: linear-probe features, the concatenated averages of the last blocks, (N, D') float32.
        labels: classes from 0, -1 for an unlabeled image, (N,) int64.
    """

    view: np.ndarray
    blocks: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def compute_features(
    backbone: nn.Module,
    dataset: Images,
    transform: Callable[[np.ndarray], torch.Tensor],
    batch_size: int,
    blocks: int = 4,
    *,
    precision: str = "float32",
    label: str = "features",
    devices: Sequence[torch.device] | None = None,
    workers: int | Literal["auto"] = "auto",
) -> Features:
    """Compute the features of every image, in order.

    Args:
        backbone: in eval mode.
        dataset: images and labels.
        transform: maps an image (H, W, 3) uint8 to the network's input (3, S, S).
        batch_size: images per batch.
        blocks: number of last blocks in the linear-probe feature.
        precision: ``bfloat16`` runs the network under autocast, ``float32`` does not. float32 is the default even after
            training in bfloat16, whose rounding reorders the neighbors of small networks.
        label: first word of the progress lines.
        devices: devices that process the batches in turn, each with a copy of the backbone; None: all GPUs of this
            machine, or the CPU.
        workers: processes that load batches, which changes no feature; auto: some for each GPU, none for a CPU. There are
            never more than shared memory has room for.
    """
    devices = devices or computing_devices()
    from esvit_core.kernels.choose import select_kernels_  # imports timm, which reading features does not need

    select_kernels_(backbone, getattr(torch, precision), devices[0])
    copies = [(backbone if not i else copy.deepcopy(backbone)).to(device) for i, device in enumerate(devices)]

    def compute(number: int, batch: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        device, network = devices[number % len(devices)], copies[number % len(devices)]
        with torch.inference_mode(), _autocast(device, precision):  # set per thread
            x = batch.to(device, non_blocking=True)  # (B, 3, S, S)
            view, block = network.view_and_last_blocks(x, blocks)  # type: ignore[operator]  # (B, D), (B, D')
            return view.float().cpu().numpy(), block.float().cpu().numpy()

    keys = [range(i, min(i + batch_size, len(dataset))) for i in range(0, len(dataset), batch_size)]
    loaded = _EvalBatches(dataset, transform)
    number = _workers(workers, loaded, keys, devices)
    batches = _load_in_workers(loaded, keys, number) if number else _load_in_thread(loaded, keys)
    views: list[np.ndarray] = []
    last: list[np.ndarray] = []
    with ProgressLine(len(dataset), label=label) as progress:
        for view, block in _in_turn(compute, batches, len(devices)):
            views.append(view)
            last.append(block)
            progress.update(len(view))
    empty = np.zeros((0, 0), np.float32)
    return Features(
        view=np.concatenate(views) if views else empty,
        blocks=np.concatenate(last) if last else empty,
        labels=np.asarray(dataset.labels, dtype=np.int64),
    )


def features_of(backbone: nn.Module, dataset: Images, config: Config, label: str) -> Features:
    """Call :func:`compute_features` with the transform, batch size and precision of the configuration."""
    return compute_features(
        backbone,
        dataset,
        eval_transform(config),
        config.evaluation.batch_size,
        config.evaluation.linear.last_blocks,
        precision="bfloat16" if config.training.precision == "bfloat16" else "float32",
        label=label,
        devices=computing_devices(accelerators_setting(config, "evaluate")),
        workers=config.training.workers,
    )


def empty_features() -> Features:
    """Return the features of an empty dataset."""
    empty = np.zeros((0, 0), np.float32)
    return Features(empty, empty, np.zeros(0, np.int64))


def load_model(run_uri: str, model: str, store: ObjectStore) -> nn.Module:
    """Load the run's backbone, ``trained`` or ``baseline``."""
    from esvit_core.weights.backbone import load_backbone  # imports timm

    return load_backbone(join_uri(run_uri, _PREFIXES[model]), store)


def split_datasets(store: ObjectStore, data: str) -> dict[str, ShardDataset]:
    """Open the non-empty splits of prepared data."""
    manifest = Manifest.read(store, data)
    return {
        split: ShardDataset(store, data, split)
        for split in SPLITS
        if split in manifest.splits and manifest.splits[split].samples
    }


def eval_transform(config: Config) -> EvalTransform:
    """Return the transform for evaluation: resize, center crop, normalize (EsViT, section 4)."""
    return EvalTransform(
        config.evaluation.resize, config.evaluation.crop, mean=config.augment.mean, std=config.augment.std
    )


def _in_turn(
    compute: Callable[[int, torch.Tensor], tuple[np.ndarray, np.ndarray]], batches: Iterator[torch.Tensor], workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield results in the order of the batches, with ``workers`` batches in flight."""
    if workers == 1:
        yield from (compute(0, batch) for batch in batches)
        return
    with ThreadPoolExecutor(max_workers=workers) as pool:
        pending = deque[Future[tuple[np.ndarray, np.ndarray]]]()
        for number, batch in enumerate(batches):
            pending.append(pool.submit(compute, number, batch))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


@contextlib.contextmanager
def _autocast(device: torch.device, precision: str) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


class _EvalBatches(Dataset[list[torch.Tensor]]):
    """Batches of transformed images, by the numbers of the images."""

    def __init__(self, dataset: Images, transform: Callable[[np.ndarray], torch.Tensor]) -> None:
        self._dataset, self._transform = dataset, transform

    def __getitem__(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        return [torch.stack([self._transform(self._dataset.image(i)) for i in numbers])]


def _workers(
    wanted: int | Literal["auto"], batches: _EvalBatches, keys: Sequence[range], devices: Sequence[torch.device]
) -> int:
    if wanted == 0 or not keys or (wanted == "auto" and devices[0].type == "cpu"):
        return 0
    most = WORKERS_PER_GPU * len(devices) if wanted == "auto" else wanted
    batch_bytes = len(keys[0]) * batches[range(1)][0].nbytes
    return min(len(keys), choose_workers(batch_bytes, 1, available_cores() if wanted == "auto" else most + 1, most))


def _load_in_workers(batches: _EvalBatches, keys: Sequence[range], workers: int) -> Iterator[torch.Tensor]:
    processes = WorkerBatches(batches, workers, STORE_GRACE_SECONDS)
    try:
        for (batch,) in processes.load(keys):
            yield batch
    finally:
        processes.close()


def _load_in_thread(batches: _EvalBatches, keys: Sequence[range]) -> Iterator[torch.Tensor]:
    """Yield batches in order; the next batch is decoded while the network processes the current one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = None
        for position, key in enumerate(keys):
            ready = upcoming.result() if upcoming else batches[key]
            upcoming = pool.submit(batches.__getitem__, keys[position + 1]) if position + 1 < len(keys) else None
            yield ready[0]
