"""The trainer's image: what is in it, what is not, and that it runs without rights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest

from esvit_core import __version__

PROBE = Path(__file__).parent / "probe.py"
CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints.txt"
TARGET_BYTES = 1.5e9  # of what is neither PyTorch's own nor what its wheel is linked with


@pytest.fixture(scope="module")
def image(docker_client: docker.DockerClient, trainer_image: str) -> dict[str, Any]:
    """What `docker inspect` says of the image."""
    return docker_client.images.get(trainer_image).attrs


@pytest.fixture(scope="module")
def found(docker_client: docker.DockerClient, trainer_image: str, restricted: dict[str, Any]) -> dict[str, Any]:
    """What a container without rights and network finds in the image."""
    output = docker_client.containers.run(
        trainer_image,
        ["python", "/probe.py"],
        network_mode="none",
        volumes={str(PROBE): {"bind": "/probe.py", "mode": "ro"}},
        remove=True,
        **restricted,
    )
    return json.loads(output)


def test_the_image_names_no_root_and_runs_any_command(image: dict[str, Any]) -> None:
    assert image["Config"]["User"] == "10001:10001"
    assert not image["Config"]["Entrypoint"]  # KFP and torchx give whole commands


def test_the_labels_say_what_it_is(image: dict[str, Any]) -> None:
    labels = {k.removeprefix("org.opencontainers.image."): v for k, v in image["Config"]["Labels"].items()}
    assert labels["title"] == "esvit/trainer"
    assert labels["version"] == __version__
    assert labels["licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert labels["revision"] and labels["base.name"]


def test_everything_that_a_pod_starts_can_start(found: dict[str, Any]) -> None:
    code, output, errors = found["check"]
    assert (code, errors) == (0, ""), output


def test_only_the_two_mounted_places_are_written_to(found: dict[str, Any]) -> None:
    assert found["user"] == [10001, 10001]
    assert found["writable"] == ["/tmp", "/work"]


def test_nothing_is_left_of_the_building(found: dict[str, Any]) -> None:
    assert found["programs"] == []
    assert found["modules"] == []
    assert found["left"] == []


def test_no_address_of_an_index_is_left(docker_client: docker.DockerClient, trainer_image: str) -> None:
    history = " ".join(layer["CreatedBy"] for layer in docker_client.images.get(trainer_image).history())
    assert "esvit" in history
    assert not re.search(r"index.url|find.links|https?://", history, re.IGNORECASE)


def test_the_kernels_for_cpus_are_there_without_a_compiler(found: dict[str, Any]) -> None:
    """Of both levels of x86-64; which is used is this machine's."""
    assert re.fullmatch(r"esvit-x86-64-v[34]-[0-9a-f]{12}\.so", json.loads(found["check"][1])["kernels"])


def test_the_image_for_cpus_has_nothing_of_nvidia_s(image: dict[str, Any], found: dict[str, Any]) -> None:
    if image["Config"]["Labels"]["dev.esvit.variant"] != "cpu":
        pytest.skip("an image for GPUs")
    assert [name for name in found["packages"] if name.lower().startswith(("nvidia-", "cuda-", "triton"))] == []


def test_no_program_changes_who_it_runs_as(found: dict[str, Any]) -> None:
    assert found["setuid"] == []


def test_the_package_comes_from_a_wheel(found: dict[str, Any]) -> None:
    assert found["origin"]["url"].endswith(".whl")
    assert found["python"] == ["/opt/esvit", 3, 11]


def test_the_versions_are_the_pinned_ones(found: dict[str, Any]) -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pinned = {normalised(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    installed = {normalised(name): version.partition("+")[0] for name, version in found["packages"].items()}
    del installed["esvit"]
    # PyTorch pins NVIDIA's packages and Triton itself, and which there are depends on the build.
    ours = {n: v for n, v in installed.items() if not n.startswith(("nvidia-", "cuda-", "triton"))}
    assert ours == {name: pinned.get(name) for name in ours}


def test_the_sbom_lists_what_is_installed(found: dict[str, Any]) -> None:
    assert found["sbom"]["bomFormat"] == "CycloneDX"
    listed = {normalised(c["name"]): c["version"] for c in found["sbom"]["components"]}
    assert listed == {normalised(name): version for name, version in found["packages"].items()}
    foreign = [c for c in found["sbom"]["components"] if c["name"] != "esvit"]
    assert all(c["purl"].startswith("pkg:pypi/") for c in foreign)
    debian = {line.split("\t")[0].partition(":")[0] for line in found["debian"].splitlines()}
    assert {"libc6", "python3.11", "ca-certificates"} <= debian


def test_what_is_not_pytorch_s_own_is_small(
    image: dict[str, Any], found: dict[str, Any], say: Callable[[str], None]
) -> None:
    torch, brought = found["torch_bytes"], found["brought_bytes"]
    rest = image["Size"] - torch - brought
    say(
        f"image {image['Size'] / 1e9:.2f} GB: PyTorch {torch / 1e9:.2f}, "
        f"NVIDIA's libraries and Triton {brought / 1e9:.2f}, rest {rest / 1e9:.2f}"
    )
    assert rest <= TARGET_BYTES


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()
