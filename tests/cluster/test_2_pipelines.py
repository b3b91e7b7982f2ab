"""The three pipelines, and what they decide."""

from __future__ import annotations

import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster_settings import Settings
from evidence import Saw
from kube import Kube
from runs import STEP, TRAIN_STEP, Cli, Runs, progress, run_id_in

from conftest import PER_CLASS, drawings, upload
from esvit_core.storage import ObjectStore


@pytest.fixture(scope="session")
def transfer_set(store: ObjectStore, stamp: str) -> str:
    """A labelled set for the transfer protocol."""
    return upload(store, f"test/{stamp}/marks", drawings(20, 8), labelled=True)


def decision_of(store: ObjectStore, run: str) -> dict[str, Any]:
    """What promotion decided in a run of the store."""
    found: dict[str, Any] = store.get_json(f"{run}/promotion.json")
    return found


def newest_run(store: ObjectStore, recipe: str) -> str:
    """Address of the recipe's run whose configuration was written last."""
    mine = f"s3://esvit/runs/{recipe}-"
    found = [
        one for one in store.list("s3://esvit/runs") if one.uri.startswith(mine) and one.uri.endswith("/config.yaml")
    ]
    return max(found, key=lambda one: one.modified).uri.removesuffix("/config.yaml")


def never_seen(stamp: str, first: int, number: int) -> Iterator[tuple[str, bytes]]:
    """Drawings in files that no earlier session has had: a retraining knows files by their content."""
    for name, content in drawings(first, number):
        yield name, content + stamp.encode()  # after the end of a PNG, where no decoder looks


@pytest.fixture(scope="module")
def growing(store: ObjectStore, stamp: str) -> str:
    """Labelled drawings to which more are added."""
    return upload(store, f"test/{stamp}/growing", never_seen(stamp, 0, PER_CLASS), labelled=True)


@pytest.fixture(scope="module")
def registration(settings: Settings, kube: Kube) -> Iterator[tuple[str, ...]]:
    """Settings of a run that registers its champion, if there is a registry, which the run's steps may reach meanwhile."""
    if not settings.model_registry:
        yield ()
        return
    address = urllib.parse.urlsplit(settings.model_registry)
    block = {"cidr": f"{socket.gethostbyname(address.hostname or '')}/32"}
    port = {"protocol": "TCP", "port": address.port or 80}
    name = "esvit-test-model-registry"
    kube.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": name},
            "spec": {
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "esvit", "esvit.dev/role": "publish"}},
                "policyTypes": ["Egress"],
                "egress": [{"to": [{"ipBlock": block}], "ports": [port]}],
            },
        }
    )
    yield ("registry.kind=kubeflow", f"registry.url={settings.model_registry}")
    kube.run("delete", "networkpolicy", name, "--ignore-not-found")


@pytest.fixture(scope="module")
def beside(cli: Cli, unlabelled: str, growing: str, registration: tuple[str, ...], stamp: str) -> dict[str, str]:
    """Runs that go on beside the first test, for time's sake; their ids."""
    two_pods = (f"recipe=unlabelled-{stamp}", "cluster.prepare.parallelism=2")
    return {
        "unlabelled": cli.submit("pretrain", unlabelled, "--name", f"unlabelled {stamp}", settings=two_pods),
        "retrain": cli.submit("retrain", growing, "--name", f"retrain first {stamp}", settings=registration),
    }


def test_pretrain_labelled(
    cli: Cli,
    runs: Runs,
    store: ObjectStore,
    labelled: str,
    transfer_set: str,
    stamp: str,
    beside: dict[str, str],
    saw: Saw,
) -> None:
    """`esvit submit pretrain --wait` on labelled images with a transfer set succeeds and tells the verdict."""
    done = cli.run(
        *cli.submission(
            "pretrain", labelled, "--transfer", f"marks={transfer_set}", "--wait", "--name", f"labelled {stamp}"
        )
    )
    saw.command(done, last=30)
    assert done.returncode == 0
    assert runs.state(run_id_in(done.stdout)) == "SUCCEEDED"
    assert decision_of(store, newest_run(store, f"few-steps-{stamp}"))["value"] is not None


def test_pretrain_unlabelled(runs: Runs, store: ObjectStore, beside: dict[str, str], stamp: str, saw: Saw) -> None:
    """A run on images without labels succeeds to its last step and says that it decides nothing."""
    runs.wait(beside["unlabelled"])
    decision = decision_of(store, newest_run(store, f"unlabelled-{stamp}"))
    saw(f"SUCCEEDED; promoted: {decision['promoted']}, {decision['reason']}")
    assert not decision["promoted"]


