"""What the pods of a run's steps ask for where the configuration says `auto`: cores and memory that follow from the recipe.

Memory of a training on processors is counted as `esvit plan` counts it; what else a process holds was measured
(docs/submit.md). On GPUs the memory of the host is assumed, so much for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from esvit_core.config import Config
from esvit_core.config.cluster_settings import PodConfig, Role
from esvit_core.config.kubernetes_names import (
    AUTO,
    bytes_quantity,
    cores_quantity,
    quantity_bytes,
    quantity_cores,
)

GIB = 2**30
STEPS_OF_SIZE = GIB // 4
SMALL_PARAMETERS = 10_000_000  # of a student with its heads: less trains and is measured well on part of a core
# Beside its steps a training process holds torch, the library, data and a copy of the state for the checkpoint; the
# step that starts it holds torchx.
PROCESS_BYTES = 1.0 * GIB
STEP_BYTES = 0.7 * GIB
WORKER_BYTES = 0.5 * GIB
STATE_COPIES = 2
GPU_HOST_BYTES = 8 * GIB  # assumed
GPU_CORES = 4  # for decoding and cropping images; assumed
MOST_PROCESSES = 2  # that `training.processes: auto` starts on processors


@dataclass(frozen=True)
class Size:
    """Cores and bytes: asked for, and at most."""

    cores: float
    cores_limit: float
    memory: float
    memory_limit: float


def sized(config: Config, role: Role) -> PodConfig:
    """What the pods of that kind of step get, with every `auto` made definite.

    Args:
        config: of the run. With a scheduler other than local, `train` means each pod of the job.

    Raises:
        UserError: the recipe has no such network.
    """
    return definite(config.cluster.pod(role), lambda: _SIZES[role](config))


def with_sizes(config: Config) -> Config:
    """The configuration with the sizes of all its pods: what a pipeline is compiled with, which any recipe may run on.

    Raises:
        UserError: the recipe has no such network.
    """
    pods: dict[str, PodConfig] = {role: sized(config, role) for role in _SIZES}
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=pods)})


def definite(pod: PodConfig, size: Callable[[], Size]) -> PodConfig:
    """``pod`` with every `auto` from ``size``, which is asked only where there is one."""
    if AUTO not in (pod.cpu, pod.cpu_limit, pod.memory, pod.memory_limit):
        return pod
    needed = size()
    cores = needed.cores if pod.cpu == AUTO else quantity_cores(pod.cpu)
    if pod.cpu == AUTO and pod.cpu_limit not in (AUTO, None):
        cores = min(cores, quantity_cores(str(pod.cpu_limit)))
    memory: float = needed.memory if pod.memory == AUTO else quantity_bytes(pod.memory)
    if pod.memory == AUTO and pod.memory_limit != AUTO:
        memory = min(memory, quantity_bytes(pod.memory_limit))
    most = max(memory, needed.memory_limit) if pod.memory == AUTO else memory
    found = {
        "cpu": cores_quantity(cores) if pod.cpu == AUTO else pod.cpu,
        "cpu_limit": cores_quantity(max(cores, needed.cores_limit)) if pod.cpu_limit == AUTO else pod.cpu_limit,
        "memory": bytes_quantity(memory) if pod.memory == AUTO else pod.memory,
        "memory_limit": bytes_quantity(most) if pod.memory_limit == AUTO else pod.memory_limit,
    }
    return pod.model_copy(update=found)


def _prepare(config: Config) -> Size:
    return Size(0.5, 4, GIB, 8 * GIB)


def _publish(config: Config) -> Size:
    return Size(0.25, 2, GIB, 4 * GIB)


def _evaluate(config: Config) -> Size:
    small = _parameters(config.to_yaml()) < SMALL_PARAMETERS
    return Size(0.25 if small else 1, 4, (1.5 if small else 4) * GIB, 16 * GIB)


def _train(config: Config) -> Size:
    from esvit_core.planning.count_operations import BYTES_A_PARAMETER, shares

    training, pod = config.training, config.cluster.train
    if config.launch.scheduler != "local":
        processes, nodes = config.node_processes, config.launch.fewest_nodes
    else:
        usual = pod.accelerators or MOST_PROCESSES
        processes, nodes = (usual if training.processes == "auto" else training.processes), 1
    parameters = _parameters(config.to_yaml())
    state = STATE_COPIES * BYTES_A_PARAMETER[config.optimizer.name] * parameters
    shared = quantity_bytes(pod.shared_memory) if pod.shared_memory and training.workers else 0
    memory = STEP_BYTES + state + shared + processes * (PROCESS_BYTES + training.workers * WORKER_BYTES)
    if pod.accelerators:
        memory += processes * GPU_HOST_BYTES
        cores, most = float(GPU_CORES * pod.accelerators), 2.0 * GPU_CORES * pod.accelerators
    else:
        fixed, image = _step_bytes(config.to_yaml())
        memory += processes * (fixed + image * shares(config, min(training.batch_size, nodes * processes))[1])
        cores, most = (0.5 if parameters < SMALL_PARAMETERS else 2.0), 8.0
    memory = STEPS_OF_SIZE * math.ceil(memory / STEPS_OF_SIZE)
    return Size(cores, most, memory, 2 * memory)


_SIZES: dict[Role, Callable[[Config], Size]] = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "publish": _publish,
}


@cache
def _parameters(text: str) -> int:
    """Of the student with its heads."""
    from esvit_core.planning.count_operations import count_parameters

    return count_parameters(Config.from_yaml(text))


@cache
def _step_bytes(text: str) -> tuple[float, float]:
    """Of a training process on processors: held whatever the batch, and for each image that is worked off at a time."""
    import torch

    from esvit_core.planning.count_operations import count_demand

    config = Config.from_yaml(text)
    dtype = torch.bfloat16 if config.training.precision == "bfloat16" else torch.float32
    demand = count_demand(config, dtype, "cpu")
    return demand.fixed_bytes, demand.image_bytes
