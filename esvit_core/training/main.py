"""A training from start to finish: build or resume the state, train, publish the backbone, write the summary."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from esvit_core.config.auto_choice import count
from esvit_core.launch.kubernetes.presence import MARK_SECONDS, PresenceWatch, unfollowed_seconds
from esvit_core.launch.outcome import report_blocked
from esvit_core.launch.pod_metadata import METRICS_PORT_VARIABLE
from esvit_core.launch.signals import STOPPED_EXIT_CODE, StopRequest
from esvit_core.monitoring.metrics import TrainingMetrics
from esvit_core.monitoring.progress_line import ProgressLine, format_duration
from esvit_core.runs.environment import device_memory, hardware, versions
from esvit_core.runs.events import count_starts, record_event
from esvit_core.runs.gpus import accelerators_setting, require_usable_gpus
from esvit_core.runs.log import LogWriter, read_log
from esvit_core.runs.run import Run, open_run
from esvit_core.runs.training_summary import SUMMARY, TrainingSummary, read_summary
from esvit_core.storage.json_text import encode_json
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.training.allocator import keep_freed_memory
from esvit_core.training.checkpoint import Checkpointer, RetentionPolicy, WrittenCheckpoint
from esvit_core.training.checkpoint_interval import CheckpointInterval
from esvit_core.training.cuda_graphs import compile_and_graph_networks_
from esvit_core.training.distributed.lost_peers import PeerWatch
from esvit_core.training.distributed.processes import init_world
from esvit_core.training.emergency_save import EmergencySave
from esvit_core.training.initial_weights import initial_states
from esvit_core.training.loop import train
from esvit_core.training.metrics_logger import MetricsLogger
from esvit_core.training.nonfinite import NONFINITE, Rollback
from esvit_core.training.profiler import PROFILE, Profile
from esvit_core.training.state import (
    TrainState,
    apply_activation_checkpointing_,
    build_train_state,
    make_deterministic,
)
from esvit_core.weights.backbone import save_backbone


def run_training(run_uri: str, stop: StopRequest) -> int:
    """Train the run at ``run_uri`` in this process, together with the processes that torchrun started beside it.

    Returns:
        Exit code: 0 if the run is finished or nobody follows it, 75 if it was asked to stop.

    Raises:
        UserError: the input is wrong, the loss is not finite, or the teacher has collapsed.
    """
    run = open_run(run_uri)
    if summary := read_summary(run.store, run.uri):
        _print_finished(summary)
        return 0
    require_usable_gpus(accelerators_setting(run.config, "train"))
    if run.config.training.deterministic:
        make_deterministic()
    keep_freed_memory()
    patience = 60 * run.config.training.store_grace_minutes
    world = init_world(patience)
    # Another start of the run may have changed its execution settings since rank 0 read them.
    run = replace(run, config=world.broadcast_object(run.config))
    launch = run.config.launch
    state = build_train_state(run, world)
    if (line := state.loader.check_shared_memory(world.node_processes)) and world.is_main:
        print(f"train: {line}", flush=True)
    if launch.activation_checkpointing:
        apply_activation_checkpointing_(state.student, run.config.model.arch)
    state.blocks = compile_and_graph_networks_(state)
    interval = CheckpointInterval(run.config.training.checkpoint_minutes, is_main=world.is_main)
    metrics = _start_metrics(run, state, interval) if world.is_local_main else None
    uploads = _open_uploads(run, patience) if world.is_main else None
    checkpointer = _build_checkpointer(run, state, uploads, metrics, interval) if uploads else None
    resume(run, state, checkpointer)
    if world.is_main and metrics:
        metrics.started(state.progress.step, _record_start(run, state))
    emergency_save = EmergencySave(run, state, uploads)
    stop.arm(emergency_save.save)
    watch = _watch_follower(run, stop) if world.is_main else None
    try:
        if uploads:
            state.profiler.start(launch.profile_steps, partial(_save_profile, run, uploads))
        finished, last_line = _train(state, uploads, checkpointer, metrics, stop, interval, emergency_save)
    finally:
        if watch:
            watch.stop()
        if metrics and (error := metrics.push()):
            print(f"train: {error}", flush=True)
    if world.is_main and finished:
        _print_finished(finish(run, state, last_line))
    elif uploads:
        _print_stopped(run, state, uploads, emergency_save)
    world.barrier(600 + patience)  # rank 0 may be waiting for the store
    ended = finished or world.broadcast_object(stop.unfollowed and stop.signal is None)
    world.close()
    return 0 if ended else STOPPED_EXIT_CODE


def resume(run: Run, state: TrainState, checkpointer: Checkpointer | None) -> None:
    """Load the newest valid checkpoint; if there is none, load the initial weights and publish them as the baseline.

    Args:
        run: the run.
        state: as built, before the first step.
        checkpointer: of rank 0; None in the other processes.
    """
    progress = state.progress
    restored = None
    if checkpointer:
        restored = checkpointer.restore()
        for reason in checkpointer.skipped:
            print(f"train: {reason}", flush=True)
    if state.world.broadcast_object(restored is not None):
        state.load(restored.states if restored else None)
        progress.resumes.append(progress.step)
    elif run.config.init.source is not None:
        state.load(initial_states(run, state) if checkpointer else None)
    if not checkpointer:
        return
    if restored:
        print(
            f"train: resuming from step {progress.step:,} of {state.schedules.steps:,} "
            f"(checkpoint {restored.location})",
            flush=True,
        )
    else:
        if run.config.training.on_nonfinite == "rollback":
            checkpointer.save(0, state.stateful)  # a rollback before the first checkpoint returns to this one
        save_backbone(run.store, run.at("baseline"), state.teacher.backbone, run.config, _origin(run, state, 0))
    _print_description(state)


def roll_back(state: TrainState, checkpointer: Checkpointer | None) -> None:
    """Return to the last checkpoint and lower the learning rate from there."""
    progress, restored = state.progress, None
    nonfinite, lr_scale = progress.nonfinite, progress.lr_scale * state.config.training.rollback_lr
    if checkpointer:
        checkpointer.wait()
        restored = checkpointer.restore()
    state.load(restored.states if restored else None)
    progress.nonfinite, progress.lr_scale = nonfinite, lr_scale
    progress.resumes.append(progress.step)
    if checkpointer:
        print(f"train: rolled back to step {progress.step:,}; learning rate x {lr_scale:g} from here", flush=True)


def _origin(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Return the entries of ``backbone.json`` that say where the weights come from, and how deep images were read."""
    pixels = getattr(state.loader.dataset, "pixels", {})
    return {"run": run.uri, "step": step, **({"pixels": pixels} if pixels else {})}


