"""The step beside its job on the cluster: creates it or finds it, follows it, and ends as it ends."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from esvit_core.config import Config
from esvit_core.errors import TRY_AGAIN_EXIT_CODE, InfrastructureError, UserError
from esvit_core.launch.interrupt import Signals, keep_signal_handlers
from esvit_core.launch.kubernetes.client import Cluster, Kind, State, UnreachableError
from esvit_core.launch.kubernetes.failures import Failures
from esvit_core.launch.kubernetes.log_relay import REATTACH_SECONDS, LogRelay
from esvit_core.launch.kubernetes.train_job import TrainJob
from esvit_core.launch.kubernetes.training_pod import GRACE_SECONDS, RUN_ANNOTATION, job_name
from esvit_core.launch.kubernetes.volcano import Volcano
from esvit_core.launch.outcome import Outcome, conclude
from esvit_core.runs.training_summary import read_summary
from esvit_core.storage import ObjectStore

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 1800.0  # with an API that does not answer: the training does not need it
REMOVAL_SECONDS = 300.0  # that an earlier job may take to go
LAST_RUNNING = "esvit.dev/last-running"  # annotation of the job: a repeated step goes on counting the wait from it
NOTE_INTERVAL = timedelta(minutes=10)


class Backend(Protocol):
    """Who runs the job: what is created, and how it is read."""

    kind: Kind

    def objects(self, run_uri: str, config: Config, owner: dict[str, Any] | None) -> list[tuple[Kind, dict[str, Any]]]:
        """What is created, the job last."""

    def state(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> State: ...

    def says(self, job: dict[str, Any]) -> str:
        """The state in the API's own words."""

    def selector(self, name: str) -> str:
        """Of the job's pods, by their labels."""

    def first_pod(self, pods: list[dict[str, Any]]) -> dict[str, Any] | None:
        """That of rank 0."""

    def why_waiting(self, cluster: Cluster, job: dict[str, Any], pods: list[dict[str, Any]]) -> str:
        """In one line; empty when nobody says."""


def launch_on_cluster(store: ObjectStore, run_uri: str, config: Config) -> None:
    """Train the run in a job of several pods, and wait for it.

    A job of this run that is there already is followed: the step before this one has started it.

    Args:
        store: where the run is.
        run_uri: ``s3://bucket/runs/<id>``.
        config: of the run; its ``launch`` says how.

    Raises:
        UserError: the training failed because of the input, the cluster does not let it in, or has had no room for
            longer than ``launch.pending_minutes``.
        InfrastructureError: the cluster or the training's surroundings failed.
        CrashError: the training failed unexpectedly.
        SystemExit: SIGINT or SIGTERM arrived. The job is deleted; its pods have left a checkpoint.
    """
    launch = config.launch
    if config.training.batch_size < (processes := launch.nodes * config.node_processes):
        raise UserError(
            f"training.batch_size {config.training.batch_size}: expected at least launch.nodes times the processes of "
            f"each, {processes}; change one"
        )
    with keep_signal_handlers():
        follower = Follower(Cluster(launch.namespace), backend(config), store, run_uri, config, Signals())
        outcome = follower.run()
    conclude(store, run_uri, outcome)


def backend(config: Config) -> Backend:
    """The one that the configuration names."""
    return TrainJob() if config.launch.scheduler == "trainjob" else Volcano()


