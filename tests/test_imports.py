"""What imports what: the contracts of pyproject.toml, and which modules start without the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
# What each package may import of ours. A part of esvit_core imports only what stands below it.
FOUNDATION = {"esvit_core.config", "esvit_core.errors"}
STORAGE = FOUNDATION | {"esvit_core.storage"}
NETWORKS = FOUNDATION | {
    "esvit_core.collectives",
    "esvit_core.cpu_flags",
    "esvit_core.kernels",
    "esvit_core.losses",
    "esvit_core.models",
    "esvit_core.torch_private",
}
RUNS = STORAGE | {"esvit_core", "esvit_core.data", "esvit_core.monitoring", "esvit_core.runs", "esvit_core.weights"}
WORK = RUNS | NETWORKS
ALLOWED = {
    "esvit_core.repetition": set(),
    "esvit_core.errors": {"esvit_core.repetition"},
    "esvit_core.artifacts": set(),
    "esvit_core.cpu_flags": set(),
    "esvit_core.collectives": {"esvit_core.errors"},
    "esvit_core.torch_private": set(),
    "esvit_core.config": {"esvit_core.errors"},
    "esvit_core.storage": FOUNDATION,
    "esvit_core.kernels": NETWORKS,
    "esvit_core.losses": NETWORKS,
    "esvit_core.models": NETWORKS,
    "esvit_core.weights": STORAGE | {"esvit_core.data", "esvit_core.models"},
    "esvit_core.monitoring": STORAGE,
    "esvit_core.data": STORAGE | {"esvit_core.monitoring"},
    "esvit_core.runs": RUNS,
    # How much a step takes: the launcher of a training needs it, too.
    "esvit_core.planning.count_operations": NETWORKS | {"esvit_core.planning.fake_network"},
    "esvit_core.planning.pod_sizes": FOUNDATION | {"esvit_core.planning.count_operations"},
    "esvit_core.launch": RUNS | {"esvit_core.planning.pod_sizes", "esvit_core.torch_private"},
    "esvit_core.training": WORK | {"esvit_core.launch"},
    "esvit_core.planning": WORK | {"esvit_core.launch", "esvit_core.training"},
    "esvit_core.embedding": WORK,
    "esvit_core.evaluation": WORK | {"esvit_core.training"},
    "esvit_core.registry": RUNS | {"esvit_core.evaluation"},
    "esvit_core.retraining": RUNS | {"esvit_core.registry"},
    "esvit_core.reporting": RUNS | {"esvit_core.evaluation", "esvit_core.registry"},
    "esvit_core": {"esvit_core"},
    "esvit_components": {"esvit_core"},
    "esvit_pipelines": {"esvit_core", "esvit_components"},
}
FOLDERS = {"esvit_core": "esvit_core", "esvit_components": "components", "esvit_pipelines": "pipelines"}
NETWORK_LIBRARIES = {"torch", "timm", "numpy", "triton"}  # Triton comes with torch where there are GPUs
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