def finish(run: Run, state: TrainState, last_line: dict[str, float | int | None]) -> TrainingSummary:
    """Publish the trained teacher, then write the summary, which marks the run as finished."""
    progress, world = state.progress, state.world
    backbone = run.at("backbone")
    save_backbone(run.store, backbone, state.teacher.backbone, run.config, _origin(run, state, progress.step))
    if not last_line:  # an earlier process trained to the end, but did not finish the run
        last_line = (read_log(run.store, run.uri) or [{}])[-1]
    summary = TrainingSummary(
        steps=progress.step,
        epochs=run.config.training.epochs,
        images=progress.images,
        seconds=round(progress.seconds, 1),
        images_per_second=round(progress.images / max(progress.seconds, 1e-9), 1),
        final_loss=float(last_line.get("loss") or 0.0),
        precision=state.precision.name,
        processes=world.size,
        threads=torch.get_num_threads(),
        resumes=progress.resumes,
        backbone=backbone,
        versions=versions(),
        hardware=hardware(),
    )
    run.store.put_json(run.at(SUMMARY), summary.as_json())
    return summary


def _train(
    state: TrainState,
    uploads: UploadQueue | None,
    checkpointer: Checkpointer | None,
    metrics: TrainingMetrics | None,
    stop: StopRequest,
    interval: CheckpointInterval,
    emergency_save: EmergencySave,
) -> tuple[bool, dict[str, float | int | None]]:
    """Run the training loop, again after each rollback; return whether it finished, and the last line of the log."""
    log = emergency_save.log = LogWriter(uploads) if uploads else None
    if uploads:
        state.guard.on_record = partial(_save_nonfinite, uploads, metrics)
    steps = state.schedules.steps
    peers = PeerWatch(state.world.sockets, partial(_on_lost_peer, stop, emergency_save))
    try:
        while True:
            line = ProgressLine(steps, unit="steps", label="train", initial=state.progress.step) if log else None
            logger = MetricsLogger(state, log, metrics, line)
            try:
                finished = train(state, logger, checkpointer, stop, interval)
                break
            except Rollback:
                roll_back(state, checkpointer)
                if log:
                    log.begin_attempt()
        if line:
            line.close()
    finally:
        peers.stop()  # the main thread is not blocked, and other processes may end
        if log and uploads and checkpointer:
            log.flush()
            checkpointer.wait(stop.seconds_left())
            uploads.close(stop.seconds_left())
    return finished, logger.last_line


def _on_lost_peer(stop: StopRequest, emergency_save: EmergencySave) -> None:
    """End this process after the grace, if the main thread does not notice the loss itself."""
    stop.lost_peer(report_blocked)
    emergency_save.flush()


def _save_nonfinite(uploads: UploadQueue, metrics: TrainingMetrics | None, record: dict[str, Any]) -> None:
    if metrics:
        metrics.nonfinite()
    name = f"{NONFINITE}/{record['step']:08d}-{int(record['time'] * 1000)}.json"
    print(f"train: step {record['step']:,} was not finite ({record['action']}): {name}", flush=True)
    uploads.put(name, encode_json(record))


