"""What imports what: the contracts of pyproject.toml, and which modules start without the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
# These start fast: the command line and the steps that find their work done import them.
LIGHT = [
    "esvit_core",
    "esvit_core.config",
    "esvit_core.errors",
    "esvit_core.runs.run",
    "esvit_core.storage",
    "esvit_core.storage.session",
    "esvit_core.data.shards.manifest",
    "esvit_core.data.ingest.prepare",
    "esvit_core.evaluation.import_backbone",
    "esvit_core.monitoring.progress_line",
    "esvit_core.reporting.result_table",
    "esvit_core.registry.compare_champion",
    "esvit_core.retraining.prepare_new_data",
    "esvit_core.retraining.find_new_data",
    "esvit_core.launch.launcher",
    "esvit_core.planning.auto_recipe",
    "esvit_core.weights.weight_source",
    "esvit_pipelines.local.attempt",
    "esvit_pipelines.cli.main",
    "esvit_pipelines.local.retrain",
    "esvit_pipelines.local.run",
    "esvit_pipelines.cli.status_commands",
]
# These read features, which takes torch but no network: timm takes longer to import than torch.
WITHOUT_NETWORKS = ["esvit_core.evaluation.knn", "esvit_core.evaluation.linear_probe", "esvit_core.reporting.report"]


def test_the_contracts_on_imports_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache", "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_networks_and_losses_import_only_torch_timm_and_numpy() -> None:
    graph = grimp.build_graph("esvit_core", include_external_packages=True, cache_dir=None)
    parts = graph.find_descendants("esvit_core.models") | graph.find_descendants("esvit_core.losses")
    libraries = {m.partition(".")[0] for part in parts for m in graph.find_modules_directly_imported_by(part)}
    assert libraries - sys.stdlib_module_names == {"esvit_core", "torch", "timm", "numpy"}


def test_light_modules_import_no_heavy_library() -> None:
    """Each is the first of ours that the process imports; other libraries stay, which only makes the test stricter."""
    code = """
import importlib, json, sys
found = {}
for name, heavy in json.loads(sys.argv[1]).items():
    importlib.import_module(name)
    found[name] = [m for m in heavy if m in sys.modules]
    for module in [m for m in sys.modules if m.partition(".")[0] in ("esvit_core", "esvit_components", "esvit_pipelines")]:
        del sys.modules[module]
print(json.dumps({name: modules for name, modules in found.items() if modules}))
"""
    heavy = dict.fromkeys(LIGHT, ("torch", "timm", "kfp", "torchx", "matplotlib"))
    asked = json.dumps({**heavy, **dict.fromkeys(WITHOUT_NETWORKS, ("timm", "torchvision"))})
    done = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {
        path.name for folder in ("esvit_core", "components", "pipelines") for path in (ROOT / folder).rglob("*.py")
    }
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}
