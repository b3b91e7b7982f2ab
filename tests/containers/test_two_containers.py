"""A training in one to two containers that torchx starts: nodes are killed and come back."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import pytest

from esvit_core.config import Config, DataConfig
from esvit_core.config.kubernetes_names import quantity_bytes, quantity_cores
from esvit_core.data.ingest.prepare import prepare
from esvit_core.launch.kubernetes.training_pod import MODULE, agent_command, literal_environment
from esvit_core.launch.signals import STOPPED_EXIT_CODE
from esvit_core.runs.events import Event, read_events
from esvit_core.storage import ObjectStore, StoreAddress
from esvit_core.storage.store_errors import StoreError
from esvit_core.training.sample_trace import TRACE_VARIABLE, samples_that_count

RUN_URI = "s3://esvit/runs/two-containers"
TRACE = "/trace"
IMAGES = 64
PATIENCE = 300.0
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def store(
    docker_client: docker.DockerClient,
    trainer_image: str,
    restricted: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ObjectStore]:
    """A store's server in its own container, on torchx's network."""
    from torchx.schedulers.docker_scheduler import NETWORK, ensure_network

    key = {"accessKey": "key-of-this-test", "secretKey": "only-for-this-test"}
    identity = {"name": "esvit", "credentials": [key], "actions": ["Admin", "Read", "Write"]}
    file = tmp_path_factory.mktemp("identities") / "identities.json"
    file.write_text(json.dumps({"identities": [identity]}))
    ensure_network(docker_client)
    container = docker_client.containers.run(
        trainer_image,
        ["weed", "server", "-dir=/work", "-ip.bind=0.0.0.0", "-filer", "-s3", "-s3.port=8333", "-s3.config=/s3.json"],
        network=NETWORK,
        volumes={str(file): {"bind": "/s3.json", "mode": "ro"}},
        detach=True,
        **restricted,
    )
    try:
        container.reload()
        address = container.attrs["NetworkSettings"]["Networks"][NETWORK]["IPAddress"]
        made = ObjectStore(StoreAddress(f"{address}:8333", key["accessKey"], key["secretKey"], secure=False))
        wait_until(lambda: answers(made), "the object store", [container])
        yield made
    finally:
        container.remove(force=True)


@pytest.fixture(scope="module")
def config(
    store: ObjectStore, trainer_image: str, images: Any, micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """A run in the store that does not end during the tests."""
    settings = [
        "training.epochs=100000",
        "training.collapse_patience=1000000",
        "training.checkpoint_steps=20",
        "training.log_steps=20",
    ]
    launch = ["launch.scheduler=volcano", "launch.nodes=2", "launch.min_nodes=1"]
    pod = ["cluster.train.cpu=1", "cluster.train.memory=3Gi", f"cluster.image={trainer_image}"]
    made = Config.load(micro_recipe, [*settings, *launch, *pod])
    store.put_bytes(f"{RUN_URI}/config.yaml", made.to_yaml().encode())
    folder = images.folder(tmp_path_factory.mktemp("data") / "images", [""], IMAGES)
    prepare(str(folder), store, f"{RUN_URI}/data", DataConfig(val_fraction=0.0))
    return made


@dataclass
class Outcome:
    """The recorded events of the training.

    Args:
        store: the store that contains the run.
        trace: folder with the samples of every step.
        node_ends: exit code of the second node after the first, which hosts the rendezvous, was killed.
        logs: logs of both containers.
        undisturbed: the first node kept running while the second was killed and came back.
    """

    store: ObjectStore
    trace: Path
    node_ends: int = -1
    logs: str = ""
    undisturbed: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def starts(self) -> list[Event]:
        return [entry for entry in read_events(self.store, RUN_URI) if entry.kind == "started"]

    def step(self) -> int:
        """Step of the newest checkpoint."""
        pointer = self.store.read_pointer(f"{RUN_URI}/training/latest")
        return pointer.value["step"] if pointer else -1

    def trains(self, attempt: int, processes: int) -> bool:
        """Whether the start with this number, from 1, has this many processes and has written a checkpoint."""
        starts = self.starts()
        if len(starts) < attempt:
            return False
        last = starts[-1]
        return (last.facts or {})["processes"] == processes and self.step() > (last.step or 0)


@pytest.fixture(scope="module")
def outcome(
    store: ObjectStore,
    config: Config,
    docker_client: docker.DockerClient,
    restricted: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    say: Callable[[str], None],
) -> Outcome:
    """Kill the second node and restart it, kill the first and restart both, then cancel the job."""
    from torchx.runner import get_runner

    result = Outcome(store, tmp_path_factory.mktemp("trace"))
    result.trace.chmod(0o777)  # the image's user does not exist on this machine
    begun = time.monotonic()

    def until(what: str, condition: Callable[[], bool], *running: Any) -> None:
        wait_until(condition, what, running)
        result.seconds[what] = time.monotonic() - begun

    with get_runner() as runner:
        request = described(runner, config, result, restricted)
        handle = runner.schedule(request)
        first, second = nodes = [docker_client.containers.get(c.kwargs["name"]) for c in request.request.containers]
        since = first.attrs["State"]["StartedAt"]
        try:
            until("two train", lambda: result.trains(1, 2), *nodes)
            second.kill()
            until("the second was killed and one trains", lambda: result.trains(2, 1), first)
            second.start()
            until("it is back and two train", lambda: result.trains(3, 2), *nodes)
            first.reload()
            result.undisturbed = first.attrs["State"]["StartedAt"] == since
            first.kill()
            result.node_ends = second.wait(timeout=PATIENCE)["StatusCode"]
            for node in nodes:
                node.start()
            until("the first was killed, both are back and train", lambda: result.trains(4, 2), *nodes)
        finally:
            runner.cancel(handle)
            result.logs = "".join(node.logs().decode() for node in nodes)
            for node in nodes:
                node.remove(force=True)
    say("; ".join(f"{what}: {seconds:.0f} s" for what, seconds in result.seconds.items()))
    return result


def test_when_one_node_is_killed_the_other_continues_and_admits_it_again(outcome: Outcome) -> None:
    assert [(entry.facts or {})["processes"] for entry in outcome.starts()][:3] == [2, 1, 2]
    steps = [entry.step or 0 for entry in outcome.starts()]
    assert steps[0] == 0 < steps[1] < steps[2]
    assert outcome.undisturbed


def test_without_the_rendezvous_host_the_other_node_ends_and_both_resume(outcome: Outcome) -> None:
    assert outcome.node_ends == STOPPED_EXIT_CODE  # which requests a restart
    assert [(entry.facts or {})["processes"] for entry in outcome.starts()] == [2, 1, 2, 2]
    steps = [entry.step or 0 for entry in outcome.starts()]
    assert steps[2] < steps[3] < outcome.step()


def test_a_cancelled_job_leaves_a_checkpoint_of_its_last_step(outcome: Outcome) -> None:
    assert f"stopped after step {outcome.step()}; the checkpoint is complete" in outcome.logs


def test_no_sample_is_lost_or_seen_twice(outcome: Outcome) -> None:
    kept = samples_that_count(outcome.trace)
    per_epoch = IMAGES // len(kept[1])
    for epoch in range(outcome.step() // per_epoch):
        seen = (n for step in range(per_epoch) for n in kept[1 + epoch * per_epoch + step])
        assert Counter(seen) == Counter(range(IMAGES)), epoch


def test_no_credential_is_in_a_log(outcome: Outcome) -> None:
    assert outcome.logs
    assert outcome.store.address.secret_key not in outcome.logs
    assert outcome.store.address.access_key not in outcome.logs


def described(runner: Any, config: Config, result: Outcome, restricted: dict[str, Any]) -> Any:
    """The request of torchx's `local_docker` for `-j 1:2x1`, completed as for a pod."""
    from torchx.components.dist import ddp

    launch, pod = config.launch, config.cluster.train
    app = ddp(
        "--run-uri",
        RUN_URI,
        m=MODULE,
        name="esvit/two",
        image=config.cluster.image,
        j=f"{launch.fewest_nodes}:{launch.nodes}x{config.node_processes}",
        cpu=int(quantity_cores(pod.cpu)),
        memMB=quantity_bytes(pod.memory) >> 20,
        tee=0,
    )
    request = runner.dryrun(app, "local_docker")
    containers = request.request.containers
    for container in containers:
        container.command = agent_command(
            container.command[-1],
            endpoint=containers[0].kwargs["name"],
            address=container.kwargs["name"],
            job="two",
            restarts=launch.restarts,
        )
        container.kwargs["environment"] |= {
            **literal_environment(config),
            **result.store.address.environment(),
            TRACE_VARIABLE: TRACE,
            "TORCHELASTIC_ERROR_FILE": "/tmp/error.json",  # Docker has no termination message
        }
        container.kwargs |= {**restricted, "volumes": {str(result.trace): {"bind": TRACE, "mode": "rw"}}}
    return request


def answers(store: ObjectStore) -> bool:
    try:
        store.ensure_bucket("esvit")
    except StoreError:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str, running: Any) -> None:
    """Wait until the condition holds; fail if one of the running containers ends."""
    end = time.monotonic() + PATIENCE
    while not condition():
        for container in running:
            container.reload()
        late = time.monotonic() > end
        if late or any(container.status != "running" for container in running):
            message = "".join(f"{container.name}:\n{container.logs(tail=40).decode()}" for container in running)
            pytest.fail(
                f"{what}: " + (f"not within {PATIENCE:.0f} s" if late else "a container has ended") + f"\n{message}"
            )
        time.sleep(0.5)