def _save_profile(run: Run, uploads: UploadQueue, profile: Profile) -> None:
    uploads.put(f"{PROFILE}/summary.json", encode_json(profile.summary))
    uploads.put(f"{PROFILE}/trace.json.gz", profile.trace)
    parts = sorted(profile.summary["seconds_a_step"].items(), key=lambda part: -part[1])
    total = sum(seconds for _, seconds in parts) or 1.0
    shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in parts[:4])
    print(f"train: profile: {1000 * total:,.0f} ms a step, {shares}; {run.at(PROFILE)}", flush=True)


def _start_metrics(run: Run, state: TrainState, interval: CheckpointInterval) -> TrainingMetrics:
    training = run.config.training
    metrics = TrainingMetrics(
        run.uri.rsplit("/", 1)[-1],
        run.config.recipe,
        state.world.size,
        state.schedules.steps,
        lambda: interval.longest,
        partial(device_memory, state.world.device),
        is_main=state.world.is_main,
    )
    metrics.describe(state.world.device.type, state.precision.name, state.objective.strategy.form)
    port = os.environ.get(METRICS_PORT_VARIABLE, training.metrics_port)
    if port is not None:
        print(f"train: metrics on {metrics.serve(int(port))}", flush=True)
    return metrics


def _record_start(run: Run, state: TrainState) -> int:
    """Record in the event log that the training starts or resumes; return how often it was started before."""
    before, world = count_starts(run.store, run.uri), state.world
    facts = {"steps": state.schedules.steps, "processes": world.size, "device": world.device.type}
    record_event(run.store, run.uri, "started", step=state.progress.step, facts=facts)
    return before


def _watch_follower(run: Run, stop: StopRequest) -> PresenceWatch | None:
    """Watch whether a step follows this training, in a job on a cluster."""
    seconds = unfollowed_seconds()
    if seconds is None:
        return None

    def end() -> None:
        print(
            f"train: no step has followed this job for {format_duration(seconds)} (launch.unfollowed_minutes); ending it with "
            "a checkpoint",
            flush=True,
        )
        stop.nobody_follows()

    return PresenceWatch(run.store, run.uri, seconds, end, min(MARK_SECONDS, seconds / 4)).start()


def _open_uploads(run: Run, patience: float) -> UploadQueue:
    """Open the run's upload queue and wait until it has stored what an earlier process left in it."""
    uploads = UploadQueue(run.store, run.uri, patience, log=lambda line: print(f"train: {line}", flush=True))
    uploads.wait()
    return uploads


def _build_checkpointer(
    run: Run, state: TrainState, uploads: UploadQueue, metrics: TrainingMetrics | None, interval: CheckpointInterval
) -> Checkpointer:
    training = run.config.training
    retention = RetentionPolicy(
        training.keep_checkpoints, training.keep_epochs * state.loader.steps_per_epoch, training.keep_best
    )

    def on_written(checkpoint: WrittenCheckpoint) -> None:
        interval.written(checkpoint.seconds)
        if metrics:
            metrics.checkpoint(checkpoint.seconds, checkpoint.bytes)

    return Checkpointer(uploads, retention, on_written)


def _print_description(state: TrainState) -> None:
    config, world = state.config, state.world
    parameters = sum(p.numel() for p in state.student.parameters())
    tasks = "view + region" if config.objective.region else "view only"
    processes = "process" if world.size == 1 else "processes"
    print(
        f"train: {config.model.arch}, {parameters / 1e6:.1f} M parameters with heads, {tasks}; "
        f"{len(state.loader.dataset):,} images, {config.training.epochs} epochs of {state.loader.steps_per_epoch} "
        f"steps of {config.training.batch_size}; {world.size} {processes} on {world.device.type}, "
        f"{count(torch.get_num_threads(), 'thread')} each, {state.precision.name} ({state.precision.reason}); "
        f"objective: {state.objective.strategy.name}; "
        + (f"{state.blocks}; " if state.blocks else "")
        + "data loading: "
        + (f"{state.loader.workers} workers per process" if state.loader.workers else "in the training process"),
        flush=True,
    )


def _print_stopped(run: Run, state: TrainState, uploads: UploadQueue, emergency_save: EmergencySave) -> None:
    status = "is complete"
    if uploads.wait(0):
        if not emergency_save.stop_recorded:
            record_event(run.store, run.uri, "stopped", step=state.progress.step, reason="asked to stop")
    else:
        status = f"waits for the store in {uploads.folder}, where the same command on this machine finds it"
    print(f"train: stopped after step {state.progress.step}; the checkpoint {status}", flush=True)


def _print_finished(summary: TrainingSummary) -> None:
    print(
        f"train: done, {summary.steps:,} steps in {format_duration(summary.seconds)} "
        f"({summary.images_per_second:,.0f} images/s); the backbone is at {summary.backbone}",
        flush=True,
    )
