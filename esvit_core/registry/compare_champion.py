"""The step of a retraining that measures the champion on its challenger's images."""

from __future__ import annotations

from esvit_core.registry.champions import pointer_uri
from esvit_core.registry.comparison import CHAMPION, compare_with_champion, comparison_uri
from esvit_core.runs.run import PROMOTION, RETRAINING, Run, name_of_run
from esvit_core.storage import split_uri


def compare_with_present(run: Run) -> tuple[str, dict[str, float], str]:
    """Measure the present champion on the run's images, if there is reason to.

    Returns:
        The comparison's address, empty where there is none; the champion's figures by name, percent; and in a sentence
        what was done.
    """
    if run.store.exists(run.at(PROMOTION)) or not run.store.exists(run.at(RETRAINING)):
        return "", {}, "already done: the run was compared before"
    present = run.store.read_pointer(pointer_uri(split_uri(run.uri)[0], run.config.promotion.pointer))
    if present is None:
        return "", {}, "there is no champion yet to compare with"
    if present.value["run"] == run.uri:
        return "", {}, "already done: the run is the champion"
    compared = compare_with_champion(run.uri, run.store, run.config, present.value)
    figures: dict[str, float] = {}
    for result in compared["results"].values():
        figures |= result["results"].get(CHAMPION, {})
    told = ", ".join(f"{name} {value:.1f} %" for name, value in figures.items()) or "no figures"
    name = name_of_run(present.value["run"])
    return comparison_uri(run.uri, present.value), figures, f"champion {name} ({compared['how']}): {told}"
