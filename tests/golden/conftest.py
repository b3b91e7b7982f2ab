"""The folder of golden data, by default the copy beside this file (``--golden-dir DIR`` for another)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from esvit_core.config import ModelConfig
from esvit_core.models import MultiCropNetwork, ProjectionHead, create_backbone
from esvit_core.weights.published_names import from_published, to_published

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=None, metavar="DIR", help="folder with golden.json and its files")


def _load_fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fill", HERE / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Golden:
    """What ``golden.json`` names, and tensors and weights made from names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = json.loads((directory / "golden.json").read_text())
        self.seed: int = self.index["seed"]
        self.batch: int = self.index["batch"]
        self._fill = _load_fill()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.directory / f"{name}.npz") as file:
            return dict(file)

    def keys(self, arch: str) -> dict[str, list]:
        return json.loads((self.directory / f"{arch}.keys.json").read_text())

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self._fill.tensor(name, shape, self.seed))

    def crops(self, prefix: str = "") -> list[torch.Tensor]:
        """Two global and two local crops; ``prefix`` names another set (``step0/`` has names without sizes)."""
        suffix = (lambda size: "") if prefix else (lambda size: f"/{size}")
        return [
            self.tensor(f"{prefix}{kind}{i}{suffix(size)}", self.batch, 3, size, size)
            for kind, size in (("global", 224), ("local", 96))
            for i in range(2)
        ]

    def network(self, arch: str, seed_offset: int = 0) -> MultiCropNetwork:
        """A network with both heads and weights made from their published names, in eval mode."""
        backbone = create_backbone(ModelConfig(arch=arch, drop_path=0.0))
        heads = (ProjectionHead(backbone.num_features, self.index["head_out_dim"]) for _ in range(2))
        network = MultiCropNetwork(backbone, *heads)
        state = {name: value.numpy() for name, value in to_published(network.state_dict()).items()}
        values = self._fill.fill(state, self.seed + seed_offset)
        filled = {name: torch.from_numpy(values.get(name, value)) for name, value in state.items()}
        network.load_state_dict(from_published(filled))
        return network.eval()


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Callable[[str, Mapping[str, float]], None]:
    """``record(row, differences)`` passes the differences to ``benchmarks/golden_table.py``."""
    return lambda row, differences: record_property("golden", (row, {k: float(v) for k, v in differences.items()}))


def _golden(config: pytest.Config) -> Golden:
    # Not registered yet when the options were read if the run was started from another folder.
    return Golden(Path(config.getoption("--golden-dir", default=None) or HERE))


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Golden:
    return _golden(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    index = _golden(metafunc.config).index
    for argument, values in (
        ("forward_arch", index.get("forward", [])),
        ("key_arch", index.get("keys", [])),
        ("golden_file", [f.removesuffix(".npz") for f in index.get("files", [])]),
    ):
        if argument in metafunc.fixturenames:
            named = getattr(metafunc.function, "golden_file", "")
            metafunc.parametrize(argument, [v for v in values if f"{v}_".startswith(f"{named}_" if named else "")])
