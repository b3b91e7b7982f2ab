"""Any backbone of timm that gives a feature map, behind EsViT's interface (``arch: timm:convnext_tiny``)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from esvit_core.errors import UserError

# What lets a network take crops of other sizes than its own is an option with another name in each family.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {"strict_img_size": False, "always_partition": True, "dynamic_mask": True},
    {"strict_img_size": False},
    {},
)
# How timm's networks refuse a size; not every one asks, some fail at the first shape that does not fit.
_REFUSALS = (AssertionError, RuntimeError, ValueError, IndexError)


class TimmBackbone(nn.Module):
    """A network of timm: regions from ``forward_features`` whatever their layout, the view from ``forward_head``.

    Args:
        name: as for ``timm.create_model``.
        img_size: side the network is built for, pixels; networks that fit every resolution ignore it.
        kwargs: further arguments of the network.

    Raises:
        ValueError: timm has no such network, or it gives no feature map.
    """

    def __init__(self, name: str, img_size: int = 224, **kwargs: Any) -> None:
        super().__init__()
        self.name, self.img_size = name, img_size
        self.model: Any = _create(name, img_size, kwargs)
        features, view = self._try(img_size)
        self.prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0))
        if not _has_regions(features, self.prefix_tokens) or view.ndim != 2:
            raise ValueError("gives no feature map; expected a network with regions")
        self.layout = _layout(features, int(self.model.num_features), getattr(self.model, "output_fmt", None))
        self.num_features = self.head_hidden_size = view.shape[-1]
        self.num_region_features = features.shape[1 if self.layout == "NCHW" else -1]
        self.feature_info = getattr(self.model, "feature_info", None)

    @torch.no_grad()
    def _try(self, size: int) -> tuple[Any, Any]:
        """What the network gives for an image of ``size`` pixels, and its view feature."""
        training = self.model.training
        features = self.eval().forward_features(torch.zeros(1, self.model.in_chans, size, size))
        view = self.model.forward_head(features, pre_logits=True) if isinstance(features, Tensor) else None
        self.train(training)
        return features, view

    def check_sizes(self, sizes: Iterable[int]) -> None:
        """Try crops of ``sizes`` pixels, so that a recipe is refused before its first step.

        Raises:
            UserError: the network does not take one of them.
        """
        for size in sizes:
            self._try(size)

    def forward_features(self, x: Tensor) -> Tensor:
        """Regions, in the network's own layout.

        Raises:
            UserError: the network does not take images of this size.
        """
        try:
            return self.model.forward_features(x)
        except _REFUSALS as error:
            if isinstance(error, torch.OutOfMemoryError) or not self._refuses(x):
                raise
            size = " x ".join(str(side) for side in x.shape[2:])
            why = f" ({error})" if str(error) else ""
            raise UserError(
                f"timm:{self.name}: does not take crops of {size} px{why}; change the crop sizes or the network"
            ) from None

    def _refuses(self, x: Tensor) -> bool:
        """Whether it is the size of ``x`` that the network fails at: it does not fail at its own."""
        given, own = tuple(x.shape[2:]), (self.img_size, self.img_size)
        return self._fails(x, given) and (given == own or not self._fails(x, own))

    @torch.no_grad()
    def _fails(self, like: Tensor, size: tuple[int, ...]) -> bool:
        """Whether the network fails with one blank image of ``size``."""
        training = self.training
        try:
            self.eval()
            self.model.forward_features(like.new_zeros(1, like.shape[1], *size))
        except _REFUSALS:
            return True
        finally:
            self.train(training)
        return False

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """View feature (B, D), or class logits, of ``forward_features``."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
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
        """(B, N, D) without prefix tokens."""
        if self.layout == "NCHW":
            return features.flatten(2).mT
        return features.flatten(1, 2) if self.layout == "NHWC" else features[:, self.prefix_tokens :]

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """View features (B, D) and regions (B, N, D')."""
        features = self.forward_features(x)
        return self.forward_head(features, pre_logits=True), self._regions(features)

    def last_blocks(self, x: Tensor, n: int = 4) -> Tensor:
        """The linear-probe feature: averages of the last ``n`` feature maps timm gives, concatenated, (B, D')."""
        try:
            maps = self.model.forward_intermediates(x, indices=None, intermediates_only=True)[-n:]
        except AttributeError:  # a network without intermediates
            return self._regions(self.forward_features(x)).mean(1)
        return torch.cat([y.mean((2, 3)) for y in maps], -1)

    def view_and_last_blocks(self, x: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
        """View feature (B, D) and linear-probe feature (B, D'), in two passes: timm's maps need not lead to the view."""
        return self(x), self.last_blocks(x, n)

    def last_attention(self, x: Tensor) -> Tensor:
        """Not given by timm's networks.

        Raises:
            ValueError: always.
        """
        raise ValueError("a network of timm does not show its attention; attention_map gives the strength of regions")

    def attention_map(self, x: Tensor) -> Tensor:
        """In place of attention the norm of each region's feature, (B, 1, H, W)."""
        features = self.forward_features(x)
        strength = self._regions(features).norm(dim=-1)  # (B, N)
        if self.layout == "NCHW":
            return strength.unflatten(1, features.shape[2:])[:, None]
        if self.layout == "NHWC":
            return strength.unflatten(1, features.shape[1:3])[:, None]
        height = max(1, round((strength.shape[1] * x.shape[2] / x.shape[3]) ** 0.5))
        return strength.unflatten(1, (height, -1))[:, None]


def _create(name: str, img_size: int, given: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name}; `timm.list_models()` lists them")
    refused: Exception | None = None
    without_drop = {key: value for key, value in given.items() if key != "drop_path_rate"}
    for values in (given, without_drop):  # nor has each family stochastic depth
        for options in (*({"img_size": img_size, **options} for options in _ANY_SIZE), *_ANY_SIZE):
            arguments: dict[str, Any] = {"num_classes": 0, **options, **values}
            try:
                return timm.create_model(name, **arguments)
            except TypeError as error:  # an option this family does not have
                refused = error
            except _REFUSALS as error:  # a size
                refused = refused or error
    raise ValueError(str(refused))


def _has_regions(features: Any, prefix_tokens: int) -> bool:
    """Whether the features of a square image are a map, or the tokens of one behind others."""
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
