"""The state of a training, built from the run's configuration, and the part of it that checkpoints contain."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from esvit_core.config import Config
from esvit_core.data.loading.device_batches import copy_ahead
from esvit_core.data.loading.device_colors import DeviceColors
from esvit_core.data.loading.loader import Batch, TrainLoader
from esvit_core.data.loading.sampler import rank_share
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.kernels.choose import select_kernels_
from esvit_core.kernels.half_linear import HalfWeights
from esvit_core.losses.objective import Objective
from esvit_core.losses.strategy import LAZY_TRITON, TRITON, logit_bytes, select_strategy
from esvit_core.models.multicrop import MultiCropNetwork, build_student_teacher
from esvit_core.models.precision import Precision, choose_precision
from esvit_core.runs.environment import available_cores
from esvit_core.runs.run import Run
from esvit_core.storage import ObjectStore
from esvit_core.storage.retry import RetryPolicy
from esvit_core.training.checkpoint import Stateful
from esvit_core.training.collapse import CollapseDetector
from esvit_core.training.distributed.batch_norm import BATCH_NORMS, synchronize_batch_norms_
from esvit_core.training.distributed.processes import GradientReducer, World
from esvit_core.training.nonfinite import NonFiniteGuard
from esvit_core.training.optim.optimizer import build_optimizer
from esvit_core.training.optim.schedules import Schedules, ScheduleValues
from esvit_core.training.profiler import Profiler
from esvit_core.training.progress import Progress
from esvit_core.training.sample_trace import SampleTrace


@dataclass
class TrainState:
    """Everything that a training step needs."""

    config: Config
    world: World
    precision: Precision
    loader: TrainLoader
    schedules: Schedules
    student: MultiCropNetwork
    teacher: MultiCropNetwork
    objective: Objective
    optimizer: torch.optim.Optimizer
    reducer: GradientReducer
    collapse: CollapseDetector
    progress: Progress
    guard: NonFiniteGuard
    sample_trace: SampleTrace
    profiler: Profiler
    colors: DeviceColors | None = None
    half_weights: HalfWeights | None = None
    blocks: str = ""  # how the blocks of the networks compute, for the log

    @property
    def stateful(self) -> dict[str, Stateful]:
        """The objects whose state a checkpoint contains, by name. Random numbers need none: see :func:`seed_step`."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "objective": self.objective,
            "optimizer": self.optimizer,
            "collapse": self.collapse,
            "progress": self.progress,
        }

    def load(self, states: dict[str, Any] | None) -> None:
        """Load the states of a checkpoint; rank 0 passes them, the other processes pass None."""
        for name, target in self.stateful.items():
            # One at a time: copies of all states of a large model would not fit into memory together.
            target.load_state_dict(self.world.broadcast_object(states[name] if states is not None else None))

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches into which each process splits its share of a batch; the same in every process."""
        return self.config.training.micro_batches(self.world.size)

    def weight(self, images: int) -> float:
        """Weight of a mean over ``images`` in the mean over the global batch, which is averaged over the processes."""
        return images * self.world.size / self.config.training.batch_size

    def schedule_values(self) -> ScheduleValues:
        """Return the schedules' values for the next step."""
        values = self.schedules.at(self.progress.step)
        return values._replace(lr=values.lr * self.progress.lr_scale)

    def checkpoint_planned(self) -> bool:
        """Return whether the settings ask for a checkpoint of the current step, whatever the clock says."""
        training, step = self.config.training, self.progress.step
        epochs = training.checkpoint_epochs or training.keep_epochs
        return step % training.checkpoint_steps == 0 or bool(
            epochs and step % (epochs * self.loader.steps_per_epoch) == 0
        )

    def batches(self) -> Iterator[Batch]:
        """Iterate over the batches from the current step to the end of the run."""
        steps, first = self.loader.steps_per_epoch, self.progress.step
        batches = itertools.chain.from_iterable(
            self.loader.epoch(epoch, start_step=first % steps if epoch == first // steps else 0)
            for epoch in range(first // steps, self.config.training.epochs)
        )
        return copy_ahead(batches, self.world.device) if self.world.device.type == "cuda" else batches


def build_train_state(run: Run, world: World) -> TrainState:
    """Build the state of ``run`` before its first step, with its data from the store.

    Raises:
        UserError: the data and the configuration do not fit together.
    """
    config = run.config
    batch_size = config.training.batch_size
    if batch_size < world.size:
        raise UserError(
            f"training.batch_size {batch_size}: expected at least one image for each of the {world.size} processes; "
            "raise it or start fewer processes"
        )
    # A shard is retried for as long as a checkpoint is when the store does not answer.
    patient = ObjectStore(run.store.address, RetryPolicy.lasting(60 * config.training.store_grace_minutes))
    dataset = ShardDataset(patient, run.at("data"), "train")
    if len(dataset) < batch_size:
        raise UserError(
            f"data of {run.uri}: {len(dataset)} training images, expected at least one batch of {batch_size}; "
            f"add images or lower training.batch_size"
        )
    loader = TrainLoader(dataset, config, config.seed, world.rank, world.size)
    if world.device.type == "cuda":
        loader.change_colors_on_gpu()
        loader.use_workers_for_gpu(world.node_processes, available_cores())
    return assemble_train_state(config, world, loader)


def assemble_train_state(config: Config, world: World, loader: TrainLoader) -> TrainState:
    """Build the state of a training on the batches of ``loader``."""
    batch_size = config.training.batch_size
    share = rank_share(batch_size, world.rank, world.size)
    student, teacher = (network.to(world.device) for network in build_student_teacher(config))
    synchronize_batch_norms_(student, world)
    synchronize_batch_norms_(teacher, world)
    precision = choose_precision(config.training.precision, world.device)
    stored = logit_bytes(config, student.backbone, config.training.micro_batch(world.size), precision.dtype)
    strategy = select_strategy(world.device, config.head.out_dim, config.training.lazy_logits, stored)
    process_share = Fraction(share.stop - share.start, batch_size)
    objective = Objective(config.objective, config.head.out_dim, process_share, strategy).to(world.device)
    for network in (student, teacher):
        select_kernels_(network, precision.dtype, world.device)
        network.set_lazy_logits(strategy.lazy_logits)
    on_gpu = world.device.type == "cuda"
    half = on_gpu and precision.dtype != torch.float32
    half_weights = HalfWeights([student, teacher], precision.dtype) if half else None
    optimizer, progress = build_optimizer(student, config), Progress()
    networks = [student, teacher, objective]
    return TrainState(
        config=config,
        world=world,
        precision=precision,
        loader=loader,
        schedules=Schedules(config, loader.steps_per_epoch),
        student=student,
        teacher=teacher,
        objective=objective,
        optimizer=optimizer,
        reducer=GradientReducer(student.parameters(), world),
        collapse=CollapseDetector(config.diagnostics, config.training.collapse_patience, config.head.out_dim),
        progress=progress,
        guard=NonFiniteGuard(config, world, progress, loader.steps_per_epoch, networks, optimizer),
        sample_trace=SampleTrace(world),
        profiler=Profiler(world.device, student, teacher, objective, optimizer),
        colors=DeviceColors(config.augment, fused=strategy in (TRITON, LAZY_TRITON)) if on_gpu else None,
        half_weights=half_weights,
    )


def apply_activation_checkpointing_(student: MultiCropNetwork, arch: str) -> None:
    """Make the student keep only the input of each block and recompute the block in the backward pass.

    Raises:
        UserError: the backbone has batch norms, which would add the same batch to their running statistics twice.
    """
    if any(isinstance(module, BATCH_NORMS) for module in student.backbone.modules()):
        raise UserError(
            f"launch.activation_checkpointing: {arch} has batch norms, which would count every batch twice; "
            "to save memory lower training.max_images_per_process"
        )
    student.backbone.set_grad_checkpointing(True)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that randomness (stochastic depth) depends on these three numbers and on no state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def make_deterministic() -> None:
    """Make results bit for bit reproducible on the same machine with the same number of processes and threads."""
    torch.set_deterministic_debug_mode("error")
    # It would fill every new tensor with NaN first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
