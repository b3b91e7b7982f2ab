"""The layout of several sources that are read as one: each is understood by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from esvit_core.data.ingest.layout import Assignment, Layout, LayoutSettings, measured_split
from esvit_core.errors import UserError


def combine_layouts(
    parts: Sequence[int], source: str, settings: LayoutSettings, detect: Callable[[int, LayoutSettings], Layout]
) -> Layout:
    """Determine the layout of several sources.

    Classes with the same name in several sources are one class. If no source has validation images, the test images of all
    of them are held out.

    Args:
        parts: number of the source of each image.
        source: for error messages.
        settings: how the folders are to be understood.
        detect: returns the layout of the images of one source.

    Raises:
        UserError: no source has images to train on, or the settings do not fit the sources.
    """
    numbers = sorted(set(parts))
    layouts = {n: detect(n, replace(settings, is_part=True, require_train=False)) for n in numbers}
    waiting = {number: iter(layout.assignments) for number, layout in layouts.items()}
    found: list[Assignment] = []
    for part in parts:
        each = next(waiting[part])
        found.append(replace(each, key=f"{part}/{each.key}"))
    if settings.require_train and all(each.split in ("val", "test") for each in found if each.problem is None):
        raise UserError(f"{source}: no images to train on; expected them in one of the sources, or data.splits=none")
    found, more = measured_split(found)
    messages = [f"source {number}: {line}" for number, layout in layouts.items() for line in layout.messages]
    return Layout(found, sorted({each.label for each in found if each.label}), [*messages, *more])
