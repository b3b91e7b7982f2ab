"""Compute the resources of a step's pods where the configuration says `auto`.

The memory of a training on processors is counted as in `esvit plan`, plus the measured overhead of a process
(docs/submit.md). For a training on GPUs the host memory per GPU is an assumption. The scratch folder holds checkpoints
beside the shard cache, which takes half of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from esvit_core.config import Config
from esvit_core.config.cluster_settings import PodConfig, Role
from esvit_core.config.kubernetes_names import (
    AUTO,
    bytes_quantity,
    cores_quantity,
    quantity_bytes,
    quantity_cores,
)
from esvit_core.config.training_settings import PREFETCH_FACTOR, WORKERS_PER_GPU

GIB = 2**30
MEMORY_STEP = GIB // 4  # memory is rounded up to a multiple
SMALL_PARAMETERS = 10_000_000  # parameters of student and heads below which part of a core suffices
# A training process also holds torch, the library, data, and copies of the state for the checkpoint. The step that
# launches it holds torchx.
PROCESS_BYTES = 1.0 * GIB
STEP_BYTES = 0.7 * GIB
WORKER_BYTES = 0.5 * GIB
STATE_COPIES = 2
GPU_HOST_BYTES = 8 * GIB  # host memory per GPU, an assumption
GPU_CORES = 4  # cores per GPU that decode and crop images, an assumption
# Checkpoints on the disk of a training at the same time: one that is written, one that waits for its upload, one that is
# uploaded, and one that a resume reads.
CHECKPOINTS_ON_DISK = 4
MIN_SCRATCH = {"prepare": 50 * GIB, "train": 50 * GIB, "evaluate": 64 * GIB, "publish": 10 * GIB}
MAX_PROCESSES = 2  # maximum of `training.processes: auto` on processors


@dataclass(frozen=True)
class Size:
    """Requests and limits: cores, and memory in bytes; the limit of the scratch folder, and shared memory, in bytes."""

    cores: float
    cores_limit: float
    memory: float
    memory_limit: float
    scratch: float
    shared: float = GIB


def resolve_pod(config: Config, role: Role) -> PodConfig:
    """Return the pod settings of a kind of step, with every `auto` replaced by a quantity.

    Args:
        config: configuration of the run. With a scheduler other than local, `train` means each pod of the job.

    Raises:
        UserError: the network cannot be built.
    """
    return fill_auto(config.cluster.pod(role), lambda: _SIZES[role](config))


def with_pod_sizes(config: Config) -> Config:
    """Return the configuration with every `auto` of its pods replaced, as needed to compile a pipeline.

    Raises:
        UserError: the network cannot be built.
    """
    pods: dict[str, PodConfig] = {role: resolve_pod(config, role) for role in _SIZES}
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=pods)})


def fill_auto(pod: PodConfig, size: Callable[[], Size]) -> PodConfig:
    """Replace every `auto` of ``pod`` by the value from ``size``, which is called only if there is one."""
    quantities = (pod.cpu, pod.cpu_limit, pod.memory, pod.memory_limit, pod.scratch, pod.shared_memory)
    if AUTO not in quantities:
        return pod
    needed = size()
    cores = needed.cores if pod.cpu == AUTO else quantity_cores(pod.cpu)
    if pod.cpu == AUTO and pod.cpu_limit not in (AUTO, None):
        cores = min(cores, quantity_cores(str(pod.cpu_limit)))
    memory: float = needed.memory if pod.memory == AUTO else quantity_bytes(pod.memory)
    if pod.memory == AUTO and pod.memory_limit != AUTO:
        memory = min(memory, quantity_bytes(pod.memory_limit))
    memory_limit = max(memory, needed.memory_limit) if pod.memory == AUTO else memory
    shared = min(needed.shared, memory / 2)  # less shared memory means fewer workers
    filled = {
        "cpu": cores_quantity(cores) if pod.cpu == AUTO else pod.cpu,
        "cpu_limit": cores_quantity(max(cores, needed.cores_limit)) if pod.cpu_limit == AUTO else pod.cpu_limit,
        "memory": bytes_quantity(memory) if pod.memory == AUTO else pod.memory,
        "memory_limit": bytes_quantity(memory_limit) if pod.memory_limit == AUTO else pod.memory_limit,
        "scratch": bytes_quantity(needed.scratch) if pod.scratch == AUTO else pod.scratch,
        "shared_memory": bytes_quantity(shared) if pod.shared_memory == AUTO else pod.shared_memory,
    }
    return pod.model_copy(update=filled)


def _prepare(config: Config) -> Size:
    return Size(0.5, 4, GIB, 8 * GIB, MIN_SCRATCH["prepare"])


def _publish(config: Config) -> Size:
    return Size(0.25, 2, GIB, 4 * GIB, _scratch(config, "publish", 2))  # an import reads one and writes one


def _evaluate(config: Config) -> Size:
    small = _parameters(_network(config)) < SMALL_PARAMETERS
    return Size(0.25 if small else 1, 4, (1.5 if small else 4) * GIB, 16 * GIB, _scratch(config, "evaluate", 1))


def _train(config: Config) -> Size:
    from esvit_core.planning.count_operations import BYTES_A_PARAMETER

    training, pod = config.training, config.cluster.train
    if config.launch.scheduler != "local":
        processes, nodes = config.node_processes, config.launch.fewest_nodes
    else:
        usual = pod.accelerators or MAX_PROCESSES
        processes, nodes = (usual if training.processes == "auto" else training.processes), 1
    parameters = _parameters(_network(config))
    state = STATE_COPIES * BYTES_A_PARAMETER[config.optimizer.name] * parameters
    workers = training.workers
    if workers == "auto":
        workers = WORKERS_PER_GPU if pod.accelerators else 0
    everywhere = min(training.batch_size, nodes * processes)
    images = training.largest_share(everywhere)
    on_gpu = pod.accelerators and config.augment.policy == "dino"  # workers load levels, uint8
    crops = 3 * (1 if on_gpu else 4) * sum(size**2 for size in config.augment.crop_sizes)  # bytes of an image's crops
    needed = float(processes * (workers * PREFETCH_FACTOR + 1) * images * crops) if workers else 0.0
    auto = GIB * math.ceil(max(needed, GIB) / GIB)
    shared = 0.0
    if pod.shared_memory and workers:
        shared = auto if pod.shared_memory == AUTO else quantity_bytes(pod.shared_memory)
    memory = STEP_BYTES + state + shared + processes * (PROCESS_BYTES + workers * WORKER_BYTES)
    if pod.accelerators:
        memory += processes * GPU_HOST_BYTES
        cores, cores_limit = float(GPU_CORES * pod.accelerators), 2.0 * GPU_CORES * pod.accelerators
    else:
        fixed, image = _step_bytes(_network(config))
        memory += processes * (fixed + image * training.micro_batch(everywhere))
        cores, cores_limit = (0.5 if parameters < SMALL_PARAMETERS else 2.0), 8.0
    memory = MEMORY_STEP * math.ceil(memory / MEMORY_STEP)
    return Size(cores, cores_limit, memory, 2 * memory, _scratch(config, "train", CHECKPOINTS_ON_DISK), auto)


def _scratch(config: Config, role: Role, checkpoints: int) -> float:
    """Bytes of the scratch folder whose half, beside the shard cache, holds that many checkpoints."""
    from esvit_core.planning.count_operations import BYTES_A_PARAMETER

    # A checkpoint lacks the gradient that is counted here: a fifth to a quarter of headroom.
    state = BYTES_A_PARAMETER[config.optimizer.name] * _parameters(_network(config))
    return max(MIN_SCRATCH[role], 2 * GIB * math.ceil(checkpoints * state / GIB))


_SIZES: dict[Role, Callable[[Config], Size]] = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "publish": _publish,
}


#: Settings that determine what is counted; others do not make it necessary to count again.
_COUNTED: dict[str, Any] = {
    "augment": True,
    "model": True,
    "head": True,
    "objective": {"region"},
    "optimizer": {"name"},
    "training": {"precision"},
    "evaluation": {"resize", "crop"},
    "launch": {"activation_checkpointing"},
}


def _network(config: Config) -> str:
    """The settings of networks and crops, as JSON."""
    return config.model_dump_json(include=_COUNTED)


@cache
def _parameters(network: str) -> int:
    """Parameters of the student with its heads."""
    from esvit_core.planning.count_operations import count_parameters

    return count_parameters(Config.from_mapping(json.loads(network)))


@cache
def _step_bytes(network: str) -> tuple[float, float]:
    """Memory of a training process on processors: fixed, and per image of a micro-batch."""
    import torch

    from esvit_core.planning.count_operations import count_memory

    config = Config.from_mapping(json.loads(network))
    dtype = torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32
    memory = count_memory(config, dtype, "cpu")
    return memory.fixed_bytes, memory.image_bytes
