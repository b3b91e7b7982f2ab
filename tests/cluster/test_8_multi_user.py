"""The on-premises parts in a namespace of their own: a profile of a Kubeflow that knows users, with quotas."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
import yaml
from cluster_settings import Settings
from evidence import Saw
from kube import Kube
from overlays import copy_of_manifests, make_keys, overlay
from runs import Cli, run_id_in

from conftest import drawings, store_of, upload
from esvit_core.storage import ObjectStore

QUOTA = {"requests.cpu": "1500m", "requests.memory": "6Gi", "limits.memory": "64Gi", "pods": "40"}


@pytest.fixture(scope="module")
def profile(settings: Settings) -> Kube:
    """The namespace."""
    for name in ("multiuser", "profile"):
        if not getattr(settings, name):
            pytest.skip(f"ESVIT_TEST_{name.upper()} is not set")
    return Kube(settings.profile)


@pytest.fixture(scope="module")
def installed(
    profile: Kube, cli: Cli, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ObjectStore]:
    """The overlay with a small quota, and its store."""
    make_keys(profile, cli)
    patches = [
        {
            "target": {"kind": "ResourceQuota", "name": "esvit"},
            "patch": yaml.safe_dump([{"op": "replace", "path": "/spec/hard", "value": QUOTA}]),
        },
        {
            "target": {"kind": "StatefulSet", "name": "esvit-object-store"},
            "patch": yaml.safe_dump(
                [
                    {"op": "replace", "path": "/spec/volumeClaimTemplates/0/spec/resources/requests/storage", "value": "10Gi"},
                    {"op": "replace", "path": "/spec/template/spec/containers/0/resources/requests/cpu", "value": "100m"},
                ]
            ),
        },
    ]  # fmt: skip
    manifests = copy_of_manifests(tmp_path_factory.mktemp("profile"))
    mine = overlay(
        profile,
        manifests,
        "base",
        image=settings.image,
        components=("object-store", "kubeflow-profile"),
        patches=patches,
    )
    profile.run("delete", "job", "esvit-bucket", "--ignore-not-found")
    profile.run("apply", "-k", str(mine))
    profile.run("rollout", "status", "statefulset/esvit-object-store", "--timeout=300s", seconds=330)
    profile.run("wait", "--for=condition=complete", "--timeout=300s", "job/esvit-bucket", seconds=330)
    with store_of(profile) as store:
        yield store


@pytest.fixture(scope="module")
def there(cli: Cli, settings: Settings) -> Cli:
    """The command line, pointed at the server that knows users."""
    return dataclasses.replace(cli, settings=dataclasses.replace(settings, kfp=settings.multiuser))


def test_run_in_a_profile(
    installed: ObjectStore, there: Cli, settings: Settings, profile: Kube, stamp: str, saw: Saw
) -> None:
    """A run in a profile, under its quota, succeeds."""
    data = upload(installed, f"test/{stamp}/labelled", drawings(0, 8), labelled=True)
    done = there.run(
        *there.submission("pretrain", data, "--namespace", profile.namespace, "--wait", "--name", f"profile {stamp}")
    )
    saw.command(done, last=25)
    assert done.returncode == 0
    used = (profile.get("resourcequota", "esvit") or {})["status"]
    saw(f"quota {used['hard']}, used at the end {used['used']}")


def test_over_the_quota(installed: ObjectStore, there: Cli, profile: Kube, stamp: str, saw: Saw) -> None:
    """A submission over the quota is refused with the quota's own words."""
    data = f"s3://esvit/test/{stamp}/labelled"
    submission = there.submission(
        "pretrain", data, "--namespace", profile.namespace, "--wait", "--name", f"too large {stamp}",
        settings=("cluster.prepare.cpu=3", "cluster.prepare.cpu_limit=3", f"recipe=over-{stamp}"),
    )  # fmt: skip
    process = there.start(*submission)
    assert process.stdout
    lines: list[str] = []
    end = time.monotonic() + 300
    for line in process.stdout:
        lines.append(line)
        if "exceeded quota" in line or time.monotonic() > end:
            break
    process.terminate()
    for line in lines[-6:]:
        saw(line.rstrip())
    there.run("runs", "terminate", run_id_in("".join(lines)), "--namespace", profile.namespace)
    assert "exceeded quota" in lines[-1]
