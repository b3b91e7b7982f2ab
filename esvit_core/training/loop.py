"""The pre-training algorithm of EsViT (section 3; algorithm 1 of the appendix)."""

from __future__ import annotations

import time

import torch

from esvit_core.data.loading.device_batches import crops_on
from esvit_core.data.loading.loader import Batch
from esvit_core.data.loading.mixup import mix_crops
from esvit_core.launch.signals import StopRequest
from esvit_core.models.vil import switch_mode_
from esvit_core.training.checkpoint import Checkpointer
from esvit_core.training.checkpoint_interval import CheckpointInterval
from esvit_core.training.distributed.processes import StopSaveConsensus
from esvit_core.training.metrics_logger import MetricsLogger, StepOutputs
from esvit_core.training.nonfinite import backward
from esvit_core.training.optim.optimizer import (
    clip_gradients_,
    freeze_backbone_,
    freeze_last_layer_,
    set_hyperparameters_,
    update_teacher_,
)
from esvit_core.training.optim.schedules import ScheduleValues
from esvit_core.training.state import TrainState, seed_step


def train(
    state: TrainState,
    logger: MetricsLogger,
    checkpointer: Checkpointer | None,
    stop: StopRequest,
    interval: CheckpointInterval,
) -> bool:
    """Train from the current step to the end of the run, or until a stop is requested.

    Args:
        state: networks, objective, optimizer, data and progress of the run.
        logger: receives the outputs of every step.
        checkpointer: writes checkpoints in rank 0; None in the other processes.
        stop: whether this process has been asked to stop.
        interval: when the next checkpoint is due.

    Returns:
        True if the run is finished, False if it was asked to stop; a checkpoint is written in both cases.

    Raises:
        UserError: the loss is not finite, or the teacher has collapsed.
        Rollback: the loss was not finite, and training has to return to the last checkpoint.
    """
    progress = state.progress
    consensus = StopSaveConsensus(state.world)
    start = time.monotonic() - progress.seconds
    stopped = False
    for batch in state.batches():
        consensus.begin(stop.requested, save=interval.due())
        schedule = state.schedule_values()
        state.sample_trace.step(progress.step + 1, batch.indices)
        with state.profiler.step():
            outputs = training_step(state, batch, schedule)
        stopped, save = consensus.result()
        progress.step += 1
        progress.images += state.config.training.batch_size
        progress.seconds = time.monotonic() - start
        state.guard.end_step(schedule, outputs.terms, outputs.grad_norm, batch.indices)
        logger.step(schedule, outputs, batch.wait_seconds)
        del outputs  # frees the wide logits before the next step allocates its own
        if save or stopped or state.checkpoint_planned():
            state.guard.flush()  # a state that is not finite must not become a checkpoint
            interval.saved()
            if checkpointer:
                logger.flush()
                checkpointer.save(progress.step, state.stateful, logger.loss)
        if stopped:
            break
    state.guard.flush()
    state.profiler.close()
    finished = progress.step == state.schedules.steps
    if checkpointer and finished and checkpointer.last_step != progress.step:
        logger.flush()
        checkpointer.save(progress.step, state.stateful, logger.loss)
    return finished


def training_step(state: TrainState, batch: Batch, schedule: ScheduleValues) -> StepOutputs:
    """Take one step of algorithm 1 on this process's share of the global batch.

    The student is trained to predict, from every crop, the teacher's distributions for the two global crops, for views
    and for regions; the teacher then follows the student as a moving average.
    """
    config, student, teacher = state.config, state.student, state.teacher
    seed_step(config.seed, state.progress.step, state.world.rank)
    if config.model.mode_switch < 1:
        for network in (student, teacher):
            switch_mode_(network.backbone, config.model.mode_switch, schedule.epoch, config.training.epochs)
    micro_batches, sums = batch.split(state.micro_batches), None

    if state.half_weights is not None:
        state.half_weights.update_()
    state.guard.begin_step()
    state.reducer.zero(passes=len(micro_batches))
    for micro_batch in micro_batches:
        crops = crops_on(state.world.device, micro_batch, state.colors)
        mixed = mix_crops(crops, config.mixup, config.seed, state.progress.step)
        with state.precision.autocast():
            with torch.no_grad():
                teacher_out = teacher(mixed.teacher)
            student_out = student(mixed.student)
        last = micro_batch is micro_batches[-1]
        terms = state.objective(student_out, teacher_out, schedule.teacher_temp, mixed.shares, last)
        terms = terms.times(state.weight(len(micro_batch.indices)))
        backward(terms.total)
        sums = terms.plus(sums)
    state.reducer.finish()
    state.objective.finish()

    grad_norm = clip_gradients_(student.parameters(), config.optimizer.clip_grad)
    if schedule.epoch < config.optimizer.freeze_last_layer_epochs:
        freeze_last_layer_(student)
    if schedule.epoch < config.optimizer.freeze_backbone_epochs:
        freeze_backbone_(student)
    state.guard.skip_if_nonfinite(grad_norm)
    set_hyperparameters_(state.optimizer, schedule.lr, schedule.weight_decay)
    state.optimizer.step()
    update_teacher_(student, teacher, schedule.teacher_momentum)
    assert sums is not None
    return StepOutputs(sums, student_out, teacher_out, grad_norm)
