"""The step of a retraining that evaluates the champion on the images of its challenger."""

from __future__ import annotations

from esvit_core.registry.champions import pointer_uri
from esvit_core.registry.comparison import CHAMPION, compare_with_champion, comparison_uri
from esvit_core.runs.run import PROMOTION, RETRAINING, Run, name_of_run
from esvit_core.storage import split_uri


def compare_with_current(run: Run) -> tuple[str, dict[str, float], str]:
    """Evaluate the current champion on the run's images if the run is a retraining without a decision.

    Returns:
        Address of the comparison, empty if there is none; the champion's figures by name, percent; and a message that
        says what was done.
    """
    if run.store.exists(run.at(PROMOTION)) or not run.store.exists(run.at(RETRAINING)):
        return "", {}, "already done: the run was compared before"
    current = run.store.read_pointer(pointer_uri(split_uri(run.uri)[0], run.config.promotion.pointer))
    if current is None:
        return "", {}, "there is no champion yet to compare with"
    if current.value["run"] == run.uri:
        return "", {}, "already done: the run is the champion"
    compared = compare_with_champion(run.uri, run.store, run.config, current.value)
    figures: dict[str, float] = {}
    for result in compared["results"].values():
        figures |= result["results"].get(CHAMPION, {})
    summary = ", ".join(f"{name} {value:.1f} %" for name, value in figures.items()) or "no figures"
    name = name_of_run(current.value["run"])
    return comparison_uri(run.uri, current.value), figures, f"champion {name} ({compared['how']}): {summary}"
