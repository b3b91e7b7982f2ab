"""The parts of a training, built from the run's configuration, and the list of those that must survive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from esvit_core.config import Config
from esvit_core.data.loading.loader import Batch, TrainLoader
from esvit_core.data.loading.sampler import rank_share
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.kernels.choose import select_kernels_
from esvit_core.losses.objective import Objective
from esvit_core.models.multicrop import MultiCropNetwork, build_student_teacher
from esvit_core.models.precision import Precision, choose_precision
from esvit_core.runs.run import Run
from esvit_core.storage import ObjectStore
from esvit_core.storage.retry import RetryPolicy
from esvit_core.training.checkpoint import Stateful
from esvit_core.training.collapse import CollapseWatch
from esvit_core.training.distributed.batch_norm import BATCH_NORMS, share_batch_norms_
from esvit_core.training.distributed.processes import GradientReducer, World
from esvit_core.training.nonfinite import NonFiniteGuard
from esvit_core.training.optim.optimizer import build_optimizer
from esvit_core.training.optim.schedules import Schedules, ScheduleValues
from esvit_core.training.profiler import Profiler
from esvit_core.training.progress import Position
from esvit_core.training.sample_trace import Trace


@dataclass
class Parts:
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
    collapse: CollapseWatch
    position: Position
    guard: NonFiniteGuard
    trace: Trace
    profiler: Profiler

    @property
    def stateful(self) -> dict[str, Stateful]:
        """All that must survive a restart. Random numbers need not: see :func:`seed_step`."""
        return {
            "student": self.student,
            "teacher": self.teacher,
            "objective": self.objective,
            "optimizer": self.optimizer,
            "collapse": self.collapse,
            "position": self.position,
        }

    def load(self, states: dict[str, Any] | None) -> None:
        """Take over a checkpoint: rank 0 gives its states, the others None."""
        for name, thing in self.stateful.items():
            # One at a time: the copies of a large model's states would not fit into memory side by side.
            thing.load_state_dict(self.world.from_first(states[name] if states is not None else None))

    @property
    def micro_batches(self) -> int:
        """Parts of a process's share that are worked off one after the other: the same number in every process."""
        batch_size, most = self.config.training.batch_size, self.config.training.max_images_per_process
        largest = -(-batch_size // self.world.size)
        return -(-largest // (most or largest))

    def weight(self, images: int) -> float:
        """What the mean over ``images`` counts in the mean over the global batch, which the processes average."""
        return images * self.world.size / self.config.training.batch_size

    def schedule_values(self) -> ScheduleValues:
        """Of the step that comes next."""
        at = self.schedules.at(self.position.step)
        return at._replace(lr=at.lr * self.position.lr_scale)

    def checkpoint_planned(self) -> bool:
        """Whether there is to be a checkpoint of the present step, whatever the clock says."""
        training, step = self.config.training, self.position.step
        epochs = training.checkpoint_epochs or training.keep_epochs
        return step % training.checkpoint_steps == 0 or bool(
            epochs and step % (epochs * self.loader.steps_per_epoch) == 0
        )

    def batches(self) -> Iterator[Batch]:
        """From the present position to the end of the run."""
        steps = self.loader.steps_per_epoch
        for epoch in range(self.position.step // steps, self.config.training.epochs):
            yield from self.loader.epoch(epoch, start_step=self.position.step % steps)


def build_parts(run: Run, world: World) -> Parts:
    """Build the parts of ``run`` as they are before its first step.

    Raises:
        UserError: the data and the configuration do not fit together.
    """
    config = run.config
    batch_size = config.training.batch_size
    if batch_size < world.size:
        raise UserError(
            f"training.batch_size {batch_size}: expected at least one image for each of the {world.size} processes; "
            "raise it or start fewer"
        )
    # A shard that is needed while the store does not answer is waited for as long as a checkpoint is.
    patient = ObjectStore(run.store.address, RetryPolicy.lasting(60 * config.training.store_grace_minutes))
    dataset = ShardDataset(patient, run.at("data"), "train")
    if len(dataset) < batch_size:
        raise UserError(
            f"data of {run.uri}: {len(dataset)} training images, expected at least one batch of {batch_size}; "
            f"give more images or lower training.batch_size"
        )
    return assemble(config, world, TrainLoader(dataset, config, config.seed, world.rank, world.size))


def assemble(config: Config, world: World, loader: TrainLoader) -> Parts:
    """The parts of a training on the batches of ``loader``."""
    batch_size = config.training.batch_size
    share = rank_share(batch_size, world.rank, world.size)
    student, teacher = (network.to(world.device) for network in build_student_teacher(config))
    share_batch_norms_(student, world)
    share_batch_norms_(teacher, world)
    objective = Objective(config.objective, config.head.out_dim, Fraction(share.stop - share.start, batch_size))
    objective.to(world.device)
    precision = choose_precision(config.training.precision, world.device)
    for network in (student, teacher):
        select_kernels_(network, precision.dtype, world.device)
    optimizer, position = build_optimizer(student, config), Position()
    networks = [student, teacher, objective]
    return Parts(
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
        collapse=CollapseWatch(config.diagnostics, config.training.collapse_patience, config.head.out_dim),
        position=position,
        guard=NonFiniteGuard(config, world, position, loader.steps_per_epoch, networks, optimizer),
        trace=Trace(world),
        profiler=Profiler(world.device, student, teacher, objective, optimizer),
    )


def apply_activation_checkpointing_(student: MultiCropNetwork, arch: str) -> None:
    """Have the student keep a block's input only, and compute the block once more in the backward pass.

    Raises:
        UserError: the backbone has batch norms, which would take the same batch into their averages twice.
    """
    if any(isinstance(module, BATCH_NORMS) for module in student.backbone.modules()):
        raise UserError(
            f"launch.activation_checkpointing: {arch} has batch norms, which would count every batch twice; "
            "to save memory lower training.max_images_per_process"
        )
    student.backbone.set_grad_checkpointing(True)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make everything random in a step (stochastic depth) a function of these three, so that no state is kept."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def make_deterministic() -> None:
    """Bit for bit the same result on the same machine with the same number of processes and threads."""
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor with NaN first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
