"""The network of a configuration on fake tensors, which have shapes and no values: it takes a second and no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.models.multicrop import MultiCropNetwork, build_network

_REFUSALS = (RuntimeError, AssertionError, ValueError, ZeroDivisionError, IndexError)


@contextmanager
def fake_network(config: Config, device_type: str = "cpu") -> Iterator[MultiCropNetwork]:
    """Build the student of ``config`` with its heads, in training mode; tensors made in the context are fake too.

    Args:
        config: configuration of the run.
        device_type: device of all these tensors; a fake GPU needs no real one.

    Raises:
        UserError: the architecture does not exist or refuses the settings of the section ``model``.
    """
    mode, device = FakeTensorMode(allow_non_fake_inputs=True), torch.device(device_type)
    try:
        network = _build(config, mode, device)
    except _REFUSALS as error:
        raise UserError(f"model {config.model.arch}: {error}; change the recipe's `model` section") from None
    with mode, device:
        yield network


def _build(config: Config, mode: FakeTensorMode, device: torch.device) -> MultiCropNetwork:
    try:
        with mode, device:
            return build_network(config).train()
    except (UserError, *_REFUSALS):  # timm's ViTs read values while they are built, their drop path rates
        network = build_network(config).train()
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(_fake(parameter, mode, device), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _fake(buffer, mode, device))
    return network


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def fake_crops(images: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Crops of ``images`` images, one tensor (B, 3, S, S) for each of ``sizes``; call it in :func:`fake_network`."""
    return [torch.empty(images, 3, size, size) for size in sizes]


def require_crop_sizes(network: MultiCropNetwork, config: Config) -> None:
    """Return if the backbone takes crops of every size that training and evaluation feed it.

    Args:
        network: from :func:`fake_network`.

    Raises:
        UserError: it refuses one; the message names the setting.
    """
    augment = config.augment
    sizes = [
        ("augment.global_crops.size", augment.global_crops.size),
        *(("augment.local_crops.size", kind.size) for kind in augment.local_kinds if kind.number),
        ("evaluation.crop", config.evaluation.crop),
    ]
    taken = set()
    for setting, size in sizes:
        if size in taken:
            continue
        try:
            with torch.no_grad():
                network.backbone.views_and_regions(*fake_crops(2, [size]))
        except _REFUSALS as error:
            raise UserError(
                f"{setting} {size}: {config.model.arch} does not take crops of {size} pixels ({error}); change the size "
                "or the recipe's `model` section"
            ) from None
        taken.add(size)


@contextmanager
def naming_refused_sizes(network: MultiCropNetwork, config: Config) -> Iterator[None]:
    """If a forward pass on the recipe's crops fails in the context, find the size that is refused.

    Raises:
        UserError: see :func:`require_crop_sizes`.
    """
    try:
        yield
    except _REFUSALS:
        require_crop_sizes(network, config)
        raise
