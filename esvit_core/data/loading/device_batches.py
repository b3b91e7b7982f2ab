"""Batches on a GPU: copied on a stream of their own, one batch ahead of the step that takes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from esvit_core.data.loading.device_colors import DeviceColors
from esvit_core.data.loading.loader import Batch


def copy_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the GPU; while the step of one is computed, the next is copied.

    The host's batches should be in pinned memory; otherwise the copy waits for the CPU.
    """
    stream = torch.cuda.Stream(device)
    current: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        following = _copy(batch, device, stream)
        if current is not None:
            yield _ready(*current, device)
        current = following
    if current is not None:
        yield _ready(*current, device)


def crops_on(device: torch.device, batch: Batch, colors: DeviceColors | None) -> list[Tensor]:
    """Return the crops of a batch on the device, as the network takes them.

    Args:
        colors: changes the colors of levels; a batch that has draws needs it.
    """
    batch = batch.to(device)
    if batch.draws is None:
        return batch.crops
    assert colors is not None
    return colors(batch.crops, batch.draws)


def _copy(batch: Batch, device: torch.device, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
    with torch.cuda.stream(stream):
        return batch.to(device), stream.record_event()


def _ready(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Let the stream of the step wait for the copy, and keep the memory until the step has used it."""
    step = torch.cuda.current_stream(device)
    step.wait_event(copied)
    for tensor in (*batch.crops, *([] if batch.draws is None else [batch.draws])):
        tensor.record_stream(step)
    return batch
