"""Every component follows the folder convention of kubeflow/pipelines-components."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from esvit_components.readme import ROOT, component_folders, load_component, readme

FOLDERS = component_folders()
NAMES = [folder.name for folder in FOLDERS]
MAX_BODY_LINES = 30


def test_every_folder_is_a_component() -> None:
    below = {p for p in ROOT.glob("*/*") if p.is_dir() and not p.name.startswith("__")}
    assert below == set(FOLDERS)
    assert set(NAMES) >= {"prepare_data", "pretrain", "extract_features", "knn", "linear_probe", "transfer", "promote"}


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_folder_has_its_files(folder: Path) -> None:
    for name in ("__init__.py", "component.py", "metadata.yaml", "README.md", "tests/test_component.py"):
        assert (folder / name).is_file(), name
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
    assert metadata["name"] == folder.name
    assert metadata["stability"] in {"experimental", "alpha", "beta", "stable"}
    assert metadata["dependencies"]["kubeflow"][0]["name"] == "Pipelines"
    assert metadata["lastVerified"]


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_inputs_and_outputs_are_described_in_the_docstring(folder: Path) -> None:
    spec = load_component(folder).component_spec
    assert spec.description
    for name, described in {**(spec.inputs or {}), **(spec.outputs or {})}.items():
        assert described.description, f"{name} has no description"


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_readme_is_current(folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == readme(folder), "run `make component-docs`"


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_it_runs_in_the_projects_image_and_its_body_is_short(folder: Path) -> None:
    container = load_component(folder).component_spec.implementation.container
    assert container.image == "esvit/trainer:0.1.0"
    assert not any("pip install" in part for part in container.command)
    tree = ast.parse((folder / "component.py").read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    first, last = function.body[1], function.body[-1]
    assert (last.end_lineno or 0) - first.lineno < MAX_BODY_LINES
    steps = [node for node in ast.walk(function) if isinstance(node, ast.With)]
    assert isinstance(steps[0].items[0].context_expr, ast.Call)
    assert ast.unparse(steps[0].items[0].context_expr.func) == "step"
