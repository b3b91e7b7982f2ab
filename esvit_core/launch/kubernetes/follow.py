"""Create or find the training job of a step, follow it, and end as it ends."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from esvit_core.config import Config
from esvit_core.errors import TRY_AGAIN_EXIT_CODE, InfrastructureError, UserError
from esvit_core.launch.kubernetes.client import Cluster, Kind, State, UnreachableError
from esvit_core.launch.kubernetes.failures import Failures
from esvit_core.launch.kubernetes.log_relay import REATTACH_SECONDS, LogRelay
from esvit_core.launch.kubernetes.presence import marked_presence
from esvit_core.launch.kubernetes.train_job import TrainJob
from esvit_core.launch.kubernetes.training_pod import RUN_ANNOTATION, job_name
from esvit_core.launch.kubernetes.volcano import Volcano
from esvit_core.launch.outcome import Outcome, conclude
from esvit_core.launch.signals import JOB_SECONDS, POD_SECONDS, RESCHEDULED_SECONDS, SignalCounter, restored_handlers
from esvit_core.runs.training_summary import read_summary
from esvit_core.storage import ObjectStore

POLL_SECONDS = 2.0
API_OUTAGE_SECONDS = 1800.0  # the API may fail to answer for so long: the training does not need it
REMOVAL_SECONDS = 300.0  # an earlier job may take so long to be deleted
LAST_RUNNING = "esvit.dev/last-running"  # annotation of the job, from which a repeated step counts the waiting time
ANNOTATION_INTERVAL = timedelta(minutes=10)


class Backend(Protocol):
    """A scheduler of training jobs: creates their objects and reads their state."""

    kind: Kind

    def objects(self, run_uri: str, config: Config, owner: dict[str, Any] | None) -> list[tuple[Kind, dict[str, Any]]]:
        """Return the objects to create, the job last."""

    def state(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> State: ...

    def message(self, job: dict[str, Any]) -> str:
        """Return the state in the API's words."""

    def selector(self, name: str) -> str:
        """Return the label selector of the job's pods."""

    def first_pod(self, pods: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the pod of rank 0."""

    def waiting_reason(self, cluster: Cluster, job: dict[str, Any], pods: list[dict[str, Any]]) -> str:
        """Return why the job waits, in one line; empty if not known."""


def launch_on_cluster(store: ObjectStore, run_uri: str, config: Config) -> None:
    """Train the run in a job of several pods, and wait for it.

    If a job of this run exists, because an earlier attempt of the step created it, that job is followed.

    Args:
        store: object store of the run.
        run_uri: ``s3://bucket/runs/<id>``.
        config: of the run.

    Raises:
        UserError: the training failed because of the input, the cluster rejected the job, or the job found no room for
            longer than ``launch.pending_minutes``.
        InfrastructureError: the cluster, the store or a node failed.
        CrashError: the training failed unexpectedly.
        SystemExit: SIGINT or SIGTERM arrived. The job was deleted, and its pods wrote a checkpoint.
    """
    launch = config.launch
    if config.training.batch_size < (processes := launch.nodes * config.node_processes):
        raise UserError(
            f"training.batch_size {config.training.batch_size}: expected at least launch.nodes times the processes of "
            f"each, {processes}; change one"
        )
    with restored_handlers():
        follower = Follower(Cluster(launch.namespace), backend(config), store, run_uri, config, SignalCounter())
        outcome = follower.run()
    conclude(store, run_uri, outcome)


def backend(config: Config) -> Backend:
    """Return the backend of ``launch.scheduler``."""
    return TrainJob() if config.launch.scheduler == "trainjob" else Volcano()


class Follower:
    """Follows one job from its creation to its end.

    Args:
        cluster, backend: where the job runs, and its scheduler.
        store, run_uri, config: the run.
        stop: signals that request a stop.
    """

    def __init__(
        self, cluster: Cluster, backend: Backend, store: ObjectStore, run_uri: str, config: Config, stop: SignalCounter
    ) -> None:
        self._cluster, self._backend, self._stop = cluster, backend, stop
        self._store, self._run_uri, self._config = store, run_uri, config
        self._name = job_name(run_uri)
        self._failures = Failures()
        self._printed: dict[str, str] = {}
        self._last_running: datetime | None = None
        self._annotated: datetime | None = None
        self._last_answer = time.monotonic()
        self._only_rescheduled = False
        self._decided = threading.Event()

    def run(self) -> Outcome:
        """Follow the job until it ends, or until a signal requests a stop."""
        created = self._begin()
        if self._stop.first and created is None:
            return Outcome(self._stop.first)
        threading.Thread(target=self._delete_at_once, daemon=True).start()
        with marked_presence(self._store, self._run_uri):
            return self._follow(LogRelay(self._cluster, 1e6 if created else REATTACH_SECONDS))

    def _follow(self, log: LogRelay) -> Outcome:
        try:
            while True:
                if self._stop.first:
                    return self._cancel(log)
                try:
                    if outcome := self._poll(log):
                        return outcome
                    self._last_answer = time.monotonic()
                except UnreachableError as error:
                    self._unreachable(error)
                self._stop.sleep(POLL_SECONDS)
        finally:
            log.drain(0)

    def _begin(self) -> bool | None:
        """Return whether the job was created now (True) or found (False); None if a signal arrived first."""
        deadline = time.monotonic() + REMOVAL_SECONDS
        while not self._stop.first:
            try:
                job = self._cluster.get(self._backend.kind, self._name)
                if job is None:
                    if self._create():
                        return True
                elif self._adopt(job):
                    return False
            except UnreachableError as error:
                self._unreachable(error)
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"launch: the earlier {self._title} still exists {REMOVAL_SECONDS:g} s after it was deleted; "
                    "check for pods that do not terminate"
                )
            self._stop.sleep(POLL_SECONDS)
        return None

    def _create(self) -> bool:
        owner = self._cluster.owner()
        created = [self._cluster.create(*item) for item in self._backend.objects(self._run_uri, self._config, owner)]
        if created[-1]:
            launch = self._config.launch
            nodes = (
                str(launch.nodes) if launch.fewest_nodes == launch.nodes else f"{launch.fewest_nodes} to {launch.nodes}"
            )
            self._print(
                "begin", f"created the {self._title}: nodes {nodes}, processes on each {self._config.node_processes}"
            )
        return created[-1]  # False: somebody else created it first, and the next poll finds it

    def _adopt(self, job: dict[str, Any]) -> bool:
        """Return whether to follow this job; a job that has ended is deleted."""
        metadata = job["metadata"]
        if (other := metadata.get("annotations", {}).get(RUN_ANNOTATION)) != self._run_uri:
            raise UserError(
                f"launch: the {self._title} is of another run, {other}; delete it, or give this run another name"
            )
        pods = self._cluster.pods(self._backend.selector(self._name))
        state = self._backend.state(job, pods)
        if metadata.get("deletionTimestamp"):
            self._print("begin", f"waiting until the earlier {self._title} is deleted")
        elif state.ended:
            self._failures.observe(pods)
            reason = (
                "" if state is State.SUCCEEDED else f": {self._failures.outcome(self._backend.message(job)).reason}"
            )
            self._failures = Failures()
            self._print(
                "begin", f"the earlier {self._title} has {state.value}{reason}; a new job resumes from its checkpoint"
            )
            self._cluster.delete(self._backend.kind, self._name)
        else:
            if owner := self._cluster.owner():
                self._cluster.patch_metadata(self._backend.kind, self._name, {"ownerReferences": [owner]})
            # A TrainJob that runs has no state.
            known = ", ".join(filter(None, (self._title, self._backend.message(job))))
            self._print("begin", f"found the {known}; following it")
            return True
        return False

    def _poll(self, log: LogRelay) -> Outcome | None:
        """Read the job and its pods once; return the outcome if the job has ended."""
        job = self._cluster.get(self._backend.kind, self._name)
        if job is None or job["metadata"].get("deletionTimestamp"):
            log.drain(POD_SECONDS)
            if read_summary(self._store, self._run_uri):  # the job was removed some time after its end
                return Outcome()
            return Outcome(
                reason=f"training: the {self._title} was deleted by somebody else; "
                "rerun the command to resume from the last checkpoint",
                exit_code=TRY_AGAIN_EXIT_CODE,
            )
        pods = self._cluster.pods(self._backend.selector(self._name))
        state = self._backend.state(job, pods)
        log.follow(self._backend.first_pod(pods))
        running = sum(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        for failure in self._failures.observe(pods):
            if not state.ended:
                self._print(failure.pod, f"pod {failure.pod}: {failure.reason}")
        if state is State.WAITING:
            self._wait(job, pods)
        else:
            if state is State.RUNNING:
                self._record_running()
            noun = "pod" if running == 1 else "pods"
            self._print(
                "state", f"the {self._title}: {state.value}" + f", {running} {noun} running" * (not state.ended)
            )
        if not state.ended:
            return None
        log.drain(10)
        return self._ended(state, job)

    def _ended(self, state: State, job: dict[str, Any]) -> Outcome:
        message = self._backend.message(job)
        if state is State.SUCCEEDED:
            return Outcome()
        if state is State.CANCELLED:
            reason = f"training: the {self._title} was aborted by somebody else ({message})"
            return Outcome(reason=reason, exit_code=TRY_AGAIN_EXIT_CODE)
        outcome = self._failures.outcome(message)
        if outcome.log_tail:
            print(outcome.log_tail, file=sys.stderr, flush=True)
        return outcome

    def _wait(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> None:
        """Print what the job waits for, and delete it once it has waited too long.

        The waiting time counts from the last time that the job ran, or from its creation. Neither a repeated step nor a
        job that restarts without ever running resets it.

        Raises:
            UserError: the job has waited longer than ``launch.pending_minutes``.
        """
        waited = datetime.now(UTC) - self._idle_since(job)
        try:
            reason = _container_waiting_reason(pods) or self._backend.waiting_reason(self._cluster, job, pods)
        except UserError as error:  # the permission is missing only for reading the reason
            reason = str(error)
        self._print("state", f"the {self._title}: waiting{': ' * bool(reason)}{reason}")
        bound = self._config.launch.pending_minutes
        if bound is not None and waited > timedelta(minutes=bound):
            self._cluster.delete(self._backend.kind, self._name)
            raise UserError(
                f"launch: the {self._title} has waited for {bound:g} minutes, the limit in launch.pending_minutes"
                f"{f' ({reason})' if reason else ''}; request fewer resources, free some, or raise the limit"
            )

    def _delete_at_once(self) -> None:
        """Delete the job as soon as a signal arrives, whatever the follower is waiting for.

        Kubeflow ends the container of a stopped step after about a second; a job that is not deleted by then continues.
        """
        self._stop.stopped.wait()
        answer: queue.SimpleQueue[bool] = queue.SimpleQueue()
        threading.Thread(target=self._ask_why_stopped, args=(answer,), daemon=True).start()
        with contextlib.suppress(queue.Empty):
            self._only_rescheduled = answer.get(timeout=RESCHEDULED_SECONDS)
        self._decided.set()
        with contextlib.suppress(UnreachableError, UserError):  # the follower retries, if it still can
            if not self._only_rescheduled:
                self._cluster.delete(self._backend.kind, self._name)

    def _ask_why_stopped(self, answer: queue.SimpleQueue[bool]) -> None:
        """Find out whether the signal came because this pod is being deleted, and not because the run is stopped."""
        deleted = False
        with contextlib.suppress(UnreachableError, UserError):
            deleted = self._cluster.own_pod_deleted()
        answer.put(deleted)

    def _idle_since(self, job: dict[str, Any]) -> datetime:
        metadata = job["metadata"]
        annotation = metadata.get("annotations", {}).get(LAST_RUNNING)
        known = [_parse_time(text) for text in (metadata["creationTimestamp"], annotation) if text]
        return max([*known, *([self._last_running] if self._last_running else [])])

    def _record_running(self) -> None:
        """Record that the job runs, from time to time in an annotation of the job."""
        self._last_running = now = datetime.now(UTC)
        if self._annotated is None or now - self._annotated > ANNOTATION_INTERVAL:
            annotation = {LAST_RUNNING: now.isoformat(timespec="seconds")}
            self._cluster.patch_metadata(self._backend.kind, self._name, {"annotations": annotation})
            self._annotated = now

    def _cancel(self, log: LogRelay) -> Outcome:
        """Delete the job and wait for its pods, which write a checkpoint; a second signal ends the wait.

        If only this pod is being deleted, the job stays for the repeated step.
        """
        self._decided.wait(2 * RESCHEDULED_SECONDS)
        if self._only_rescheduled:
            print(f"train: this pod is being deleted; the {self._title} continues for the repeated step", flush=True)
            return Outcome(self._stop.first)
        print("train: stopping, writing a checkpoint (signal again to stop at once)", flush=True)
        deadline, deleted = time.monotonic() + JOB_SECONDS, False
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
        self._print("api", f"{error}; retrying, the training continues")
        if time.monotonic() - self._last_answer > API_OUTAGE_SECONDS:
            raise InfrastructureError(
                f"launch: {error}, for {API_OUTAGE_SECONDS / 60:g} minutes; rerun the command to follow the job again"
            )

    @property
    def _title(self) -> str:
        return f"{self._backend.kind.name} {self._cluster.namespace}/{self._name}"

    def _print(self, topic: str, line: str) -> None:
        """Print a line, unless it repeats the last one of its topic."""
        if self._printed.get(topic) != line:
            self._printed[topic] = line
            print(f"train: {line}", flush=True)


def _parse_time(text: str) -> datetime:
    """Parse a time as Kubernetes writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _container_waiting_reason(pods: list[dict[str, Any]]) -> str:
    """Return what keeps a scheduled pod from starting, such as a missing image or secret; empty if nothing does."""
    for pod in pods:
        for container in pod.get("status", {}).get("containerStatuses", []):
            waiting = container.get("state", {}).get("waiting") or {}
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return f"pod {pod['metadata']['name']}: {waiting['reason']}: {waiting.get('message', '')}".strip(": ")
    return ""
