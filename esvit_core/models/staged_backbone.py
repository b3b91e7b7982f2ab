"""Interface that the multi-stage backbones (Swin, CvT, ViL) share: timm's and EsViT's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class StagedBackbone(nn.Module):
    """Base of a backbone whose stages produce maps (B, H, W, C).

    A subclass sets the attributes below and implements :meth:`run_stages` and :meth:`keep_stages`.

    Attributes:
        norm: norm after the last stage.
        head: classifier head.
        num_stages: number of stages.
        num_features: width D of the last stage.
        num_classes: outputs of the classifier; 0: no classifier.
        global_pool: pooling of :meth:`forward_head`.
        feature_info: width, reduction and module of each stage, for timm.
    """

    output_fmt = "NHWC"

    norm: nn.Module
    head: ClassifierHead
    num_stages: int
    num_features: int
    num_classes: int
    global_pool: str
    feature_info: list[dict[str, Any]]

    def run_stages(self, x: Tensor, stages: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Run the first ``stages`` stages on images (B, 3, H, W).

        Yields:
            For each stage the maps after its blocks, each (B, H, W, C), and the stage's output.
        """
        raise NotImplementedError

    def keep_stages(self, stages: int) -> None:
        """Remove all but the first ``stages`` stages."""
        raise NotImplementedError

    # timm's interface

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay besides biases and norms: none, as in the published recipes."""
        return set()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the regions after the last norm, (B, H, W, D)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map regions (B, H, W, D) to the view feature (B, D), or to class logits."""
        return self.head(x, pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the outputs of the stages (in Swin those before patch merging), as timm's models do.

        Returns:
            The maps of the chosen stages (B, C, H, W); before them, unless ``intermediates_only``, the regions.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt}: expected NCHW or NHWC")
        final = self.num_stages - 1
        chosen, last = feature_take_indices(self.num_stages, indices)
        maps = []
        for i, (blocks, output) in enumerate(self.run_stages(x, last + 1 if stop_early else self.num_stages)):
            regions = output
            if i in chosen:
                y = self.norm(blocks[-1]) if norm and i == final else blocks[-1]
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        return (self.norm(regions) if i == final else regions), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen stages do not need, as in timm's models.

        Returns:
            The chosen stages, counted from the first.
        """
        chosen, last = feature_take_indices(self.num_stages, indices)
        shortened = last < self.num_stages - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.keep_stages(last + 1)
            self.num_stages = last + 1
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return chosen

    # EsViT's interface

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return view features (B, D) and regions (B, N, D)."""
        regions = self.forward_features(x).flatten(1, 2)  # (B, N, D)
        return regions.mean(1), regions

    def last_blocks(self, x: Tensor, n: int = 4) -> Tensor:
        """Return the linear-probe feature of the last ``n`` blocks, (B, D'); only the last stage is normed."""
        return self.view_and_last_blocks(x, n)[1]

    def view_and_last_blocks(self, x: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
        """Return the view feature (B, D) of :meth:`forward` and the linear-probe feature (B, D') in one pass.

        The linear-probe feature concatenates the averages of the last ``n`` blocks.
        """
        outputs: list[Tensor] = []
        for i, (blocks, _) in enumerate(self.run_stages(x, self.num_stages)):
            outputs += [self.norm(y) if i == self.num_stages - 1 else y for y in blocks]
        return self.forward_head(outputs[-1]), torch.cat([y.mean((1, 2)) for y in outputs[-n:]], -1)
