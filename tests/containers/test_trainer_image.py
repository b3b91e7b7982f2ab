"""The trainer's image: its content, and that it runs without privileges."""

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
TARGET_BYTES = 1.5e9  # limit of everything except PyTorch and the libraries that its wheel is linked with


@pytest.fixture(scope="module")
def image(docker_client: docker.DockerClient, trainer_image: str) -> dict[str, Any]:
    """The output of `docker inspect` for the image."""
    return docker_client.images.get(trainer_image).attrs


@pytest.fixture(scope="module")
def found(docker_client: docker.DockerClient, trainer_image: str, restricted: dict[str, Any]) -> dict[str, Any]:
    """The output of the probe in a container without privileges and network."""
    output = docker_client.containers.run(
        trainer_image,
        ["python", "/probe.py"],
        network_mode="none",
        volumes={str(PROBE): {"bind": "/probe.py", "mode": "ro"}},
        remove=True,
        **restricted,
    )
    return json.loads(output)


def test_the_image_does_not_run_as_root_and_runs_any_command(image: dict[str, Any]) -> None:
    assert image["Config"]["User"] == "10001:10001"
    assert not image["Config"]["Entrypoint"]  # KFP and torchx give whole commands


def test_the_labels_are_complete(image: dict[str, Any]) -> None:
    labels = {k.removeprefix("org.opencontainers.image."): v for k, v in image["Config"]["Labels"].items()}
    assert labels["title"] == "esvit/trainer"
    assert labels["version"] == __version__
    assert labels["licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert labels["revision"] and labels["base.name"]


def test_every_program_of_a_pod_can_start(found: dict[str, Any]) -> None:
    code, output, errors = found["check"]
    assert (code, errors) == (0, ""), output


def test_only_the_two_mounted_folders_are_writable(found: dict[str, Any]) -> None:
    assert found["user"] == [10001, 10001]
    assert found["writable"] == ["/tmp", "/work"]


def test_no_build_tools_are_left(image: dict[str, Any], found: dict[str, Any]) -> None:
    """Triton compiles C on a GPU, so the image for GPUs has a compiler and nothing more."""
    for_gpus = image["Config"]["Labels"]["dev.esvit.variant"] == "cuda"
    assert found["programs"] == (["cc", "gcc", "ld", "as"] if for_gpus else [])
    assert found["modules"] == []
    assert found["left"] == []


def test_no_index_address_is_in_the_history(docker_client: docker.DockerClient, trainer_image: str) -> None:
    history = " ".join(layer["CreatedBy"] for layer in docker_client.images.get(trainer_image).history())
    assert "esvit" in history
    assert not re.search(r"index.url|find.links|https?://", history, re.IGNORECASE)


def test_the_cpu_kernels_are_compiled(found: dict[str, Any]) -> None:
    """Both levels of x86-64 are compiled; the machine determines which one is used."""
    assert re.fullmatch(r"esvit-x86-64-v[34]-[0-9a-f]{12}\.so", json.loads(found["check"][1])["kernels"])


def test_the_cpu_image_has_no_nvidia_packages(image: dict[str, Any], found: dict[str, Any]) -> None:
    if image["Config"]["Labels"]["dev.esvit.variant"] != "cpu":
        pytest.skip("an image for GPUs")
    assert [name for name in found["packages"] if name.lower().startswith(("nvidia-", "cuda-", "triton"))] == []


def test_there_are_no_setuid_programs(found: dict[str, Any]) -> None:
    assert found["setuid"] == []


def test_the_package_comes_from_a_wheel(found: dict[str, Any]) -> None:
    assert found["origin"]["url"].endswith(".whl")
    assert found["python"] == ["/opt/esvit", 3, 11]


def test_the_versions_are_the_pinned_ones(found: dict[str, Any]) -> None:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pinned = {normalised(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    installed = {normalised(name): version.partition("+")[0] for name, version in found["packages"].items()}
    del installed["esvit"]
    # PyTorch itself pins NVIDIA's packages and Triton, and the set of packages depends on the build.
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


def test_everything_except_pytorch_is_small(
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
