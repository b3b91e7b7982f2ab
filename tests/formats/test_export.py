"""Exports give the same features in their target tool; a failed export is reported and leaves nothing behind."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from esvit_core.errors import UserError
from esvit_core.models.region_map import view_and_region_map
from esvit_core.weights.backbone import load_backbone
from esvit_core.weights.formats import onnx_model, timm_folder
from esvit_core.weights.formats.export import FORMATS, Format, export_backbone

OURS = ["swin", "cvt_tiny", "vil_2262", "deit_tiny", "resnet50"]


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def run_lines(lines: list[str]) -> dict[str, Any]:
    """Run the lines of Python that an export prints."""
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names


@torch.no_grad()
@pytest.mark.parametrize("arch", [*OURS, "timm:resnet10t", "timm:test_vit"])
def test_onnx_runs_with_any_number_of_images(arch: str, described: Any, tmp_path: Path) -> None:
    size = 32 if arch in OURS else 64
    backbone = described(arch, size)
    done = export_backbone(backbone, "onnx", tmp_path / "net.onnx", regions=True)
    assert done.view < 1e-4 and done.regions is not None and done.regions < 1e-4
    run = onnx_model.read(tmp_path / "net.onnx")
    for count in (1, 2, 5):
        view, regions = run(images(count, size))
        ours = view_and_region_map(backbone, images(count, size))
        torch.testing.assert_close((view, regions), ours, atol=1e-4, rtol=1e-4)


def test_onnx_contains_the_preprocessing(described: Any, tmp_path: Path) -> None:
    import onnx

    done = export_backbone(described("resnet50"), "onnx", tmp_path / "net.onnx")
    assert run_lines(done.usage)["view"].shape == (1, 40)
    model = onnx.load(tmp_path / "net.onnx")
    message = {entry.key: entry.value for entry in model.metadata_props}
    assert (
        json.loads(message["mean"]) == [0.485, 0.456, 0.406]
        and message["eval_crop"] == "32"
        and message["arch"] == "resnet50"
    )
    assert [(o.domain, o.version) for o in model.opset_import] == [("", onnx_model.OPSET)]
    assert [output.name for output in model.graph.output] == ["view_features"]
    batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [d.dim_value for d in rest] == [3, 32, 32]
    onnx.checker.check_model(model)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["swin", "vil_2262"])  # the others go the same way to ONNX
def test_an_exported_program_needs_torch_only(arch: str, described: Any, tmp_path: Path) -> None:
    backbone = described(arch)
    done = export_backbone(backbone, "torch-export", tmp_path / "net.pt2", regions=True)
    assert done.view < 1e-5
    assert run_lines(done.usage)["regions"][0].shape[0] == 1
    inside = {"backbone.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=inside)
    assert json.loads(inside["backbone.json"])["num_features"] == backbone.num_features
    view, regions = program.module()(images(4))
    torch.testing.assert_close(view, backbone(images(4)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(regions, view_and_region_map(backbone, images(4))[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_project_s_own_format_is_bitwise(described: Any, tmp_path: Path) -> None:
    backbone = described("swin")
    done = export_backbone(backbone, "safetensors", tmp_path / "net")
    assert (done.view, done.regions) == (0, 0)
    assert torch.equal(load_backbone(tmp_path / "net")(images(2)), backbone(images(2)))


@torch.no_grad()
@pytest.mark.parametrize(("window", "size"), [(4, 32), (2, 64)])
def test_swin_of_any_size_loads_in_stock_timm(window: int, size: int, described: Any, tmp_path: Path) -> None:
    backbone = described("swin", size, window_size=window)
    export_backbone(backbone, "timm", tmp_path / "net")
    eps = functools.partial(nn.LayerNorm, eps=1e-6)
    stock = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, num_classes=0, norm_layer=eps).eval()
    assert type(stock).__module__ == "timm.models.swin_transformer"
    torch.testing.assert_close(stock(images(3, size)), backbone(images(3, size)), atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["esvit"]["norm_eps"] == 1e-6 and "eps=1e-6" in config["esvit"]["load"]
    again = timm.create_model(config["architecture"], num_classes=0, norm_layer=eps, **config["model_args"])
    assert again.state_dict().keys() == stock.state_dict().keys()
    prepared = timm.data.resolve_model_data_config(stock)
    assert prepared["input_size"] == (3, size, size) and prepared["crop_pct"] == pytest.approx(size / (size + 4))


@torch.no_grad()
def test_the_code_in_the_file_loads_it(described: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = described("swin")
    export_backbone(backbone, "timm", tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    code = json.loads(Path("net/config.json").read_text())["esvit"]["load"]
    stock = eval(code, {"timm": timm, "torch": torch, "functools": functools}).eval()
    torch.testing.assert_close(stock(images(2)), backbone(images(2)), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "sizes"), [("deit_small", {"embed_dim": 24, "patch_size": 8}), ("timm:resnet10t", {})]
)
def test_other_networks_load_in_stock_timm_without_warnings(
    arch: str, sizes: dict[str, int], described: Any, tmp_path: Path
) -> None:
    backbone = described(arch, 64, **sizes)
    export_backbone(backbone, "timm", tmp_path / "net")
    stock = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(stock(images(2, 64)), backbone(images(2, 64)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arch", ["cvt_tiny", "vil_2262"])
def test_networks_that_timm_does_not_have_are_reported(arch: str, described: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"format timm: model\.arch {arch}: .*safetensors, onnx and torch-export support every network"
    ):
        export_backbone(described(arch), "timm", tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_differing_result_is_refused(described: Any, tmp_path: Path) -> None:
    # Maps of 9 and 5 tokens are no whole number of windows: timm shifts before it pads, EsViT pads before it shifts.
    backbone = described("swin", 36, depths=(2, 2))
    with pytest.raises(UserError, match=r"stock timm: largest difference .*\(allowed 0\.001\); nothing was written"):
        export_backbone(backbone, "timm", tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_nan_is_refused(described: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FORMATS["torch-export"]
    broken = Format(
        real.write,
        lambda path: lambda x: (torch.full((len(x), 40), torch.nan),),
        1.0,
        True,
        ".pt2",
        "nobody",
        real.usage,
    )
    monkeypatch.setitem(FORMATS, "torch-export", broken)
    with pytest.raises(UserError, match="largest difference of a view feature nan"):
        export_backbone(described("resnet50"), "torch-export", tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_reported_before_any_work(described: Any, tmp_path: Path) -> None:
    backbone = nn.Identity()
    (tmp_path / "there.onnx").touch()
    for format, out, message in [
        ("onxx", "a", "unknown; expected one of safetensors, timm, onnx, torch-export"),
        ("onnx", "there.onnx", "already exists"),
        ("onnx", "a.pt2", "expected a name that ends in .onnx"),
        ("onnx", "there.onnx/a.onnx", "cannot create its folder"),
    ]:
        with pytest.raises(UserError, match=message):
            export_backbone(backbone, format, tmp_path / out)


def test_a_missing_library_is_one_line(described: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "_LIBRARIES", ("onnx", "no_such_library"))
    with pytest.raises(UserError, match=r"format onnx: no_such_library not installed; pip install 'esvit\[export\]'"):
        export_backbone(described("resnet50"), "onnx", tmp_path / "net.onnx")


def test_stock_timm_s_default_eps_gives_other_features(described: Any, tmp_path: Path) -> None:
    """The eps must be passed: without it the features differ slightly."""
    backbone = described("swin")
    export_backbone(backbone, "timm", tmp_path / "net")
    stock = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True, num_classes=0).eval()
    assert {m.eps for m in stock.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert timm_folder.loading_code("net", {}) == "timm.create_model('local-dir:net', pretrained=True, num_classes=0)"
    with torch.no_grad():
        assert (stock(images(2)) - backbone(images(2))).abs().max() > 1e-6