class Follower:
    """Follows one job from its creation to its end.

    Args:
        cluster, backend: where and by whom it is run.
        store, run_uri, config: what is trained.
        stop: the signals that ask for a stop.
    """

    def __init__(
        self, cluster: Cluster, backend: Backend, store: ObjectStore, run_uri: str, config: Config, stop: Signals
    ) -> None:
        self._cluster, self._backend, self._stop = cluster, backend, stop
        self._store, self._run_uri, self._config = store, run_uri, config
        self._name = job_name(run_uri)
        self._failures = Failures()
        self._told: dict[str, str] = {}
        self._seen_running: datetime | None = None
        self._noted: datetime | None = None
        self._answered = time.monotonic()

    def run(self) -> Outcome:
        """Until the job has ended, or a signal has ended it."""
        created = self._begin()
        if self._stop.first and created is None:
            return Outcome(self._stop.first)
        threading.Thread(target=self._delete_at_once, daemon=True).start()
        log = LogRelay(self._cluster, 1e6 if created else REATTACH_SECONDS)
        try:
            while True:
                if self._stop.first:
                    return self._cancel(log)
                try:
                    if outcome := self._look(log):
                        return outcome
                    self._answered = time.monotonic()
                except UnreachableError as error:
                    self._unreachable(error)
                self._stop.sleep(POLL_SECONDS)
        finally:
            log.drain(0)

    def _begin(self) -> bool | None:
        """Whether the job was created here; None when a signal came first."""
        deadline = time.monotonic() + REMOVAL_SECONDS
        while not self._stop.first:
            try:
                job = self._cluster.get(self._backend.kind, self._name)
                if job is None:
                    if self._create():
                        return True
                elif self._find(job):
                    return False
            except UnreachableError as error:
                self._unreachable(error)
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"launch: the earlier {self._title} is still there; expected it to be gone within "
                    f"{REMOVAL_SECONDS:g} s of being deleted; look for pods that do not end"
                )
            self._stop.sleep(POLL_SECONDS)
        return None

    def _create(self) -> bool:
        owner = self._cluster.owner()
        created = [self._cluster.create(*one) for one in self._backend.objects(self._run_uri, self._config, owner)]
        if created[-1]:
            launch = self._config.launch
            nodes = (
                str(launch.nodes) if launch.fewest_nodes == launch.nodes else f"{launch.fewest_nodes} to {launch.nodes}"
            )
            self._say(
                "begin", f"created the {self._title}: nodes {nodes}, processes on each {self._config.node_processes}"
            )
        return created[-1]  # otherwise somebody was faster: what is there now is looked at

    def _find(self, job: dict[str, Any]) -> bool:
        """Whether this job is to be followed; one that has ended makes room for another."""
        metadata = job["metadata"]
        if (other := metadata.get("annotations", {}).get(RUN_ANNOTATION)) != self._run_uri:
            raise UserError(
                f"launch: the {self._title} is of another run, {other}; delete it, or name this run otherwise"
            )
        pods = self._cluster.pods(self._backend.selector(self._name))
        state = self._backend.state(job, pods)
        if metadata.get("deletionTimestamp"):
            self._say("begin", f"waiting for the earlier {self._title} to go")
        elif state.ended:
            self._failures.observe(pods)
            why = "" if state is State.SUCCEEDED else f": {self._failures.outcome(self._backend.says(job)).reason}"
            self._failures = Failures()
            self._say("begin", f"the earlier {self._title} has {state.value}{why}; another goes on where it was")
            self._cluster.delete(self._backend.kind, self._name)
        else:
            if owner := self._cluster.owner():
                self._cluster.patch_metadata(self._backend.kind, self._name, {"ownerReferences": [owner]})
            self._say("begin", f"found the {self._title}, {self._backend.says(job) or 'just created'}: following it")
            return True
        return False

    def _look(self, log: LogRelay) -> Outcome | None:
        """At the job and its pods, once; the outcome when it has ended."""
        job = self._cluster.get(self._backend.kind, self._name)
        if job is None or job["metadata"].get("deletionTimestamp"):
            log.drain(GRACE_SECONDS)
            if read_summary(self._store, self._run_uri):  # removed some time after its end
                return Outcome()
            return Outcome(
                reason=f"training: the {self._title} was deleted by somebody else; "
                "the same command again goes on from the last checkpoint",
                exit_code=TRY_AGAIN_EXIT_CODE,
            )
        pods = self._cluster.pods(self._backend.selector(self._name))
        state = self._backend.state(job, pods)
        log.follow(self._backend.first_pod(pods))
        running = sum(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        for failure in self._failures.observe(pods):
            if not state.ended:
                self._say(failure.pod, f"pod {failure.pod}: {failure.reason}")
        if state is State.WAITING:
            self._wait(job, pods)
        else:
            if state is State.RUNNING:
                self._note_running()
            many = "pod" if running == 1 else "pods"
            self._say("state", f"the {self._title}: {state.value}" + f", {running} {many} running" * (not state.ended))
        if not state.ended:
            return None
        log.drain(10)
        return self._ended(state, job)

    def _ended(self, state: State, job: dict[str, Any]) -> Outcome:
        says = self._backend.says(job)
        if state is State.SUCCEEDED:
            return Outcome()
        if state is State.CANCELLED:
            reason = f"training: the {self._title} was aborted by somebody else ({says})"
            return Outcome(reason=reason, exit_code=TRY_AGAIN_EXIT_CODE)
        outcome = self._failures.outcome(says)
        if outcome.last_words:
            print(outcome.last_words, file=sys.stderr, flush=True)
        return outcome

    def _wait(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        """Say what the job waits for, and end it when it has waited for as long as it may.

        The wait counts from the last time that the job ran, or from its creation. A repeated step, and a job that
        restarts without ever running, do not begin it anew.

        Raises:
            UserError: the job has waited longer than ``launch.pending_minutes``.
        """
        waited = datetime.now(UTC) - self._idle_since(job)
        try:
            why = _stuck(pods) or self._backend.why_waiting(self._cluster, job, pods)
        except UserError as error:  # a right that is missing for the reason only
            why = str(error)
        self._say("state", f"the {self._title}: waiting{': ' * bool(why)}{why}")
        bound = self._config.launch.pending_minutes
        if bound is not None and waited > timedelta(minutes=bound):
            self._cluster.delete(self._backend.kind, self._name)
            raise UserError(
                f"launch: the {self._title} has waited for {bound:g} minutes, as long as launch.pending_minutes lets it"
                f"{f' ({why})' if why else ''}; ask for less, make room, or let it wait longer"
            )

    def _delete_at_once(self) -> None:
        """Delete the job as soon as a signal arrives, whatever the follower waits for at that moment.

        Kubeflow ends the container of a stopped step within a second or so; a job that is not deleted by then goes on.
        """
        self._stop.stopped.wait()
        with contextlib.suppress(UnreachableError, UserError):  # the follower itself asks again, if it still can
            if not self._only_moved():
                self._cluster.delete(self._backend.kind, self._name)

    def _only_moved(self) -> bool:
        """Whether the signal came because this pod is deleted, and not because the run is stopped."""
        try:
            return self._cluster.leaving()
        except (UnreachableError, UserError):
            return False

    def _idle_since(self, job: dict[str, Any]) -> datetime:
        metadata = job["metadata"]
        noted = metadata.get("annotations", {}).get(LAST_RUNNING)
        known = [_time(text) for text in (metadata["creationTimestamp"], noted) if text]
        return max([*known, *([self._seen_running] if self._seen_running else [])])

    def _note_running(self) -> None:
        """Remember that the job runs, now and then in the job itself."""
        self._seen_running = now = datetime.now(UTC)
        if self._noted is None or now - self._noted > NOTE_INTERVAL:
            annotation = {LAST_RUNNING: now.isoformat(timespec="seconds")}
            self._cluster.patch_metadata(self._backend.kind, self._name, {"annotations": annotation})
            self._noted = now

    def _cancel(self, log: LogRelay) -> Outcome:
        """Delete the job and wait for its pods, which write a checkpoint; a second signal ends the waiting.

        Where only this pod is deleted, the job stays for the step that is started again.
        """
        if self._only_moved():
            print(f"train: this pod is being deleted; the {self._title} goes on, for the repeated step", flush=True)
            return Outcome(self._stop.first)
        print("train: stopping, writing a checkpoint (once more: stop at once)", flush=True)
        deadline, deleted = time.monotonic() + GRACE_SECONDS + 15, False
        while time.monotonic() < deadline and self._stop.count < 2:
            try:
                if not deleted:
                    self._cluster.delete(self._backend.kind, self._name)
                    deleted = True
                if not self._cluster.pods(self._backend.selector(self._name)):
                    break
            except UnreachableError as error:
                self._unreachable(error)
            self._stop.sleep(POLL_SECONDS)
        log.drain(0 if self._stop.count > 1 else 5)
        return Outcome(self._stop.first)

    def _unreachable(self, error: UnreachableError) -> None:
        self._say("api", f"{error}; asking again, the training does not need it")
        if time.monotonic() - self._answered > PATIENCE_SECONDS:
            raise InfrastructureError(
                f"launch: {error}, for {PATIENCE_SECONDS / 60:g} minutes; the same command again follows it"
            )

    @property
    def _title(self) -> str:
        return f"{self._backend.kind.name} {self._cluster.namespace}/{self._name}"

    def _say(self, topic: str, line: str) -> None:
        """Print what is new of a topic."""
        if self._told.get(topic) != line:
            self._told[topic] = line
            print(f"train: {line}", flush=True)


def _time(text: str) -> datetime:
    """A time as Kubernetes writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _stuck(pods: list[dict[str, Any]]) -> str:
    """What keeps a pod that has a node from starting: an image or a secret that is not there."""
    for pod in pods:
        for container in pod.get("status", {}).get("containerStatuses", []):
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return f"pod {pod['metadata']['name']}: {waiting['reason']}: {waiting.get('message', '')}".strip(": ")
    return ""
