"""What a run is: every setting is part of its identity, or says how the run is executed, as it declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from esvit_core.config import Config, merge, valid_keys
from esvit_core.config.section import execution_fields
from esvit_core.errors import UserError
from esvit_core.runs.run import run_id

KEYS = sorted(set(valid_keys()) - {key.rpartition(".")[0] for key in valid_keys()})
#: Where a value that is valid by itself is not, or no generic one is: what goes with it, and the other value.
SPECIAL: dict[str, tuple[dict[str, Any], Any]] = {
    "recipe": ({}, "another"),
    "bucket": ({}, "another"),
    "augment.global_crops.number": ({}, None),  # 2, and nothing else
    "mixup.use": ({"objective": {"region": False}}, True),
    "mixup.cutmix_minmax": ({}, [0.2, 0.8]),
    "augment.deit.rand_augment": ({}, "rand-m7"),
    "data.labels": ({}, "none"),
    "data.intensity": ({}, "0..4095"),
    "data.bands": ({}, [3, 2, 1]),
    "init.sha256": ({"init": {"source": "weights.pth"}}, 64 * "a"),
    "evaluation.transfer": ({}, [{"name": "a", "source": "b"}]),
    "cluster.image_pull_secrets": ({}, ["registry"]),
    "diagnostics.steps": ({}, 20),
    "launch.min_nodes": ({"launch": {"scheduler": "volcano", "nodes": 4}}, 2),
    "launch.allocator": ({}, "expandable_segments:True"),
    "launch.one_pod_per_node": ({"launch": {"scheduler": "volcano", "nodes": 2}}, True),
    "launch.nccl": ({"launch": {"scheduler": "volcano"}, "cluster": {"train": {"accelerators": 8}}}, {"DEBUG": "INFO"}),
    "launch.resources": ({"launch": {"scheduler": "volcano"}}, {"rdma/hca": 1}),
    "cluster.token_audience": ({"cluster": {"identity": "web-identity"}}, "other"),
    "cluster.priority": ({"cluster": {"queue": "team"}}, "high"),
}
#: As the documentation tells users: these may be changed for a run that is under way.
DOCUMENTED = {
    *("training.workers", "training.log_steps", "training.metrics_port", "training.processes"),
    *("training.checkpoint_steps", "training.checkpoint_minutes", "training.checkpoint_epochs"),
    *("training.keep_checkpoints", "training.keep_epochs", "training.keep_best", "training.store_grace_minutes"),
    *("training.max_images_per_process", "training.collapse_patience", "evaluation.batch_size"),
    *("data.max_bad_fraction", "diagnostics.steps", "launch.nodes", "cluster.image", "retrain.min_new_images"),
}


def is_execution(key: str) -> bool:
    """As the setting, or a section that it is in, declares."""
    declared: Any = execution_fields(Config)
    for part in key.split("."):
        declared = declared.get(part)
        if declared is None:
            return False
        if declared is True:
            return True
    return False


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def value_of(config: Config, key: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def annotation_of(key: str) -> Any:
    section: type[BaseModel] = Config
    *sections, leaf = key.split(".")
    for name in sections:
        found = section.model_fields[name].annotation
        section = next(kind for kind in (found, *flat(found)) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return section.model_fields[leaf].annotation


def flat(annotation: Any) -> Iterator[Any]:
    for kind in get_args(annotation):
        yield kind
        yield from flat(kind)


def others(key: str, value: Any) -> Iterator[Any]:
    """Values of the same kind, some of which are valid."""
    for kind in (annotation_of(key), *flat(annotation_of(key))):
        if get_origin(kind) is Literal:
            yield from get_args(kind)
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, (int, float)):
        yield from (value + 1, value * 2, value / 2, value + 0.05, 0.05)
    elif isinstance(value, list):
        yield from (
            [{"key": "a", "operator": "Exists"}],
            [*value, 3],
            [each / 2 for each in value if isinstance(each, (int, float))],
            [1, 2],
        )
    elif isinstance(value, dict):
        yield {"a": "b"}
    elif isinstance(value, str):
        yield from ("other", "3", "3Gi")
    yield from (3, 1.5, 0.5, "other", "3Gi", [2, 2], True)


def changed(key: str) -> tuple[Config, Config] | None:
    """Two configurations that differ in one setting only."""
    in_a_job = {"launch": {"scheduler": "volcano"}} if key.startswith("launch.") else {}
    more, special = SPECIAL.get(key, (in_a_job, None))
    config = Config.from_mapping(more)
    base = config.model_dump(mode="json")
    for other in [special] if key in SPECIAL else others(key, value_of(config, key)):
        try:
            found = Config.from_mapping(merge(base, nested(key, other)))
        except UserError:
            continue
        if value_of(found, key) != value_of(config, key):
            return config, found
    return None


@pytest.mark.parametrize("key", KEYS)
def test_a_run_is_another_one_exactly_if_a_setting_of_its_identity_is_another(key: str) -> None:
    pair = changed(key)
    if pair is None:
        assert SPECIAL[key][1] is None, f"{key}: no other valid value was found; add one to SPECIAL"
        return
    one, other = pair
    assert (run_id(one, "data") == run_id(other, "data")) == is_execution(key)
    assert other.with_execution(one.execution_values()) == (one if is_execution(key) else other)


def test_a_setting_that_was_added_does_not_change_the_runs_before_it() -> None:
    values = Config().identity_values()
    assert not {"labels", "splits", "max_aspect_ratio", "weights", "intensity", "bands"} & values["data"].keys()
    changed = Config.from_mapping({"data": {"labels": "depth:2", "splits": {"a": "val"}}}).identity_values()
    assert changed["data"]["labels"] == "depth:2" and changed["data"]["splits"] == {"a": "val"}


def test_what_users_are_told_they_may_change_is_execution() -> None:
    assert set(KEYS) >= DOCUMENTED
    assert not [key for key in DOCUMENTED if not is_execution(key)]


def test_where_transfer_sets_lie_is_no_part_of_a_run_but_what_they_are_is() -> None:
    def name(prints: dict[str, str], **changes: Any) -> str:
        transfer_set = {"name": "a", "source": "s3://b/a", **changes}
        return run_id(Config.from_mapping({"evaluation": {"transfer": [transfer_set]}}), "data", prints)

    same = name({"a": "1"})
    assert name({"a": "1"}, source="elsewhere") == same
    assert len({same, name({"a": "2"}), name({"a": "1"}, metric="mean_per_class"), name({"b": "1"}, name="b")}) == 4


def test_null_has_a_word_where_a_setting_may_be_null() -> None:
    for word in ("null", "off", "none", "~"):
        config = Config.load("demo", [f"promotion.max_loss={word}", f"diagnostics.entropy_stop={word}"])
        assert config.promotion.max_loss is None and config.diagnostics.entropy_stop is None
    assert Config.from_yaml("promotion: {max_loss: off}").promotion.max_loss is None
    assert Config.from_yaml("training: {keep_best: off}").training.keep_best is False
    with pytest.raises(UserError, match=r"training\.epochs: .*'none'"):
        Config.load("demo", ["training.epochs=none"])
