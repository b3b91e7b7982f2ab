"""Fixtures of the tests of the container images, which run under `make test-containers`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

IMAGE_VARIABLE = "ESVIT_TEST_IMAGE"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.containers)
            if IMAGE_VARIABLE not in os.environ:
                item.add_marker(pytest.mark.skip(reason="needs Docker and the images: make images test-containers"))


@pytest.fixture(scope="session")
def trainer_image() -> str:
    """Name of the image of the steps and the training pods."""
    return os.environ[IMAGE_VARIABLE]


@pytest.fixture(scope="session")
def docker_client() -> Iterator[docker.DockerClient]:
    """A client of the Docker daemon."""
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(scope="session")
def restricted() -> dict[str, Any]:
    """Arguments of `docker run` that match Kubernetes' restricted standard, with two writable folders."""
    return {
        "read_only": True,
        "tmpfs": {"/tmp": "mode=1777", "/work": "uid=10001,gid=10001,mode=700"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
    }


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a line past pytest's capture, such as a measured figure."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n    {text}", flush=True)

    return line
