"""The figures of a run by name, for tools that compare runs."""

from __future__ import annotations

import contextlib

from esvit_core.reporting.result_rows import read_results, result_rows
from esvit_core.runs.training_summary import read_summary
from esvit_core.storage import NotFound, ObjectStore, join_uri

#: The results in the summary of the training; its other fields, such as the number of threads, are none.
_TRAINING = ("final_loss", "epochs", "steps", "images", "seconds", "images_per_second")


def figures_of_run(run_uri: str, store: ObjectStore) -> dict[str, float | str | None]:
    """Collect the figures of the evaluations, then those of the training; figures that are not in the store are left out.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        store: where the run is.

    Returns:
        Percentages by name: of the trained network such as ``knn/20``, of the baseline such as ``knn/20 (baseline)``. Of
        main figures also ``(difference)``, ``(low)`` and ``(high)`` of its 95 % interval, percentage points, ``(p)``,
        ``(images)``, and ``(verdict)``: better, worse, or no difference shown. Then the last mean loss, epochs, steps, images, seconds and images per second of the training.
    """
    figures: dict[str, float | str | None] = {}
    for row in result_rows(read_results(store, run_uri)):
        figures |= {row.key: row.trained, f"{row.key} (baseline)": row.baseline}
        if row.headline and (found := row.comparison):
            figures |= {
                f"{row.key} (difference)": found.points,
                f"{row.key} (low)": found.low,
                f"{row.key} (high)": found.high,
                f"{row.key} (p)": found.p,
                f"{row.key} (images)": found.images,
                f"{row.key} (verdict)": found.decision,
            }
    with contextlib.suppress(NotFound):
        drawn = store.get_json(join_uri(run_uri, "visualization", "visualization.json"))
        for name, values in drawn["figures"].items():
            figures |= {name: values["trained"], f"{name} (baseline)": values["baseline"]}
    if (training := read_summary(store, run_uri)) is not None:
        figures |= {name: getattr(training, name) for name in _TRAINING}
    return figures
