"""The one-way dependencies of STYLE.md, held by reading every import statement."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What each package may import of ours. A part of esvit_core imports only what stands below it.
FOUNDATION = {"esvit_core.config", "esvit_core.errors"}
STORAGE = FOUNDATION | {"esvit_core.storage"}
NETWORKS = FOUNDATION | {
    "esvit_core.collectives",
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
    "esvit_core.weights.weight_source",
    "esvit_pipelines.local.attempt",
    "esvit_pipelines.cli.main",
    "esvit_pipelines.local.retrain",
    "esvit_pipelines.local.run",
    "esvit_pipelines.cli.status_commands",
]
# These read features, which takes torch but no network: timm takes longer to import than torch.
WITHOUT_NETWORKS = ["esvit_core.evaluation.knn", "esvit_core.evaluation.linear_probe", "esvit_core.reporting.report"]


def modules() -> Iterator[tuple[str, Path]]:
    """Name and file of every module of ours, tests excluded."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "tests" not in parts:
                yield ".".join((package, *parts)).removesuffix(".__init__"), path


MODULES = dict(modules())


def imported(name: str, path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import name`: the name may be a module of the package.
            found |= {m if (m := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found


def belongs(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


IMPORTS = {name: imported(name, path) for name, path in MODULES.items()}


def test_dependencies_point_one_way() -> None:
    wrong = {}
    for name, found in IMPORTS.items():
        layer = max((package for package in ALLOWED if belongs(name, {package})), key=len)
        allowed = ALLOWED[layer] | {layer}
        ours = {m for m in found if belongs(m, set(FOLDERS))}
        if not_allowed := sorted(
            m for m in ours if not belongs(m, allowed) and not (layer != "esvit_core" and m == "esvit_core")
        ):
            wrong[f"{name}, in {layer}, which may import {sorted(allowed)}"] = not_allowed
    assert len(IMPORTS) > 200
    assert wrong == {}


def test_the_library_knows_no_orchestration() -> None:
    library = {name: found for name, found in IMPORTS.items() if belongs(name, {"esvit_core"})}
    orchestration = {"kfp", "kfp_server_api", "typer"}
    assert {name: found for name in library if (found := {m for m in IMPORTS[name] if belongs(m, orchestration)})} == {}


def test_networks_and_losses_import_torch_and_timm_only() -> None:
    known = NETWORK_LIBRARIES | sys.stdlib_module_names | set(FOLDERS)
    networks = [name for name in IMPORTS if belongs(name, {"esvit_core.models", "esvit_core.losses"})]
    assert {name: f for name in networks if (f := {m.partition(".")[0] for m in IMPORTS[name]} - known)} == {}


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
    assert not {path.name for path in MODULES.values()} & {"utils.py", "helpers.py", "common.py", "misc.py"}
