"""Which network initial weights belong to, for the recipe ``auto``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore, join_uri
from esvit_core.storage.store_errors import NotFound
from esvit_core.weights.weight_source import FILES, TIMM, find, split_timm

PUBLISHED_SIDE = 224
_VIT_PATCH = 16
_CROPS = ((224, (96, 8)), (112, (48, 6)), (64, (32, 4)))  # side of the global crops; side and number of the local ones
_ENLARGED = 1.75  # images are not enlarged more than this


@dataclass(frozen=True)
class StartNetwork:
    """The network of initial weights.

    Attributes:
        model: values of the section ``model``.
        side: image size of the weights, pixels.
    """

    model: dict[str, Any]
    side: int

    def crops(self, short_side: int) -> list[tuple[int, tuple[int, int]]]:
        """Return the sizes of crops to choose from, the largest first.

        Args:
            short_side: median of the images' shorter sides, pixels.

        Returns:
            Side of the global crops, and side and number of the local ones, each.
        """
        own = (self.side, (self.side // 2, 4))
        known = [kind for kind in _CROPS if kind[0] <= self.side]
        kinds = known if self.side in (side for side, _ in known) else [own, *known]
        return [kind for kind in kinds if kind[0] <= _ENLARGED * short_side] or kinds[-1:]


def needs_store(source: str) -> bool:
    """Return whether the weights of ``init.source`` are in the object store."""
    return not source.startswith(TIMM) and not Path(source).exists()


def find_network(source: str, bucket: str, store: ObjectStore | None) -> StartNetwork:
    """Return the network of the weights that ``init.source`` names.

    Args:
        source: value of ``init.source``.
        bucket: bucket of the pointers.
        store: object store; required if :func:`needs_store`.

    Raises:
        UserError: the source does not exist, or its network is not known.
    """
    if source.startswith(TIMM):
        return _of_timm(source)
    if Path(source).is_dir():
        from esvit_core.weights.backbone import read_description

        return _described(read_description(Path(source)))
    if Path(source).is_file():
        return _recognized(Path(source), source)
    assert store is not None
    address, _ = find(source, "backbone", bucket, store)
    if address.endswith(FILES):
        raise UserError(
            f"init.source {source}: recipe auto recognizes the network of a file on this machine only; fetch it, or name the "
            "network with --set model.arch"
        )
    try:
        return _described(store.get_json(join_uri(address, "backbone.json")))
    except NotFound:
        raise UserError(
            f"init.source {source}: {address} contains no backbone.json, by which recipe auto knows the network; name the "
            "network with --set model.arch, or the recipe of that run"
        ) from None


def _of_timm(source: str) -> StartNetwork:
    import timm

    from esvit_core.weights.read_file import timm_settings
    from esvit_core.weights.timm_names import arch_of_timm

    name, _ = split_timm(source)
    timm_settings(name)  # checks that there is such a network
    config = timm.get_pretrained_cfg(name)
    side = config.input_size[-1] if config is not None else PUBLISHED_SIDE
    return StartNetwork({"arch": arch_of_timm(name) or f"{TIMM}{name}"}, side)


def _described(description: Mapping[str, Any]) -> StartNetwork:
    model = {name: value for name, value in description["model"].items() if value is not None}
    return StartNetwork(model, int(description["img_size"]))


def _recognized(path: Path, source: str) -> StartNetwork:
    from esvit_core.weights.fit import recognize_architecture
    from esvit_core.weights.read_file import load_file, to_snapshot
    from esvit_core.weights.snapshot import part_of

    weights = part_of(to_snapshot(load_file(path), "swin", source).teacher, "backbone")
    arch = recognize_architecture(weights, resizable=True)
    if arch is None:
        raise UserError(
            f"init.source {source}: its names and shapes match no known architecture at its default size; name the network "
            f"with --set model.arch, or timm's as --init timm:NAME:{source}"
        )
    positions = weights.get("pos_embed")
    side = PUBLISHED_SIDE if positions is None else _VIT_PATCH * math.isqrt(positions.shape[1])
    return StartNetwork({"arch": arch}, side)
