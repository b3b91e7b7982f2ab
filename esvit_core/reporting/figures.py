"""The figures of a run by name, for what puts runs beside each other."""

from __future__ import annotations

import contextlib

from esvit_core.reporting.result_table import read_results, summarise
from esvit_core.runs.training_summary import read_summary
from esvit_core.storage import NotFound, ObjectStore, join_uri

#: Of the summary of the training: the others, such as the number of threads, are no result.
_TRAINING = ("final_loss", "epochs", "steps", "images", "seconds", "images_per_second")


def figures_of_run(run_uri: str, store: ObjectStore) -> dict[str, float | None]:
    """What was measured, and after it how the training went; what is not in the store is left out.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        store: where the run is.

    Returns:
        Percent of the trained network by the figure's name, such as ``knn/20``, and of the network with its initial
        weights as ``knn/20 (baseline)``; of the training the last mean loss, epochs, steps, images, seconds.
    """
    figures: dict[str, float | None] = {}
    for row in summarise(read_results(store, run_uri)):
        figures |= {row.key: row.trained, f"{row.key} (baseline)": row.baseline}
    with contextlib.suppress(NotFound):
        drawn = store.get_json(join_uri(run_uri, "visualization", "visualization.json"))
        for name, values in drawn["figures"].items():
            figures |= {name: values["trained"], f"{name} (baseline)": values["baseline"]}
    if (training := read_summary(store, run_uri)) is not None:
        figures |= {name: getattr(training, name) for name in _TRAINING}
    return figures
