"""Pre-training: the algorithm of EsViT (section 3, algorithm 1 of the appendix), one step after the other."""

from __future__ import annotations

import time

import torch

from esvit_core.data.loading.loader import Batch
from esvit_core.data.loading.mixup import mix_crops
from esvit_core.launch.stop import StopRequest
from esvit_core.models.vil import switch_mode_
from esvit_core.training.checkpoint import Checkpointer
from esvit_core.training.checkpoint_interval import CheckpointPace
from esvit_core.training.distributed.processes import Vote
from esvit_core.training.metrics_logger import StepOutputs, Watch
from esvit_core.training.nonfinite import backward
from esvit_core.training.optim.optimizer import (
    clip_gradients_,
    freeze_last_layer_,
    set_hyperparameters_,
    update_teacher_,
)
from esvit_core.training.optim.schedules import ScheduleValues
from esvit_core.training.state import Parts, seed_step


def train(
    parts: Parts, watch: Watch, checkpoints: Checkpointer | None, stop: StopRequest, pace: CheckpointPace
) -> bool:
    """Train from the present position on.

    Args:
        parts: of the run.
        watch: looks at every step.
        checkpoints: of the first process, None in the others.
        stop: whether this process has been asked to stop.
        pace: when checkpoints are due.

    Returns:
        True when the run is finished, False when it was asked to stop before; a checkpoint is written either way.

    Raises:
        UserError: the loss is not finite, or the teacher has collapsed.
        RollBack: the loss was not finite, and the run is to go back to its last checkpoint.
    """
    position, training = parts.position, parts.config.training
    vote = Vote(parts.world)
    start = time.monotonic() - position.seconds
    stopped = False
    for batch in parts.batches():
        vote.begin(stop.requested, save=pace.due())
        at = parts.schedule_values()
        parts.trace.step(position.step + 1, batch.indices)
        with parts.profiler.step():
            outputs = training_step(parts, batch, at)
        stopped, due = vote.result()
        position.step += 1
        position.images += training.batch_size
        position.seconds = time.monotonic() - start
        parts.guard.end_step(at, outputs.terms, outputs.grad_norm, batch.indices)
        watch.step(at, outputs, batch.wait_seconds)
        del outputs  # before the next step makes its own: they are wide
        if due or stopped or parts.checkpoint_planned():
            parts.guard.settle()  # only what is finite becomes a checkpoint
            pace.saved()
            if checkpoints:
                watch.flush()
                checkpoints.save(position.step, parts.stateful, watch.loss)
        if stopped:
            break
    parts.guard.settle()
    parts.profiler.close()
    finished = position.step == parts.schedules.steps
    if checkpoints and finished and checkpoints.last_step != position.step:
        watch.flush()
        checkpoints.save(position.step, parts.stateful, watch.loss)
    return finished


def training_step(parts: Parts, batch: Batch, at: ScheduleValues) -> StepOutputs:
    """One step of the algorithm, on this process's share of the global batch."""
    config, student, teacher = parts.config, parts.student, parts.teacher
    seed_step(config.seed, parts.position.step, parts.world.rank)
    if config.model.mode_switch < 1:
        for network in (student, teacher):
            switch_mode_(network.backbone, config.model.mode_switch, at.epoch, config.training.epochs)
    micro_batches, sums = batch.split(parts.micro_batches), None

    parts.guard.begin_step()
    parts.reducer.zero(passes=len(micro_batches))
    for micro_batch in micro_batches:
        crops = [crop.to(parts.world.device, non_blocking=True) for crop in micro_batch.crops]
        given = mix_crops(crops, config.mixup, config.seed, parts.position.step)
        with parts.precision.autocast():
            with torch.no_grad():
                teacher_out = teacher(given.teacher)
            student_out = student(given.student)
        last = micro_batch is micro_batches[-1]
        terms = parts.objective(student_out, teacher_out, at.teacher_temp, given.shares, last)
        terms = terms.times(parts.weight(len(micro_batch.indices)))
        backward(terms.total)
        sums = terms.plus(sums)
    parts.reducer.finish()
    grad_norm = clip_gradients_(student.parameters(), config.optimizer.clip_grad)
    if at.epoch < config.optimizer.freeze_last_layer_epochs:
        freeze_last_layer_(student)
    parts.guard.judge(grad_norm)
    set_hyperparameters_(parts.optimizer, at.lr, at.weight_decay)
    parts.optimizer.step()
    update_teacher_(student, teacher, at.teacher_momentum)
    assert sums is not None
    return StepOutputs(sums, student_out, teacher_out, grad_norm)
