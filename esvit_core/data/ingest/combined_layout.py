"""The layout of several sources that are read as one: each is understood by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from esvit_core.data.ingest.assignments import Assignments, Place, labels_in_use, measured_split
from esvit_core.data.ingest.layout import Layout, LayoutSettings
from esvit_core.errors import UserError


def combine_layouts(
    numbers: Sequence[int],
    names: Sequence[str],
    source: str,
    settings: LayoutSettings,
    detect: Callable[[int, LayoutSettings], Layout],
) -> Layout:
    """Determine the layout of several sources.

    Classes with the same name in several sources are one class. If no source has validation images, the test images of all
    of them are held out.

    Args:
        numbers: of the sources that have images, ascending.
        names: of the images, in the order of the sources.
        source: for error messages.
        settings: how the folders are to be understood.
        detect: returns the layout of the images of one source.

    Raises:
        UserError: no source has images to train on, or the settings do not fit the sources.
    """
    layouts = {n: detect(n, replace(settings, is_part=True, require_train=False)) for n in numbers}
    places: list[Place] = []
    places_of_files = np.empty(len(names), dtype=np.int32)
    end = 0
    for number, layout in layouts.items():
        found = layout.assignments
        places_of_files[end : end + len(found)] = found.numbers
        places_of_files[end : end + len(found)] += len(places)
        end += len(found)
        places += (place.change(key=f"{number}/{place.assignment.key}") for place in found.places)
    assignments = Assignments(names, places_of_files, places)
    splits = {each.split for each in assignments.counts() if each.problem is None}
    if settings.require_train and splits <= {"val", "test"}:
        raise UserError(f"{source}: no images to train on; expected them in one of the sources, or data.splits=none")
    assignments, more = measured_split(assignments)
    messages = [f"source {number}: {line}" for number, layout in layouts.items() for line in layout.messages]
    return Layout(assignments, labels_in_use(assignments), [*messages, *more])
