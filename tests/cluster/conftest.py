"""What the tests of a real cluster share. They run with `make test-cluster` only; docs/install.md says how.

The tests run in the order of their files and build on each other as an installation does: the overlay first, runs
after it, disturbances last.
"""

from __future__ import annotations

import base64
import contextlib
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster_settings import ROOT, SWITCH, Settings
from evidence import Entry, Evidence, Saw
from kube import Kube, forwarded
from runs import TRAIN_STEP, Cli, Runs, wait_for_line

from esvit_core.storage import ObjectStore
from esvit_core.storage.address import StoreAddress

collect_ignore_glob = [] if os.environ.get(SWITCH) else ["test_*.py"]

PER_CLASS = 12
CLASSES = 4
ENDLESS = 100_000  # epochs


def pytest_report_header() -> str:
    return "tests/cluster: " + ("run" if os.environ.get(SWITCH) else "not run, they need a cluster: make test-cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(2400))


@pytest.fixture(scope="session")
def settings() -> Settings:
    """Addresses, names, and the commands that only the owner of the cluster knows."""
    return Settings()


@pytest.fixture(scope="session")
def evidence(settings: Settings) -> Iterator[Evidence]:
    """The report."""
    collected = Evidence(settings.report)
    yield collected
    collected.write()
    print(f"\nreport: {settings.report / 'index.html'}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    setattr(item, f"report_{report.when}", report)
    return report


@pytest.fixture(autouse=True)
def saw(request: pytest.FixtureRequest, evidence: Evidence) -> Iterator[Saw]:
    """Takes what a test saw: ``saw("a line")``, ``saw.command(done)``, ``saw.image_path("caption")``."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def show(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", end="", flush=True)

    title = (request.function.__doc__ or request.node.name).strip().splitlines()[0].rstrip(".")
    entry = evidence.entries.setdefault(request.node.name, Entry(request.node.name, title))
    began = time.monotonic()
    yield Saw(evidence, entry, show)
    entry.seconds = time.monotonic() - began
    reports = [getattr(request.node, f"report_{when}", None) for when in ("setup", "call")]
    failed = next((r for r in reports if r is not None and r.failed), None)
    skipped = next((r for r in reports if r is not None and r.skipped), None)
    if failed is not None:
        entry.state, entry.reason = "failed", str(failed.longrepr)[-4000:]
    elif skipped is not None:
        entry.state, entry.reason = "not run", str(skipped.longrepr[-1]).removeprefix("Skipped: ")
    else:
        entry.state = "passed"
    evidence.write()


@pytest.fixture
def needs(settings: Settings, kube: Kube) -> Callable[..., None]:
    """Ends a test as not run, with the reason, where the cluster lacks something: ``needs("prometheus")``."""

    def check(*names: str, kind: str | None = None, what: str = "") -> None:
        for name in names:
            if not getattr(settings, name):
                pytest.skip(f"ESVIT_TEST_{name.upper()} is not set")
        if kind is not None and not kube.has(kind):
            pytest.skip(f"{what} is not installed: the cluster has no {kind}")

    return check


@pytest.fixture(scope="session")
def kube(settings: Settings) -> Kube:
    """The namespace of the runs."""
    return Kube(settings.namespace)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, stamp: str) -> Path:
    """A recipe of a few steps on small images; names make its runs, champion, and lease those of this session."""
    path = tmp_path_factory.mktemp("recipe") / "few-steps.yaml"
    text = (Path(__file__).parent / "few-steps.yaml").read_text(encoding="utf-8")
    text = text.replace("recipe: few-steps", f"recipe: few-steps-{stamp}")
    path.write_text(text.replace("pointer: champion", f"pointer: champion-{stamp}"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cli(settings: Settings, recipe: Path) -> Cli:
    """The command line, pointed at the cluster."""
    return Cli(settings, recipe, (f"cluster.image={settings.image}", *settings.settings))


@pytest.fixture(scope="session")
def runs(settings: Settings, kube: Kube) -> Runs:
    """The server's runs."""
    import kfp

    return Runs(kfp.Client(host=settings.kfp), kube)


def _secret(kube: Kube, name: str) -> dict[str, str]:
    secret = kube.get("secret", name)
    assert secret, f"secret {name} is missing; the overlay is installed first"
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


@contextlib.contextmanager
def store_of(kube: Kube) -> Iterator[ObjectStore]:
    """The store of a namespace, with the key that may write anywhere."""
    keys = _secret(kube, "esvit-object-store-admin")
    with forwarded(kube, "svc/esvit-object-store", 8333) as port:
        yield ObjectStore(StoreAddress.from_env({**keys, "ESVIT_S3_ENDPOINT": f"http://127.0.0.1:{port}"}))


@pytest.fixture(scope="session")
def store(kube: Kube) -> Iterator[ObjectStore]:
    """The store in the cluster, with the key that may write anywhere."""
    with store_of(kube) as opened:
        yield opened


def drawings(first: int, number: int) -> Iterator[tuple[str, bytes]]:
    """Class and bytes of drawings of the samples, ``number`` of each of the first classes."""
    with zipfile.ZipFile(ROOT / "samples" / "clipart.zip") as archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        by_class: dict[str, list[str]] = {}
        for name in names:
            by_class.setdefault(Path(name).parent.name, []).append(name)
        for kind in sorted(by_class)[:CLASSES]:
            for name in by_class[kind][first : first + number]:
                yield f"{kind}/{Path(name).name}", archive.read(name)


def upload(store: ObjectStore, prefix: str, images: Iterator[tuple[str, bytes]], *, labelled: bool) -> str:
    """Put images below a prefix of the bucket; their address."""
    for name, content in images:
        store.put_bytes(f"s3://esvit/{prefix}/{name if labelled else name.replace('/', '-')}", content)
    return f"s3://esvit/{prefix}"


@pytest.fixture(scope="session")
def stamp() -> str:
    """Makes the names of this session's data its own, so that the suite can be repeated on the same cluster."""
    return f"{time.strftime('%m%d-%H%M%S')}"


@pytest.fixture(scope="session")
def labelled(store: ObjectStore, stamp: str) -> str:
    """Labelled drawings in the store."""
    return upload(store, f"test/{stamp}/labelled", drawings(0, PER_CLASS), labelled=True)


@pytest.fixture(scope="session")
def unlabelled(store: ObjectStore, stamp: str) -> str:
    """The same drawings without labels."""
    return upload(store, f"test/{stamp}/unlabelled", drawings(0, PER_CLASS), labelled=False)


def start_training(cli: Cli, data: str, stamp: str, what: str, *more: str, epochs: int) -> str:
    """Submit a training in a step's own pod; the run's id. Its recipe's name makes it a run of its own."""
    settings = (f"recipe={what}-{stamp}", f"training.epochs={epochs}", *more)
    return cli.submit("pretrain", data, "--name", f"{what} {stamp}", settings=settings)


@pytest.fixture(scope="session")
def unfinished() -> dict[str, str]:
    """Runs that go on while the next tests run, by what they show: test_6_ends.py waits for them."""
    return {}


@pytest.fixture
def training(
    cli: Cli, runs: Runs, kube: Kube, unlabelled: str, stamp: str, unfinished: dict[str, str]
) -> Iterator[Callable[..., tuple[str, dict[str, Any]]]]:
    """Starts a training in a step's own pod and waits for its first steps: the run's id and the pod.

    ``training("deleted", "optimizer.lr=1", epochs=400)``; what has not ended when the test has is terminated, unless it is
    ``unfinished``.
    """
    started: list[str] = []

    def start(what: str, *more: str, epochs: int) -> tuple[str, dict[str, Any]]:
        run_id = start_training(cli, unlabelled, stamp, what, *more, epochs=epochs)
        started.append(run_id)
        pod = runs.pod(run_id, TRAIN_STEP)
        wait_for_line(kube, pod, "images/s")
        return run_id, pod

    yield start
    runs.terminate(*set(started).difference(unfinished.values()))


@pytest.fixture(scope="session")
def endless(cli: Cli, runs: Runs, kube: Kube, unlabelled: str, stamp: str) -> Iterator[str]:
    """A training in a step's own pod that goes on until it is terminated, for disturbances in turn; the run's id."""
    run_id = start_training(cli, unlabelled, stamp, "disturbed", "training.workers=1", epochs=ENDLESS)
    wait_for_line(kube, runs.pod(run_id, TRAIN_STEP), "images/s")
    yield run_id
    runs.terminate(run_id)
