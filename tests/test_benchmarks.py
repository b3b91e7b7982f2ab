"""The benchmarks measure what they say: the plain step is the same algorithm as ours, and made images have true masks."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import numpy as np
import pytest
import shapes
import torch
import transfer
from PIL import Image
from plain_networks import plainly
from plain_step import PlainStep
from published_step import load
from step import OurStep, arguments, crops_of, implementations

from esvit_core.config import Config
from esvit_core.evaluation.transfer import LAMBDAS
from esvit_core.models.factory import create_backbone
from esvit_core.training.optim.schedules import Schedules
from esvit_core.training.state import seed_step
from esvit_core.training.step_timer import PARTS, StepTimer

NETWORKS = {
    "swin": {"arch": "swin", "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 7},
    "vil_2262": {"arch": "vil_2262"},
    "cvt_tiny": {"arch": "cvt_tiny"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plain_network_computes_equal_features_and_gradients(name: str) -> None:
    config = Config.from_mapping({"model": NETWORKS[name] | {"drop_path": 0.0}}).model
    torch.manual_seed(0)
    network = create_backbone(config, 64)
    for parameter in network.parameters():  # initial biases are zero, and would hide a difference
        torch.nn.init.normal_(parameter, std=0.05)
    results = []
    for make in (lambda n: n, plainly):
        made = make(network).train()
        made.zero_grad()
        torch.manual_seed(3)  # ViL draws a neighbour
        crops = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
        features = made.forward_features(crops)
        features.square().mean().backward()
        results.append([features.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-4 * ours.abs().max().item() + 1e-7)


@pytest.mark.parametrize("region", [True, False])
def test_the_plain_step_computes_equal_losses_and_weights(region: bool) -> None:
    config = Config.from_mapping(
        {
            "augment": {
                "global_crops": {"size": 64, "number": 2, "scale": (0.4, 1)},
                "local_crops": {"size": 32, "number": 2, "scale": (0.05, 0.4)},
            },
            "model": NETWORKS["swin"] | {"drop_path": 0.1},
            "head": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8},
            "objective": {"region": region},
            "optimizer": {"freeze_last_layer_epochs": 1, "warmup_epochs": 0, "clip_grad": 0.1},
            "training": {"batch_size": 3, "epochs": 40},
        }
    )
    schedules = Schedules(config, 1)
    steps = [make(config, torch.device("cpu"), torch.float32) for make in (OurStep, PlainStep)]
    for number in range(3):
        losses = []
        for step in steps:
            steps[0].state.progress.step = number

            seed_step(config.seed, number, 0)  # stochastic depth
            losses.append(float(step(crops_of(config, 3), schedules.at(number))))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for who in ("student", "teacher"):
        ours, plain = (getattr(step, who).state_dict() for step in steps)
        for name, value in ours.items():
            torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_folder_without_the_published_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected a checkout of microsoft/esvit, with main_esvit\.py in it"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--dtype", "both"], ["plain-float32", "ours-float32", "ours-bfloat16"]),
        (["--reference", "x"], ["published-float32", "ours-float32", "ours-bfloat16"]),
        (["--dtype", "bfloat16"], ["plain-float32", "plain-bfloat16", "ours-bfloat16"]),
        (["--device", "cuda", "--dtype", "float16"], ["plain-float16", "ours-bfloat16"]),
    ],
)
def test_the_options_select_the_implementations(options: list[str], names: list[str]) -> None:
    assert implementations(arguments(["--device", "cpu", *options])) == names


def test_the_clock_times_every_part_of_a_step() -> None:
    config = Config.from_mapping(
        {
            "augment": {
                "global_crops": {"size": 32, "number": 2, "scale": (0.4, 1)},
                "local_crops": {"size": 16, "number": 1, "scale": (0.05, 0.4)},
            },
            "model": NETWORKS["swin"],
            "head": {"out_dim": 16, "hidden_dim": 8, "bottleneck_dim": 8},
            "training": {"batch_size": 2},
        }
    )
    step, clock = OurStep(config, torch.device("cpu"), torch.float32), StepTimer(torch.device("cpu"))
    crops, at = crops_of(config, 2), Schedules(config, 1).at(0)
    with clock.attached(step.student, step.teacher, step.objective, step.optimizer), clock.step():
        step(crops, at)
    assert all(clock.seconds[part] > 0 for part in PARTS)
    taken = dict(clock.seconds)
    step(crops, at)
    assert clock.seconds == taken, "the clock is still attached"


@pytest.mark.parametrize("prototypes", [64, 16384])
def test_a_step_in_bfloat16_is_close_to_float32(prototypes: int) -> None:
    """The stated tolerance: the loss to 0.5 %, the whole gradient within 5 % of its length, its direction to 0.999."""
    config = Config.from_mapping(
        {
            "augment": {
                "global_crops": {"size": 64, "number": 2, "scale": (0.4, 1)},
                "local_crops": {"size": 32, "number": 2, "scale": (0.05, 0.4)},
            },
            "model": NETWORKS["swin"],
            "head": {"out_dim": prototypes, "hidden_dim": 32, "bottleneck_dim": 16},
            "optimizer": {"freeze_last_layer_epochs": 0, "clip_grad": 0},
            "training": {"batch_size": 4},
        }
    )
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        step = OurStep(config, torch.device("cpu"), dtype)
        losses.append(float(step(crops_of(config, 4), Schedules(config, 1).at(0))))
        gradients.append(torch.cat([p.grad.flatten() for p in step.student.parameters() if p.grad is not None]))
    exact, rounded = gradients
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert (rounded - exact).norm() < 0.05 * exact.norm()
    assert torch.cosine_similarity(rounded, exact, 0) > 0.999


def test_the_parts_of_the_gpu_benchmark_fail_and_time_out_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path), "--recipe", "no-such-recipe"])
    monkeypatch.setitem(gpu.LIMITS, "loader", 6.0)
    script = tmp_path / "gpu.py"
    script.write_text(
        "import sys, time\n"
        "part = sys.argv[-1]\n"
        "if part == 'loader': time.sleep(600)\n"
        "print('{\"images_per_second\": 5.0}') if part == 'resume' else sys.exit(3)\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    results = gpu.run_parts(["step", "loader", "resume"], 60.0)
    assert results == {
        "step": {"left_out": "failed with exit code 3, see above"},
        "loader": {"left_out": "not done within 6 s"},
        "resume": {"images_per_second": 5.0},
    }
    assert gpu.run_parts(["step"], 1.0) == {"step": {"left_out": "no time is left"}}
    text = gpu.markdown("a GPU", "python benchmarks/gpu.py", results)
    assert "| loader | not measured: not done within 6 s |" in text


def test_the_gpu_benchmark_writes_a_table() -> None:
    step = {"seconds": 0.05, "images_per_second": 1280.0, "mfu": 0.25, "peak_bytes": 18e9, "planned_bytes": 18.4e9}
    results = {
        "step": {"64": step | {"precision": "bfloat16", "objective": "fused Triton kernels"}},
        "loader": {"workers": 6, "cores": 16, "images_per_second": 1500.0},
        "resume": {"resumed_from": [4], "seconds_to_first_step_after_kill": 9.5},
        "compare": {"table": ["seconds"], "step_bfloat16": 3.2},
    }
    lines = gpu.markdown("one GPU", "python benchmarks/gpu.py", results).splitlines()
    assert "| step of 64 images, bfloat16, fused Triton kernels | 50.0 ms, 1,280 images/s, 25 % of the peak, 18.0 GB (planned 18.4) |" in lines  # fmt: skip
    assert "| loader, worker processes 6, cores 16 | 1,500 images/s |" in lines
    assert "| killed and started again | first step after 9.5 s, from [4] |" in lines
    assert "| our step, times as fast as the other | 3.20 |" in lines


def test_made_shapes_lie_where_their_masks_say() -> None:
    rng = np.random.default_rng(0)
    pixels, mask = shapes.draw(rng, [0, 3])
    assert set(np.unique(mask)) == {0, 1, 4} and (mask > 0).mean() < 0.5
    again = shapes.draw(np.random.default_rng(0), [0, 3])
    np.testing.assert_array_equal(pixels, again[0])
    ground = pixels[mask == 0].astype(float)
    inside = pixels[mask == 4].astype(float)
    assert np.abs(inside.mean(0) - ground.mean(0)).max() > 10


def test_drawings_have_the_class_of_their_folder_where_they_are_not_white(tmp_path: Path) -> None:
    for name, color in (("a", 0), ("b", 200)):
        (tmp_path / "drawings" / name).mkdir(parents=True)
        pixels = np.full((8, 8, 3), 255, np.uint8)
        pixels[2:5, 2:5] = color
        Image.fromarray(pixels).save(tmp_path / "drawings" / name / "1.png")
    shapes.make_drawings(tmp_path / "masked", str(tmp_path / "drawings"))
    masks = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "masked" / "masks").iterdir())]
    assert [mask[3, 3] for mask in masks] == [1, 2] and all(mask[0, 0] == 0 for mask in masks)


def test_the_transfer_benchmark_takes_classes_with_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transfer.LAMBDAS", LAMBDAS[::16])
    monkeypatch.setattr("sys.argv", ["transfer.py", "--sets", "samples", "--images", "60"])
    transfer.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["sets"] == 1 and result["same_validation_score"] in (0, 1) and result["time"] > 0
