"""EsViT: self-supervised pre-training of vision backbones (ICLR 2022, arXiv 2106.09785)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_backbone"]

if TYPE_CHECKING:
    from esvit_core.weights.backbone import load_backbone


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `import esvit_core` must not.
    if name == "load_backbone":
        from esvit_core.weights.backbone import load_backbone

        return load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
