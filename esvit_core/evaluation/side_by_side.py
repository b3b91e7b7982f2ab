"""Compare the figures of finished runs, paired where the same held-out images were measured.

The outcomes of the single images are kept in the results of every run. Two runs measured the same images if their data
have the same source and the same settings, because the split of the images depends on nothing else. The form in which the
images are stored may differ, since each backbone has an input size of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esvit_core.config import Config
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.evaluation.outcomes import compare_outcomes
from esvit_core.evaluation.results import Result, read_result
from esvit_core.evaluation.significance import Difference
from esvit_core.storage import NotFound, ObjectStore, join_uri

_MODEL = "trained"
# Settings of the data that change how an image is stored, but not which images are held out.
_STORAGE_SETTINGS = ("store_short_side", "shard_mib")


@dataclass(frozen=True)
class Subject:
    """A run whose figures are compared.

    Attributes:
        name: name for people.
        run_uri: address of the run.
        config: its configuration.
        results: its results by the name of the evaluation.
        images: which images were held out, by the name of the evaluation; None if that is not known.
    """

    name: str
    run_uri: str
    config: Config
    results: dict[str, Result]
    images: dict[str, tuple[Any, ...] | None]


@dataclass(frozen=True)
class Pair:
    """A figure of one run compared with that of another one.

    Attributes:
        key: the figure, such as ``knn/20``.
        model, reference: names of the two runs.
        points: model minus reference, percentage points.
        difference: interval and test; None if there are none.
        reason: why there are none.
    """

    key: str
    model: str
    reference: str
    points: float
    difference: Difference | None
    reason: str = ""

    @property
    def decision(self) -> str:
        """``better``, ``worse``, ``no difference shown``, or ``not tested``."""
        return self.difference.decision if self.difference else "not tested"

    def as_json(self) -> dict[str, Any]:
        values = {"figure": self.key, "model": self.model, "reference": self.reference, "points": round(self.points, 4)}
        if self.difference is None:
            return values | {"decision": self.decision, "reason": self.reason}
        return values | self.difference.as_json()


@dataclass(frozen=True)
class Comparison:
    """The figures of several runs side by side.

    Attributes:
        subjects: the runs.
        references: names of the runs that the others are compared with.
        figures: percent, by figure and name of the run.
        missing: why a run lacks an evaluation, by name of the run and of the evaluation.
        pairs: every figure of every other run, compared with every reference.
    """

    subjects: list[Subject]
    references: list[str]
    figures: dict[str, dict[str, float]]
    missing: dict[tuple[str, str], str]
    pairs: list[Pair]

    def between(self, model: str, reference: str) -> list[Pair]:
        """Return the pairs of two runs in the order of the figures."""
        return [pair for pair in self.pairs if (pair.model, pair.reference) == (model, reference)]

    def tally(self, model: str, reference: str) -> dict[str, int]:
        """Count the decisions over the data sets; each set counts once, the runs' own images by their main figure."""
        counts: dict[str, int] = {}
        metric = next(s.config.promotion.metric for s in self.subjects if s.name == model)
        pairs = self.between(model, reference)
        own = [pair for pair in pairs if not pair.key.startswith("transfer/")]
        chosen = next((p for p in own if p.key == metric), None) or next((p for p in own if p.key == "linear"), None)
        for pair in [*([chosen] if chosen else own[:1]), *(p for p in pairs if p.key.startswith("transfer/"))]:
            counts[pair.decision] = counts.get(pair.decision, 0) + 1
        return counts

    def as_json(self) -> dict[str, Any]:
        return {
            "models": [
                {"name": s.name, "run": s.run_uri, "reference": s.name in self.references} for s in self.subjects
            ],
            "figures": {key: {name: round(v, 4) for name, v in row.items()} for key, row in self.figures.items()},
            "differences": [pair.as_json() for pair in self.pairs],
            "sets": [
                {"model": model, "reference": reference, **self.tally(model, reference)}
                for model, reference in self.combinations()
            ],
            "left_out": [
                {"model": model, "evaluation": name, "reason": reason} for (model, name), reason in self.missing.items()
            ],
        }

    def combinations(self) -> list[tuple[str, str]]:
        """Return the names of each run and each reference that it is compared with."""
        models = [s.name for s in self.subjects if s.name not in self.references]
        return [(model, reference) for model in models for reference in self.references]


