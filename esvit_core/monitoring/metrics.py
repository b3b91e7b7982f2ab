"""The metrics of a training for Prometheus, served on ``/metrics``; docs/monitoring.md describes each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    push_to_gateway,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from esvit_core.errors import UserError
from esvit_core.storage.retry import failed_requests

ADDRESS_VARIABLE = "ESVIT_METRICS_ADDRESS"
PUSH_VARIABLE = "ESVIT_PUSHGATEWAY"
JOB = "esvit"
LABELS = ("run", "recipe")
STEP_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3.5, 5, 7.5, 10, 20, 60)
CHECKPOINT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES = {
    "lr": ("esvit_train_learning_rate", "Learning rate of the last step."),
    "weight_decay": ("esvit_train_weight_decay", "Weight decay of the last step."),
    "teacher_temp": ("esvit_train_teacher_temperature", "Temperature of the teacher's softmax."),
    "teacher_momentum": ("esvit_train_teacher_momentum", "Momentum of the moving-average teacher."),
    "grad_norm": ("esvit_train_gradient_norm", "Norm of the student's gradient before clipping."),
    "images_per_second": ("esvit_train_images_per_second", "Images a second over all processes."),
    "data_wait": ("esvit_train_data_wait_ratio", "Share of the time spent waiting for data, 0 to 1."),
    "epoch": ("esvit_train_epoch", "Epoch, counted from 0."),
    "feature_std": ("esvit_teacher_feature_std", "Spread of the teacher's unit view features, 0 to 1."),
    "feature_rank": ("esvit_teacher_feature_rank", "Effective rank (RankMe) of the teacher's view features."),
    "mutual_matches": ("esvit_region_mutual_match_ratio", "Share of regions whose best match is mutual, 0 to 1."),
}
# Gauges of the view and of the region task, with the label `level`; the keys of the log end in _view and _region.
_LEVEL_GAUGES = {
    "entropy": ("esvit_teacher_entropy_nats", "Entropy of the teacher's mean distribution."),
    "kl": ("esvit_teacher_kl_nats", "Mean divergence of the teacher's distributions from their mean."),
    "student_kl": ("esvit_student_teacher_kl_nats", "Mean divergence of the student's distribution from its target."),
    "prototypes": ("esvit_teacher_prototypes_in_use", "Prototypes that are the teacher's first choice somewhere."),
    "center_norm": ("esvit_teacher_center_norm", "Norm of the center of the teacher's logits."),
}
_TERMS = {"loss": "total", "loss_view": "view", "loss_region": "region"}


class TrainingMetrics:
    """The metrics of one run in the first process of a node.

    All labels have a fixed set of values, so the number of series does not grow with the length of a run.

    Args:
        run: id of the run.
        recipe: name of its recipe.
        world_size: number of training processes.
        total_steps: steps of the whole run.
        checkpoint_seconds: returns the longest time planned between two checkpoints; called at every scrape.
        memory: returns the device's memory in bytes by kind (used, peak, total); called at every scrape.
        is_main: whether this is rank 0. Other nodes export metrics of their node only, because metrics of the whole
            run would otherwise exist several times.
    """

    def __init__(
        self,
        run: str,
        recipe: str,
        world_size: int,
        total_steps: int,
        checkpoint_seconds: Callable[[], float] = lambda: 900.0,
        memory: Callable[[], Mapping[str, float]] | None = None,
        is_main: bool = True,
    ) -> None:
        self.registry = node = CollectorRegistry()
        whole = node if is_main else CollectorRegistry()
        self._labels = {"run": run, "recipe": recipe}
        self._started = time.time()
        self._saved: float | None = None

        ProcessCollector(registry=node)
        node.register(_ScrapeCollector(tuple(self._labels.values()), memory))
        self._step_seconds = self._histogram(node, "esvit_train_step_seconds", "Time of a training step.", STEP_BUCKETS)
        self._wait_seconds = self._counter(node, "esvit_train_data_wait_seconds", "Time spent waiting for data.")
        self._images = self._counter(node, "esvit_train_images", "Images trained on by the processes of this node.")

        self._restarts = self._counter(whole, "esvit_train_restarts", "Times that the run was started again.")
        self._nonfinite = self._counter(
            whole, "esvit_train_nonfinite_steps", "Steps whose loss or gradient was not finite."
        )
        self._step = self._gauge(whole, "esvit_train_step", "Steps done.")
        self._gauge(whole, "esvit_train_steps_planned", "Steps of the whole run.").set(total_steps)
        self._gauge(whole, "esvit_train_world_size", "Processes that train.").set(world_size)
        self._info = Gauge(
            "esvit_train_info",
            "Device, precision and form of the objective; always 1.",
            (*LABELS, "device", "precision", "objective"),
            registry=whole,
        )
        self._figures = {key: self._gauge(whole, name, text) for key, (name, text) in _GAUGES.items()}
        self._loss = Gauge("esvit_train_loss", "Loss.", (*LABELS, "term"), registry=whole)
        self._levels = {
            key: Gauge(name, text, (*LABELS, "level"), registry=whole) for key, (name, text) in _LEVEL_GAUGES.items()
        }
        self._warnings = Counter(
            "esvit_train_warnings", "Warnings of the diagnostics.", (*LABELS, "sign"), registry=whole
        )
        self._checkpoint_seconds = self._histogram(
            whole, "esvit_checkpoint_seconds", "Time to write a checkpoint.", CHECKPOINT_BUCKETS
        )
        self._checkpoint_bytes = self._gauge(whole, "esvit_checkpoint_bytes", "Size of the last checkpoint.")
        self._gauge(
            whole, "esvit_checkpoint_interval_seconds", "Longest time planned between two checkpoints."
        ).set_function(checkpoint_seconds)
        self._gauge(
            whole, "esvit_checkpoint_age_seconds", "Time since the last checkpoint, or since the start."
        ).set_function(lambda: time.time() - (self._saved or self._started))

    def describe(self, device: str, precision: str, objective: str) -> None:
        """Export how the run computes: type of the device, precision, and form of the objective."""
        self._info.labels(**self._labels, device=device, precision=precision, objective=objective).set(1)

    def started(self, step: int, restarts: int) -> None:
        """Set the step from which the training starts or resumes, and the number of restarts so far."""
        self._step.set(step)
        self._restarts.inc(restarts)

    def step(self, step: int, seconds: float, wait_seconds: float, images: float) -> None:
        """Count one step.

        Args:
            step: number of steps done.
            seconds: since the end of the step before, including waiting.
            wait_seconds: part of ``seconds`` spent waiting for data.
            images: number of images that this node's processes trained on.
        """
        self._step.set(step)
        self._step_seconds.observe(seconds)
        self._wait_seconds.inc(wait_seconds)
        self._images.inc(images)

    def line(self, line: Mapping[str, float | int | None]) -> None:
        """Update the gauges from a line of the log."""
        for key, value in line.items():
            if value is None:
                continue
            figure, _, level = key.rpartition("_")
            if key in self._figures:
                self._figures[key].set(value)
            elif key in _TERMS:
                self._loss.labels(**self._labels, term=_TERMS[key]).set(value)
            elif figure in self._levels:
                self._levels[figure].labels(**self._labels, level=level).set(value)

    def warned(self, sign: str) -> None:
        """Count a warning of the diagnostic ``sign``, such as ``entropy_view``."""
        self._warnings.labels(**self._labels, sign=sign).inc()

    def nonfinite(self, steps: int = 1) -> None:
        """Count steps whose loss or gradient was not finite."""
        self._nonfinite.inc(steps)

    def checkpoint(self, seconds: float, size: int) -> None:
        """Record that a checkpoint of ``size`` bytes is complete."""
        self._saved = time.time()
        self._checkpoint_seconds.observe(seconds)
        self._checkpoint_bytes.set(size)

    def serve(self, port: int) -> str:
        """Serve ``/metrics`` from a thread; return the address.

        The server listens on the loopback interface, or on all interfaces in a pod, because Prometheus scrapes the
        pod's address; ``ESVIT_METRICS_ADDRESS`` overrides this.

        Args:
            port: 0 for any free port.

        Raises:
            UserError: the port is in use.
        """
        in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
        address = os.environ.get(ADDRESS_VARIABLE, "0.0.0.0" if in_pod else "127.0.0.1")
        try:
            server, _ = start_http_server(port, address, registry=self.registry)
        except OSError as error:
            raise UserError(
                f"training.metrics_port {port}: cannot listen on {address} ({error.strerror}); "
                "choose another port, or 0 for any free port"
            ) from None
        return f"http://{address}:{server.server_port}/metrics"

    def push(self) -> str | None:
        """Push the last metrics to the Pushgateway in ``ESVIT_PUSHGATEWAY``, if it is set.

        This is for runs that end before Prometheus scrapes them. A finished training does not fail if the push fails.

        Returns:
            Why the push failed; None if it succeeded.
        """
        if gateway := os.environ.get(PUSH_VARIABLE):
            try:
                push_to_gateway(gateway, JOB, self.registry, grouping_key={"run": self._labels["run"]}, timeout=5)
            except (OSError, ValueError) as error:
                return f"{PUSH_VARIABLE}={gateway}: the last metrics could not be pushed ({error})"
        return None

    def _gauge(self, registry: CollectorRegistry, name: str, text: str) -> Gauge:
        return Gauge(name, text, LABELS, registry=registry).labels(**self._labels)

    def _counter(self, registry: CollectorRegistry, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=registry).labels(**self._labels)

    def _histogram(self, registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, LABELS, registry=registry, buckets=buckets).labels(**self._labels)


class _ScrapeCollector(Collector):
    """Metrics that are read at every scrape."""

    def __init__(self, labels: tuple[str, ...], memory: Callable[[], Mapping[str, float]] | None) -> None:
        self._labels, self._memory = labels, memory

    def collect(self) -> Iterator[Metric]:
        errors = CounterMetricFamily(
            "esvit_store_errors",
            "Requests to the object store that failed and were repeated.",
            labels=(*LABELS, "kind"),
        )
        for kind, number in failed_requests().items():
            errors.add_metric((*self._labels, kind), number)
        yield errors
        if self._memory is not None:
            memory = GaugeMetricFamily(
                "esvit_train_device_memory_bytes", "Memory of the training device.", labels=(*LABELS, "kind")
            )
            for kind, size in self._memory().items():
                memory.add_metric((*self._labels, kind), size)
            yield memory
