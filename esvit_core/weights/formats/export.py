"""Export a backbone for other tools, and verify their features against the original network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esvit_core.errors import UserError
from esvit_core.models.region_map import FeatureNetwork
from esvit_core.storage.atomic_write import atomic_write, require_absent
from esvit_core.weights.formats import exported_program, onnx_model, safetensors_folder, timm_folder

Reader = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        write: writes the backbone with its description, optionally with regions, to a path.
        read: loads the export with its target tool and returns it as a function of images.
        bound: largest allowed difference of any feature; 0: equal bit for bit.
        scaled: multiply the bound by the largest feature if it exceeds 1, because the rounding errors of other runtimes
            are relative to it (networks without a final norm have features of tens or hundreds).
        suffix: suffix of the file; empty: the export is a folder.
        reader: name of the target tool.
        usage: returns the lines of Python that load the export, from the path and the description.
    """

    write: Callable[[nn.Module, Path, dict[str, Any], bool], None]
    read: Callable[[Path], Reader]
    bound: float
    scaled: bool
    suffix: str
    reader: str
    usage: Callable[[Path, dict[str, Any]], list[str]]


FORMATS = {
    name: Format(module.write, module.read, bound, scaled, suffix, reader, module.usage)
    for name, module, bound, scaled, suffix, reader in (
        ("safetensors", safetensors_folder, 0.0, False, "", "esvit_core.load_backbone"),
        ("timm", timm_folder, 1e-3, False, "", "stock timm"),
        ("onnx", onnx_model, 1e-3, True, ".onnx", "onnxruntime"),
        ("torch-export", exported_program, 1e-4, True, ".pt2", "torch.export.load"),
    )
}
_BATCH_SIZES = (1, 3)  # neither is the batch size that a network is traced with


@dataclass(frozen=True)
class Exported:
    """A finished export and its differences from the original network.

    Attributes:
        path: file or folder.
        bytes: size in bytes.
        summary: the differences in one line.
        usage: lines of Python that load the export.
        view: largest difference of a view feature.
        regions: largest difference of a region feature; None without regions.
    """

    path: Path
    bytes: int
    summary: str
    usage: list[str]
    view: float = 0.0
    regions: float | None = None


def export_backbone(backbone: nn.Module, format: str, out: Path, regions: bool = False) -> Exported:
    """Export a backbone, load it with the target tool, and compare the features.

    Args:
        backbone: a backbone of :func:`esvit_core.weights.backbone.load_backbone`, on the CPU, in eval mode.
        format: one of :data:`FORMATS`.
        out: file or folder; it is created only if the export is complete and verified.
        regions: give an ONNX file or exported program the regions as a second output.

    Raises:
        UserError: the format is unknown; ``out`` exists or cannot be written; or the tool is not installed, does not
            support the network, or computes features that differ by more than the bound.
    """
    chosen = format_named(format)
    require_absent(out, (chosen.suffix,) if chosen.suffix else ())
    description: dict[str, Any] = backbone.backbone_config  # type: ignore[assignment]
    with atomic_write(out) as written:
        try:
            chosen.write(backbone, written, description, regions)
        except RuntimeError as error:  # PyTorch's exporters raise it for unsupported code
            reason = str(error).rpartition("Exception summary")[2].strip() or type(error).__name__
            raise UserError(f"format {format}: {description['arch']} cannot be exported ({reason[:200]})") from error
        size = description["img_size" if format == "timm" else "eval_crop"]
        view, region, largest = largest_differences(backbone, chosen.read(written), description, size)
        allowed = chosen.bound * max(1.0, largest) if chosen.scaled else chosen.bound
        region_text = "" if region is None else f", of a region feature {region:.1e}"
        summary = (
            f"verified with {chosen.reader}: largest difference of a view feature {view:.1e}{region_text} "
            f"on random images of {size} px (allowed {allowed:.1g})"
        )
        if not all(value <= allowed for value in (view, region or 0.0)):  # NaN fails, too
            raise UserError(f"format {format}: {summary}; nothing was written to {out}")
    return Exported(out, size_of(out), summary, chosen.usage(out, description), view, region)


@torch.no_grad()
def largest_differences(
    backbone: nn.Module, read: Reader, description: dict[str, Any], size: int
) -> tuple[float, float | None, float]:
    """Compare features on random images of ``size`` pixels.

    Returns:
        The largest absolute difference of a view feature; that of a region feature, or None without regions; and the
        largest absolute feature of the original network.
    """
    ours = FeatureNetwork(backbone, regions=True).eval()
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(description[key]).view(3, 1, 1) for key in ("mean", "std"))
    differences: list[list[float]] = []
    largest = 0.0
    for count in _BATCH_SIZES:
        images = (torch.rand(count, 3, size, size, generator=generator) - mean) / std
        pairs = list(zip(ours(images), read(images), strict=False))
        differences.append([float((a - b).abs().max()) for a, b in pairs])
        largest = max(largest, *(float(a.abs().max()) for a, _ in pairs))
    view, *regions = torch.tensor(differences).amax(0).tolist()  # propagates NaN
    return view, regions[0] if regions else None, largest


def format_named(name: str) -> Format:
    """Return the format with this name.

    Raises:
        UserError: there is none.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: unknown; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def size_of(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