def read_subject(store: ObjectStore, run_uri: str, config: Config, name: str) -> Subject:
    """Read the results of a run and which images they were measured on.

    Raises:
        UserError: the run has no results.
    """
    places = dict.fromkeys(("knn", "linear", "retrieval", "few-shot", "segmentation"), "data")
    places |= {f"transfer-{s.name}": f"transfer/{s.name}" for s in config.evaluation.transfer}
    found = {evaluation: read_result(store, run_uri, evaluation) for evaluation in places}
    results = {evaluation: result for evaluation, result in found.items() if result is not None}
    if not results:
        raise UserError(f"run {name}: it has no results yet; wait until its evaluation steps have finished")
    images = {place: _held_out(store, join_uri(run_uri, place)) for place in set(places.values())}
    return Subject(name, run_uri, config, results, {each: images[places[each]] for each in results})


def compare_subjects(subjects: Sequence[Subject], references: Sequence[str]) -> Comparison:
    """Compare every run that is no reference with every reference.

    Args:
        subjects: the runs, with distinct names.
        references: names of the references.
    """
    figures: dict[str, dict[str, float]] = {}
    missing: dict[tuple[str, str], str] = {}
    names = list(dict.fromkeys(name for subject in subjects for name in subject.results))
    for name in names:
        for subject in subjects:
            result = subject.results.get(name)
            values = {} if result is None else result.get("results", {}).get(_MODEL, {})
            if not values:
                reason = "the run has no such evaluation" if result is None else str(result.get("reason") or "unknown")
                missing[subject.name, name] = reason
            for key, value in values.items():
                figures.setdefault(key, {})[subject.name] = value
    comparison = Comparison(list(subjects), list(references), figures, missing, [])
    by_name = {subject.name: subject for subject in subjects}
    for model, reference in comparison.combinations():
        for key, row in figures.items():
            if model in row and reference in row:
                comparison.pairs.append(_pair(key, by_name[model], by_name[reference], row[model] - row[reference]))
    return comparison


def _pair(key: str, model: Subject, reference: Subject, points: float) -> Pair:
    name = _evaluation_of(key)
    found: Difference | str = _difference_of_protocols(name, model.config, reference.config)
    if not found:
        same = model.images[name] is not None and model.images[name] == reference.images[name]
        found = compare_outcomes(key, model.results[name], _MODEL, reference.results[name], _MODEL, same_images=same)
    if isinstance(found, str):
        return Pair(key, model.name, reference.name, points, None, found)
    return Pair(key, model.name, reference.name, points, found)


def _evaluation_of(key: str) -> str:
    kind, _, rest = key.partition("/")
    return f"transfer-{rest}" if kind == "transfer" else kind


def _difference_of_protocols(name: str, one: Config, other: Config) -> str:
    """Describe the first setting of the protocol that differs; empty if none does."""
    mine, theirs = _protocol(name, one), _protocol(name, other)
    different = next((key for key in mine if mine[key] != theirs.get(key)), None)
    if different is None:
        return ""
    return f"the two were measured with different settings ({different}: {mine[different]} and {theirs.get(different)})"


def _protocol(name: str, config: Config) -> Mapping[str, Any]:
    evaluation = config.evaluation
    if name == "knn":
        return {"evaluation.knn_temperature": evaluation.knn_temperature}
    if name == "linear":
        return {f"evaluation.linear.{key}": value for key, value in evaluation.linear.model_dump(mode="json").items()}
    if not name.startswith("transfer-"):
        return {"evaluation.segmentation": evaluation.segmentation} if name == "segmentation" else {}
    chosen = {s.name: s for s in evaluation.transfer}[name.removeprefix("transfer-")]
    return {"metric": chosen.metric}


def _held_out(store: ObjectStore, prefix: str) -> tuple[Any, ...] | None:
    """Return what determines the held-out images of prepared data; None if that is not known."""
    try:
        manifest = Manifest.read(store, prefix)
    except NotFound:
        return None
    split = manifest.splits.get("val")
    if split is None or manifest.base is not None:
        return None
    settings = {key: value for key, value in manifest.settings.items() if key not in _STORAGE_SETTINGS}
    return manifest.source_fingerprint, sorted(settings.items()), manifest.classes, split.samples, split.per_class
