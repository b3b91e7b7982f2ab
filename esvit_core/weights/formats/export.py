"""Write a backbone for other tools, and compare what they make of it with the network itself."""

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
    """A way to write a backbone.

    Attributes:
        write: of the backbone, its description, and whether regions are wanted, to a path.
        read: what was written, by the tool it is for, as a function of images.
        bound: largest difference of any feature that is allowed. 0: every bit.
        scaled: the bound grows with the largest feature where that is above 1, since other arithmetic than PyTorch's
            rounds relative to it (networks that do not end in a norm have features of tens or hundreds).
        suffix: of the file; empty: it is a folder.
        reader: the tool, in words.
        usage: of the path and the description, the lines of Python that load it.
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
_COUNTS = (1, 3)  # images at a time: neither is the number a network is traced with


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the network it came from.

    Attributes:
        path: file or folder.
        bytes: its size.
        told: the differences, in a line.
        usage: lines of Python that load it.
        view: largest difference of a view feature.
        regions: largest difference of a region feature; None where the format was asked for none.
    """

    path: Path
    bytes: int
    told: str
    usage: list[str]
    view: float = 0.0
    regions: float | None = None


def export_backbone(backbone: nn.Module, format: str, out: Path, regions: bool = False) -> Exported:
    """Write a backbone in another format, read it back with the tool it is for, and compare the features.

    Args:
        backbone: as :func:`esvit_core.weights.backbone.load_backbone` gives it, on the CPU, in eval mode.
        format: one of :data:`FORMATS`.
        out: file or folder, which appears whole and right, or not at all.
        regions: an ONNX file or exported program gives the regions as a second output.

    Raises:
        UserError: no such format; ``out`` exists or cannot be written; the tool is not installed, knows no such
            network, or gives other features than allowed.
    """
    chosen = format_named(format)
    require_absent(out, (chosen.suffix,) if chosen.suffix else ())
    description: dict[str, Any] = backbone.backbone_config  # type: ignore[assignment]
    with atomic_write(out) as written:
        try:
            chosen.write(backbone, written, description, regions)
        except RuntimeError as error:  # PyTorch's exporters, of what they do not follow
            reason = str(error).rpartition("Exception summary")[2].strip() or type(error).__name__
            raise UserError(f"format {format}: {description['arch']} cannot be written ({reason[:200]})") from error
        size = description["img_size" if format == "timm" else "eval_crop"]
        view, region, largest = largest_differences(backbone, chosen.read(written), description, size)
        allowed = chosen.bound * max(1.0, largest) if chosen.scaled else chosen.bound
        of_regions = "" if region is None else f", of a region {region:.1e}"
        told = (
            f"read back by {chosen.reader}: largest difference of a view feature {view:.1e}{of_regions} "
            f"on random images of {size} px (allowed {allowed:.1g})"
        )
        if not all(value <= allowed for value in (view, region or 0.0)):  # nor does NaN pass
            raise UserError(f"format {format}: {told}; nothing was left in {out}")
    return Exported(out, size_of(out), told, chosen.usage(out, description), view, region)


@torch.no_grad()
def largest_differences(
    backbone: nn.Module, read: Reader, description: dict[str, Any], size: int
) -> tuple[float, float | None, float]:
    """Compare on random images of ``size`` pixels.

    Returns:
        The largest absolute difference of a view feature, and of a region feature where ``read`` gives regions; the
        largest absolute feature of the network itself.
    """
    ours = FeatureNetwork(backbone, regions=True).eval()
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(description[key]).view(3, 1, 1) for key in ("mean", "std"))
    found: list[list[float]] = []
    largest = 0.0
    for count in _COUNTS:
        images = (torch.rand(count, 3, size, size, generator=generator) - mean) / std
        pairs = list(zip(ours(images), read(images), strict=False))
        found.append([float((a - b).abs().max()) for a, b in pairs])
        largest = max(largest, *(float(a.abs().max()) for a, _ in pairs))
    view, *regions = torch.tensor(found).amax(0).tolist()  # NaN stays NaN
    return view, regions[0] if regions else None, largest


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        UserError: there is none.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: unknown; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(p.stat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file())
