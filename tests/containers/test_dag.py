"""The whole pipeline in containers: kfp.local's DockerRunner, the object store outside, and no visible credentials."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import pytest

from esvit_core.config import Config
from esvit_core.storage import ObjectStore
from esvit_core.storage.address import DISK
from esvit_core.storage.embedded import EmbeddedStore

RUN_URI = "s3://esvit/runs/in-containers"
STEPS = [
    "prepare_data",
    "prepare_transfer",
    "pretrain",
    "extract_features",
    "knn",
    "linear_probe",
    "transfer",
    "visualize",
    "report",
    "promote",
]
pytestmark = pytest.mark.timeout(1200)


@dataclass
class Monitor:
    """Inspects processes and containers while the pipeline runs.

    Args:
        client: client of the Docker daemon.
        image: image of the containers to inspect.
        secrets: texts that must not be visible.
    """

    client: docker.DockerClient
    image: str
    secrets: tuple[str, ...]
    steps_seen: int = 0
    shown: list[str] = field(default_factory=list)
    containers: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Read every process's command line five times a second, and inspect every container when it starts."""
        done = threading.Event()
        events = self.client.events(decode=True, filters={"type": "container", "image": self.image})
        threads = [
            threading.Thread(target=self._processes, args=(done,), daemon=True),
            threading.Thread(target=self._containers, args=(events,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            events.close()
            for thread in threads:
                thread.join(10)

    def _processes(self, done: threading.Event) -> None:
        while not done.wait(0.2):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has ended
                    text = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    self.steps_seen += "kfp.dsl.executor_main" in text
                    if any(secret in text for secret in self.secrets):
                        self.shown.append(text)

    def _containers(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            name, moment = event["id"], event["timeNano"] / 1e9
            if event["status"] == "start":
                self.containers[name] = self.client.api.inspect_container(name)
                self.seconds[step_of(self.containers[name])] = -moment
            elif event["status"] == "die" and name in self.containers:
                self.seconds[step_of(self.containers[name])] += moment


@dataclass(frozen=True)
class Dag:
    """The outcome of a run of the pipeline."""

    store: ObjectStore
    folder: Path
    output: str
    monitor: Monitor


@pytest.fixture(scope="module")
def dag(
    docker_client: docker.DockerClient,
    trainer_image: str,
    restricted: dict[str, Any],
    images: Any,
    micro_recipe: Path,
    tmp_path_factory: pytest.TempPathFactory,
    say: Callable[[str], None],
) -> Iterator[Dag]:
    """Run the pipeline once, with a network that trains in seconds, and one container per step."""
    from kfp import local

    from esvit_pipelines.pretrain.pipeline import build_pretrain_pipeline

    folder = tmp_path_factory.mktemp("containers")
    server = EmbeddedStore(folder / "store")
    store = ObjectStore(server.start())
    try:
        store.ensure_bucket("esvit")
        store.put_file("s3://esvit/incoming/shapes.zip", images.archive(folder / "shapes.zip", ["a", "b", "c"], 16))
        store.put_file("s3://esvit/incoming/marks.zip", images.archive(folder / "marks.zip", ["d", "e"], 12))
        config = Config.load(
            micro_recipe,
            [
                f"cluster.image={trainer_image}",
                "evaluation.transfer=[{name: marks, source: 's3://esvit/incoming/marks.zip'}]",
            ],
        )
        # The disk variable is valid on this machine, but not in a container.
        environment = {k: v for k, v in server.environment().items() if k != DISK}
        roots = [folder / "kfp", folder / "workspace"]
        for root in roots:
            root.mkdir()
            root.chmod(0o777)  # the image's user does not exist on this machine
        local.init(
            runner=local.DockerRunner(network_mode="host", shm_size="1g", environment=environment, **restricted),
            pipeline_root=str(roots[0]),
            workspace_root=str(roots[1]),
        )
        monitor = Monitor(docker_client, trainer_image, (store.address.secret_key, store.address.access_key))
        output = io.StringIO()
        start = time.monotonic()
        try:
            with monitor.running(), contextlib.redirect_stdout(output):
                build_pretrain_pipeline(config)(data="s3://esvit/incoming/shapes.zip", run_uri=RUN_URI)
        except RuntimeError as error:  # a step failed
            pytest.fail(f"{error}\n{output.getvalue()}")
        steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in monitor.seconds.items())
        say(f"pipeline in containers: {time.monotonic() - start:.0f} s ({steps})")
        yield Dag(store, folder, output.getvalue(), monitor)
    finally:
        server.stop()


def test_every_step_ran_and_the_backbone_is_published(dag: Dag) -> None:
    assert [step_of(attributes) for attributes in dag.monitor.containers.values()] == STEPS
    assert dag.store.exists(f"{RUN_URI}/report/report.html")
    assert dag.store.get_json(f"{RUN_URI}/promotion.json")["reason"]
    assert dag.store.exists(f"{RUN_URI}/backbone/manifest.json")
    assert dag.store.get_json(f"{RUN_URI}/evaluation/knn.json")
    assert dag.store.get_json(f"{RUN_URI}/evaluation/transfer-marks.json")


def test_every_container_had_the_images_user_and_a_read_only_root(dag: Dag, say: Callable[[str], None]) -> None:
    inspected = list(dag.monitor.containers.values())
    users = {attributes["Config"]["User"] for attributes in inspected}
    read_only = {attributes["HostConfig"]["ReadonlyRootfs"] for attributes in inspected}
    say(f"docker inspect of {len(inspected)} containers: user {users}, read-only root {read_only}")
    assert users == {"10001:10001"}
    assert read_only == {True}
    assert all(attributes["HostConfig"]["CapDrop"] == ["ALL"] for attributes in inspected)


def test_no_credential_is_on_a_command_line(dag: Dag) -> None:
    assert dag.monitor.steps_seen > 0  # the steps were observed
    assert dag.monitor.shown == []
    for attributes in dag.monitor.containers.values():
        given = {key: attributes["Config"][key] for key in ("Cmd", "Entrypoint", "Labels")}
        assert holds_none(dag, json.dumps([given, attributes["Path"], attributes["Args"]]))
        # The only place where they are.
        assert f"ESVIT_S3_SECRET_KEY={dag.monitor.secrets[0]}" in attributes["Config"]["Env"]


def test_no_credential_is_in_a_log_or_in_an_output_of_the_run(dag: Dag) -> None:
    assert "pretrain" in dag.output
    assert holds_none(dag, dag.output)
    files = [f for root in ("kfp", "workspace") for f in (dag.folder / root).rglob("*") if f.is_file()]
    assert len(files) >= len(STEPS)
    assert [f for f in files if not holds_none(dag, f.read_bytes().decode(errors="replace"))] == []
    objects = [o.uri for o in dag.store.list(RUN_URI + "/")]
    assert [uri for uri in objects if not holds_none(dag, dag.store.get_bytes(uri).decode(errors="replace"))] == []


def holds_none(dag: Dag, text: str) -> bool:
    return not any(secret in text for secret in dag.monitor.secrets)


def step_of(attributes: Mapping[str, Any]) -> str:
    """The component that a container runs, from the arguments of KFP's executor."""
    arguments = attributes["Args"]
    return arguments[arguments.index("--function_to_execute") + 1]
