"""Wrap any timm backbone that returns a feature map in EsViT's interface (``arch: timm:convnext_tiny``)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

from esvit_core.errors import UserError
from esvit_core.models.layers.resize import ResizeByProducts

# The options that let a network accept other image sizes have different names in each family.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {"strict_img_size": False, "always_partition": True, "dynamic_mask": True},
    {"strict_img_size": False},
    {},
)
# Errors that timm's networks raise for an unsupported size; some check it, others fail at the first mismatched shape.
_SIZE_ERRORS = (AssertionError, RuntimeError, ValueError, IndexError)


class TimmBackbone(nn.Module):
    """A timm network: ``forward_features`` returns the regions in any layout, ``forward_head`` the view feature.

    Args:
        name: name for ``timm.create_model``.
        img_size: side of the images that the network is built for, pixels; ignored by networks that take any size.
        kwargs: further arguments of the network.

    Raises:
        ValueError: timm has no such network, or the network returns no feature map.
    """

    def __init__(self, name: str, img_size: int = 224, **kwargs: Any) -> None:
        super().__init__()
        self.name, self.img_size = name, img_size
        self.model: Any = _create(name, img_size, kwargs)
        features, view = self._try(img_size)
        self.prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0))
        if not _has_regions(features, self.prefix_tokens) or view.ndim != 2:
            raise ValueError("it returns no feature map; expected a network with regions")
        self.layout = _layout(features, int(self.model.num_features), getattr(self.model, "output_fmt", None))
        self.num_features = self.head_hidden_size = view.shape[-1]
        self.num_region_features = features.shape[1 if self.layout == "NCHW" else -1]
        self.feature_info = getattr(self.model, "feature_info", None)

    @torch.no_grad()
    def _try(self, size: int) -> tuple[Any, Any]:
        """Return the features and the view feature of an image of ``size`` pixels."""
        training = self.model.training
        features = self.eval().forward_features(torch.zeros(1, self.model.in_chans, size, size))
        view = self.model.forward_head(features, pre_logits=True) if isinstance(features, Tensor) else None
        self.train(training)
        return features, view

    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Try crops of ``sizes`` pixels, so that an unsupported recipe fails before its first step.

        Raises:
            UserError: the network does not accept one of the sizes.
        """
        for size in sizes:
            self._try(size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the regions in the layout of the network.

        Raises:
            UserError: the network does not accept images of this size.
        """
        try:
            with _deterministic_resizing(x):
                return self.model.forward_features(x)
        except _SIZE_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError) or not self._rejects_size(x):
                raise
            size = " x ".join(str(side) for side in x.shape[2:])
            why = f" ({error})" if str(error) else ""
            raise UserError(
                f"timm:{self.name}: does not accept crops of {size} px{why}; change the crop sizes or the network"
            ) from None

    def _rejects_size(self, x: Tensor) -> bool:
        """Return whether the size of ``x`` is the cause of the failure: the network works at its own size."""
        size, own = tuple(x.shape[2:]), (self.img_size, self.img_size)
        return self._fails(x, size) and (size == own or not self._fails(x, own))

    @torch.no_grad()
    def _fails(self, like: Tensor, size: tuple[int, ...]) -> bool:
        """Return whether the network fails on one blank image of ``size``."""
        training = self.training
        try:
            self.eval()
            with torch.compiler.set_stance("force_eager"):  # a failure of the compiler is not the size's
                self.model.forward_features(like.new_zeros(1, like.shape[1], *size))
        except _SIZE_ERRORS:
            return True
        finally:
            self.train(training)
        return False

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the view feature (B, D), or class logits, of the output of ``forward_features``."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _deterministic_resizing(x):
            return self.model.forward_intermediates(x, *args, **kwargs)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.model.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in names}

    def _regions(self, features: Tensor) -> Tensor:
        """Return the regions as (B, N, D), without prefix tokens."""
        if self.layout == "NCHW":
            return features.flatten(2).mT
        return features.flatten(1, 2) if self.layout == "NHWC" else features[:, self.prefix_tokens :]

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return view features (B, D) and regions (B, N, D')."""
        features = self.forward_features(x)
        return self.forward_head(features, pre_logits=True), self._regions(features)

    def last_blocks(self, x: Tensor, n: int = 4) -> Tensor:
        """Return the linear-probe feature: the averages of timm's last ``n`` feature maps, concatenated, (B, D')."""
        try:
            maps = self.forward_intermediates(x, indices=None, intermediates_only=True)[-n:]
        except AttributeError:  # the network has no forward_intermediates
            return self._regions(self.forward_features(x)).mean(1)
        return torch.cat([y.mean((2, 3)) for y in maps], -1)

    def view_and_last_blocks(self, x: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
        """Return view feature (B, D) and linear-probe feature (B, D'), in one pass.

        Raises:
            UserError: the network does not accept images of this size.
        """
        try:
            features, maps = self.forward_intermediates(x, indices=None)
        except AttributeError:  # the network has no forward_intermediates
            views, regions = self.views_and_regions(x)
            return views, regions.mean(1)
        except _SIZE_ERRORS:
            self.forward_features(x)  # says so if it is the size
            raise
        view = self.forward_head(features, pre_logits=True)
        return view, torch.cat([y.mean((2, 3)) for y in maps[-n:]], -1)

    def last_attention(self, x: Tensor) -> Tensor:
        """Not available for timm's networks.

        Raises:
            ValueError: always.
        """
        raise ValueError("a timm network does not return its attention; attention_map returns the norms of its regions")

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the norm of each region's feature in place of attention, (B, 1, H, W)."""
        features = self.forward_features(x)
        norms = self._regions(features).norm(dim=-1)  # (B, N)
        if self.layout == "NCHW":
            return norms.unflatten(1, features.shape[2:])[:, None]
        if self.layout == "NHWC":
            return norms.unflatten(1, features.shape[1:3])[:, None]
        height = max(1, round((norms.shape[1] * x.shape[2] / x.shape[3]) ** 0.5))
        return norms.unflatten(1, (height, -1))[:, None]


def _deterministic_resizing(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which timm's networks resize their position embeddings on a GPU by :func:`resize`."""
    return ResizeByProducts() if x.is_cuda else nullcontext()


def _create(name: str, img_size: int, arguments: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name}; `timm.list_models()` lists them")
    failure: Exception | None = None
    without_drop = {key: value for key, value in arguments.items() if key != "drop_path_rate"}
    for values in (arguments, without_drop):  # some families have no stochastic depth
        for options in (*({"img_size": img_size, **options} for options in _ANY_SIZE), *_ANY_SIZE):
            try:
                return timm.create_model(name, **{"num_classes": 0, **options, **values})
            except TypeError as error:  # the family does not have this option
                failure = error
            except _SIZE_ERRORS as error:
                failure = failure or error
    raise ValueError(str(failure))


def _has_regions(features: Any, prefix_tokens: int) -> bool:
    """Return whether the features of a square image are a map, or prefix tokens followed by the tokens of a map."""
    if not isinstance(features, Tensor):
        return False
    tokens = features.shape[1] - prefix_tokens
    return features.ndim == 4 or (features.ndim == 3 and tokens > 1 and math.isqrt(tokens) ** 2 == tokens)


def _layout(features: Tensor, width: int, stated: str | None) -> str:
    if features.ndim == 3:
        return "NLC"
    if stated in ("NCHW", "NHWC"):
        return stated
    return "NHWC" if features.shape[-1] == width and features.shape[1] != width else "NCHW"
