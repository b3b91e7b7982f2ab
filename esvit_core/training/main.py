"""A training from beginning to end: set up or resume, train, publish the backbone, say that it is done."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from esvit_core.launch.pod_metadata import METRICS_PORT_VARIABLE
from esvit_core.launch.stop import STOPPED_EXIT_CODE, StopRequest
from esvit_core.monitoring.metrics import TrainingMetrics
from esvit_core.monitoring.progress_line import Progress, format_duration
from esvit_core.runs.environment import device_memory, hardware, versions
from esvit_core.runs.events import note, starts
from esvit_core.runs.log import LogWriter, read_log
from esvit_core.runs.run import Run, open_run
from esvit_core.runs.training_summary import SUMMARY, TrainingSummary, read_summary
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.training.allocator import keep_freed_memory
from esvit_core.training.checkpoint import Checkpointer, Retention, Written
from esvit_core.training.checkpoint_interval import CheckpointPace
from esvit_core.training.distributed.processes import join_world
from esvit_core.training.emergency_save import Urgent
from esvit_core.training.initial_weights import starting_states
from esvit_core.training.loop import train
from esvit_core.training.metrics_logger import Watch
from esvit_core.training.nonfinite import NONFINITE, RollBack
from esvit_core.training.profiler import PROFILE, Profile
from esvit_core.training.state import Parts, apply_activation_checkpointing_, build_parts, make_deterministic
from esvit_core.weights.backbone import save_backbone


def carry_out(run_uri: str, stop: StopRequest) -> int:
    """Train the run at ``run_uri`` in this process, with those that torchrun has started beside it.

    Returns:
        Exit code: 0 when the run is finished, 75 when it was asked to stop.

    Raises:
        UserError: the input is wrong, the loss is not finite, or the teacher has collapsed.
    """
    run = open_run(run_uri)
    if summary := read_summary(run.store, run.uri):
        _say_finished(summary)
        return 0
    if run.config.training.deterministic:
        make_deterministic()
    keep_freed_memory()
    patience = 60 * run.config.training.store_grace_minutes
    world = join_world(patience)
    # Another start of the run may have changed it since the first process has read it.
    run = replace(run, config=world.from_first(run.config))
    launch = run.config.launch
    parts = build_parts(run, world)
    if (line := parts.loader.check_shared_memory(round(world.node_share * world.size))) and world.first:
        print(f"train: {line}", flush=True)
    if launch.activation_checkpointing:
        apply_activation_checkpointing_(parts.student, run.config.model.arch)
    pace = CheckpointPace(run.config.training.checkpoint_minutes, leads=world.first)
    metrics = _metrics(run, parts, pace) if world.first_of_node else None
    uploads = _open_uploads(run, patience) if world.first else None
    checkpoints = _checkpointer(run, parts, uploads, metrics, pace) if uploads else None
    resume(run, parts, checkpoints)
    if world.first and metrics:
        metrics.started(parts.position.step, _note_start(run, parts))
    urgent = Urgent(run, parts, uploads)
    stop.arm(urgent.send)
    try:
        if uploads:
            parts.profiler.begin(launch.profile_steps, partial(_keep_profile, run, uploads))
        finished, last_line = _train(parts, uploads, checkpoints, metrics, stop, pace, urgent)
    finally:
        if metrics and (why := metrics.push()):
            print(f"train: {why}", flush=True)
    if world.first and finished:
        _say_finished(finish(run, parts, last_line))
    elif uploads:
        _say_stopped(run, parts, uploads, urgent)
    world.wait_for_all(600 + patience)  # the first one may be waiting for the store
    world.leave()
    return 0 if finished else STOPPED_EXIT_CODE


def resume(run: Run, parts: Parts, checkpoints: Checkpointer | None) -> None:
    """Take over the newest valid checkpoint; where there is none, the weights that the run starts from.

    Those, as they were drawn or taken over, are published as the baseline.

    Args:
        run: the run.
        parts: as built.
        checkpoints: of the first process, None in the others.
    """
    position = parts.position
    restored = None
    if checkpoints:
        restored = checkpoints.restore()
        for why in checkpoints.passed_over:
            print(f"train: {why}", flush=True)
    if parts.world.from_first(restored is not None):
        parts.load(restored.states if restored else None)
        position.resumes.append(position.step)
    elif run.config.init.source is not None:
        parts.load(starting_states(run, parts) if checkpoints else None)
    if not checkpoints:
        return
    if restored:
        print(
            f"train: resuming from step {position.step:,} of {parts.schedules.steps:,} (checkpoint {restored.place})",
            flush=True,
        )
    else:
        if run.config.training.on_nonfinite == "rollback":
            checkpoints.save(0, parts.stateful)  # to have something to go back to
        save_backbone(run.store, run.at("baseline"), parts.teacher.backbone, run.config, {"run": run.uri, "step": 0})
    _introduce(parts)


def roll_back(parts: Parts, checkpoints: Checkpointer | None) -> None:
    """Go back to the last checkpoint and go on from there with a lower learning rate."""
    position, restored = parts.position, None
    nonfinite, lr_scale = position.nonfinite, position.lr_scale * parts.config.training.rollback_lr
    if checkpoints:
        checkpoints.wait()
        restored = checkpoints.restore()
    parts.load(restored.states if restored else None)
    position.nonfinite, position.lr_scale = nonfinite, lr_scale
    position.resumes.append(position.step)
    if checkpoints:
        print(f"train: back to step {position.step:,}, from there with {lr_scale:g} of the learning rate", flush=True)


def finish(run: Run, parts: Parts, last_line: dict[str, float | int | None]) -> TrainingSummary:
    """Publish the trained teacher and the summary that marks the run as finished."""
    position, world = parts.position, parts.world
    backbone = run.at("backbone")
    save_backbone(run.store, backbone, parts.teacher.backbone, run.config, {"run": run.uri, "step": position.step})
    if not last_line:  # the run had been trained to the end, but not finished
        last_line = (read_log(run.store, run.uri) or [{}])[-1]
    summary = TrainingSummary(
        steps=position.step,
        epochs=run.config.training.epochs,
        images=position.images,
        seconds=round(position.seconds, 1),
        images_per_second=round(position.images / max(position.seconds, 1e-9), 1),
        final_loss=float(last_line.get("loss") or 0.0),
        precision=parts.precision.name,
        processes=world.size,
        threads=torch.get_num_threads(),
        resumes=position.resumes,
        backbone=backbone,
        versions=versions(),
        hardware=hardware(),
    )
    run.store.put_json(run.at(SUMMARY), summary.as_json())
    return summary


def _train(
    parts: Parts,
    uploads: UploadQueue | None,
    checkpoints: Checkpointer | None,
    metrics: TrainingMetrics | None,
    stop: StopRequest,
    pace: CheckpointPace,
    urgent: Urgent,
) -> tuple[bool, dict[str, float | int | None]]:
    log = urgent.log = LogWriter(uploads) if uploads else None
    if uploads:
        parts.guard.keep = partial(_keep_nonfinite, uploads, metrics)
    steps = parts.schedules.steps
    try:
        while True:
            progress = Progress(steps, unit="steps", label="train", initial=parts.position.step) if log else None
            watch = Watch(parts, log, metrics, progress)
            try:
                finished = train(parts, watch, checkpoints, stop, pace)
                break
            except RollBack:
                roll_back(parts, checkpoints)
                if log:
                    log.begin_attempt()
        if progress:
            progress.close()
    finally:
        if log and uploads and checkpoints:
            log.flush()
            checkpoints.wait(stop.seconds_left())
            uploads.close(stop.seconds_left())
    return finished, watch.last_line


def _keep_nonfinite(uploads: UploadQueue, metrics: TrainingMetrics | None, record: dict[str, Any]) -> None:
    if metrics:
        metrics.nonfinite()
    name = f"{NONFINITE}/{record['step']:08d}-{int(record['time'] * 1000)}.json"
    print(f"train: step {record['step']:,} was not finite ({record['action']}): {name}", flush=True)
    uploads.put(name, encode_json(record))


def _keep_profile(run: Run, uploads: UploadQueue, profile: Profile) -> None:
    uploads.put(f"{PROFILE}/summary.json", encode_json(profile.summary))
    uploads.put(f"{PROFILE}/trace.json.gz", profile.trace)
    parts = sorted(profile.summary["seconds_a_step"].items(), key=lambda part: -part[1])
    total = sum(seconds for _, seconds in parts) or 1.0
    shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in parts[:4])
    print(f"train: profile: {1000 * total:,.0f} ms a step, {shares}; {run.at(PROFILE)}", flush=True)


def _metrics(run: Run, parts: Parts, pace: CheckpointPace) -> TrainingMetrics:
    training = run.config.training
    metrics = TrainingMetrics(
        run.uri.rsplit("/", 1)[-1],
        run.config.recipe,
        parts.world.size,
        parts.schedules.steps,
        lambda: pace.longest,
        partial(device_memory, parts.world.device),
        first=parts.world.first,
    )
    port = os.environ.get(METRICS_PORT_VARIABLE, training.metrics_port)
    if port is not None:
        print(f"train: metrics on {metrics.serve(int(port))}", flush=True)
    return metrics


def _note_start(run: Run, parts: Parts) -> int:
    """Write into the journal that the run begins or goes on; how often it was started before."""
    before, world = starts(run.store, run.uri), parts.world
    facts = {"steps": parts.schedules.steps, "processes": world.size, "device": world.device.type}
    note(run.store, run.uri, "started", step=parts.position.step, facts=facts)
    return before


def _open_uploads(run: Run, patience: float) -> UploadQueue:
    """Open the run's upload queue and wait until it has stored what an earlier process left in it."""
    uploads = UploadQueue(run.store, run.uri, patience, log=lambda line: print(f"train: {line}", flush=True))
    uploads.wait()
    return uploads