def test_images_are_prepared_in_two_pods(runs: Runs, beside: dict[str, str], saw: Saw) -> None:
    """With ``cluster.prepare.parallelism=2`` two pods prepared a share of that run's images each."""
    pods = runs.pods(beside["unlabelled"], f"{STEP},esvit.dev/role=prepare", "Succeeded")
    lines = [line for pod in pods for line in runs.kube.logs(pod["metadata"]["name"]).splitlines()]
    shares = sorted({line for line in lines if line.startswith("prepare: share ")})
    for line in shares:
        saw(line)
    assert [line.split()[2] for line in shares] == ["1/2", "2/2"]


def test_same_run_again_and_evaluate(
    cli: Cli, runs: Runs, store: ObjectStore, labelled: str, transfer_set: str, stamp: str, saw: Saw
) -> None:
    """The same run submitted again finds every step done; beside it its backbone is measured by itself."""
    again = cli.submit("pretrain", labelled, "--transfer", f"marks={transfer_set}", "--name", f"again {stamp}")
    backbone = newest_run(store, f"few-steps-{stamp}")
    evaluated = cli.submit("evaluate", labelled, "-p", f"backbone={backbone}", "--name", f"evaluate {stamp}")
    for what, run_id in (("the same run again", again), (f"evaluation of {backbone}", evaluated)):
        saw(f"{what}: SUCCEEDED after {runs.wait(run_id):.0f} s")
    trained = runs.pods(again, TRAIN_STEP, phase=None)
    assert trained and not any(progress(runs.kube, pod) for pod in trained), "it trained again"


def test_retrain(
    cli: Cli, runs: Runs, store: ObjectStore, beside: dict[str, str], growing: str, stamp: str, saw: Saw
) -> None:
    """A retraining trains on new images, finds nothing new the second time, and of two at once one goes on."""
    runs.wait(beside["retrain"])
    saw("the first retraining: SUCCEEDED")
    assert runs.pods(beside["retrain"], TRAIN_STEP, phase=None), "the first retraining did not train"
    nothing = cli.submit("retrain", growing, "--name", f"retrain nothing new {stamp}")
    saw(f"nothing new: SUCCEEDED after {runs.wait(nothing):.0f} s")
    pods = {p["metadata"]["labels"].get("esvit.dev/role") for p in runs.pods(nothing, phase=None)}
    assert pods == {"prepare"}, "with nothing new only the first step runs"
    upload(store, growing.removeprefix("s3://esvit/"), never_seen(stamp, 40, 6), labelled=True)
    two = [cli.submit("retrain", growing, "--name", f"retrain {n} of two {stamp}") for n in (1, 2)]
    ends = {}
    for run_id in two:
        try:
            ends[run_id] = f"SUCCEEDED after {runs.wait(run_id):.0f} s"
        except AssertionError as error:
            ends[run_id] = str(error).splitlines()[0]
            assert "lease" in str(error) or "another" in str(error), error
    saw(f"two at once: {'; '.join(ends.values())}")
    assert any("SUCCEEDED" in end for end in ends.values())


def test_registration(
    settings: Settings,
    runs: Runs,
    store: ObjectStore,
    beside: dict[str, str],
    needs: Callable[..., None],
    stamp: str,
    saw: Saw,
) -> None:
    """The champion of the first retraining is a version in the Kubeflow Model Registry."""
    needs("model_registry")
    runs.wait(beside["retrain"])
    api = f"{settings.model_registry}/api/model_registry/v1alpha3"

    def items(path: str) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{api}/{path}?pageSize=1000", timeout=20) as answer:
            return json.load(answer)["items"]

    (model,) = [m for m in items("registered_models") if m["name"] == f"champion-{stamp}"]
    (version,) = items(f"registered_models/{model['id']}/versions")
    (artifact,) = items(f"model_versions/{version['id']}/artifacts")
    properties = {
        key: next(v for k, v in value.items() if k != "metadataType")
        for key, value in version["customProperties"].items()
    }
    saw(
        f"model {model['name']}, version {version['name']}, {properties['metric']} {properties['value']}, {artifact['uri']}"
    )
    assert artifact["uri"].endswith("/backbone") and store.exists(f"{artifact['uri']}/manifest.json")
