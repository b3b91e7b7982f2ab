"""Nothing computes on the CPU where there is a GPU that torch cannot use, unless it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.evaluation import visualize
from esvit_core.evaluation.linear_probe import linear_probe
from esvit_core.runs import gpus
from esvit_core.runs.gpus import accelerators_setting, computing_device, computing_devices, require_usable_gpus


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of device files, empty, on a machine whose torch can use no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_a_gpu_that_torch_cannot_use_is_an_error(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert computing_devices() == [torch.device("cpu")]
    with pytest.raises(
        UserError,
        match=r"^cluster\.train\.accelerators: this pod was given GPUs, and torch .* can use none \(.+\); inst",
    ):
        require_usable_gpus("cluster.train.accelerators")
    (devices / "nvidia0").touch()
    with pytest.raises(UserError, match=r'this machine has a GPU, and torch .*CUDA_VISIBLE_DEVICES="" to compute'):
        computing_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert computing_device() == torch.device("cpu")


def test_a_gpu_that_torch_can_use_is_no_error(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (devices / "nvidia0").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_usable_gpus("cluster.train.accelerators")


def test_the_setting_counts_in_a_pod_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.load("demo", ["cluster.evaluate.accelerators=1"])
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert accelerators_setting(config, "evaluate") == ""
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert accelerators_setting(config, "evaluate") == "cluster.evaluate.accelerators"
    assert accelerators_setting(config, "train") == ""


def probe() -> object:
    features, labels = np.zeros((4, 2), np.float32), np.zeros(4, np.int64)
    return linear_probe(features, labels, features, labels, 2, Config().evaluation.linear)


@pytest.mark.parametrize("compute", [lambda: visualize._on_device(nn.Linear(2, 2)), probe], ids=["visualize", "probe"])
def test_evaluations_do_not_use_the_cpu_silently(devices: Path, compute: Callable[[], object]) -> None:
    (devices / "nvidia0").touch()
    with pytest.raises(UserError, match="this machine has a GPU"):
        compute()