def _checkpointer(
    run: Run, parts: Parts, uploads: UploadQueue, metrics: TrainingMetrics | None, pace: CheckpointPace
) -> Checkpointer:
    training = run.config.training
    retention = Retention(
        training.keep_checkpoints, training.keep_epochs * parts.loader.steps_per_epoch, training.keep_best
    )

    def written(checkpoint: Written) -> None:
        pace.written(checkpoint.seconds)
        if metrics:
            metrics.checkpoint(checkpoint.seconds, checkpoint.bytes)

    return Checkpointer(uploads, retention, written)


def _introduce(parts: Parts) -> None:
    config, world = parts.config, parts.world
    parameters = sum(p.numel() for p in parts.student.parameters())
    tasks = "view + region" if config.objective.region else "view only"
    many = "process" if world.size == 1 else "processes"
    print(
        f"train: {config.model.arch}, {parameters / 1e6:.1f} M parameters with heads, {tasks}; "
        f"{len(parts.loader.dataset):,} images, {config.training.epochs} epochs of {parts.loader.steps_per_epoch} "
        f"steps of {config.training.batch_size}; {world.size} {many} on {world.device.type}, "
        f"{torch.get_num_threads()} threads each, {parts.precision.name} ({parts.precision.reason})",
        flush=True,
    )


def _say_stopped(run: Run, parts: Parts, uploads: UploadQueue, urgent: Urgent) -> None:
    where = "is complete"
    if uploads.wait(0):
        if not urgent.noted:
            note(run.store, run.uri, "stopped", step=parts.position.step, reason="asked to stop")
    else:
        where = f"waits for the store in {uploads.folder}, where the same command on this machine finds it"
    print(f"train: stopped after step {parts.position.step}; the checkpoint {where}", flush=True)


def _say_finished(summary: TrainingSummary) -> None:
    print(
        f"train: done, {summary.steps:,} steps in {format_duration(summary.seconds)} "
        f"({summary.images_per_second:,.0f} images/s); the backbone is at {summary.backbone}",
        flush=True,
    )
