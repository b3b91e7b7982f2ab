"""The configuration tree: YAML in and out, overrides, and what it says of mistakes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esvit_core.config import Config, valid_keys
from esvit_core.config.kubernetes_names import bytes_quantity, quantity_bytes, quantity_cores
from esvit_core.config.recipes import preset_names
from esvit_core.errors import (
    ERROR_FILE_VARIABLE,
    TRY_AGAIN_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    InfrastructureError,
    UserError,
    read_error_file,
    step,
)
from esvit_core.storage import (
    IntegrityError,
    NotFound,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreRejected,
    StoreUnavailable,
)


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_yaml(name: str) -> None:
    config = Config.load(name)
    assert Config.from_yaml(config.to_yaml()) == config
    assert config.recipe == name


def test_the_defaults_are_the_published_imagenet_recipe() -> None:
    assert Config.load("imagenet_swin_tiny_w7", ["recipe=custom"]) == Config()


def test_overrides_reach_every_level_and_take_scientific_notation() -> None:
    config = Config.load(
        "demo", ["seed=7", "optimizer.lr=1e-3", "augment.local_crops.number=4", "model.depths=[2, 2, 6]"]
    )
    assert config.seed == 7
    assert config.optimizer.lr == pytest.approx(1e-3)
    assert config.augment.local_crops.number == 4
    assert config.augment.local_crops.size == Config.load("demo").augment.local_crops.size
    assert config.model.depths == (2, 2, 6)


def test_a_recipe_names_one_kind_of_local_crops_or_several() -> None:
    one = Config.from_mapping({"augment": {"local_crops": {"size": 64, "number": 4, "scale": [0.1, 0.3]}}})
    assert one.augment.local_kinds == (one.augment.local_crops,)
    several = Config.load(
        "demo", ["augment.local_crops=[{size: 16, number: 2}, {size: 12, number: 3, scale: [0, 0.2]}]"]
    )
    assert [(kind.size, kind.number, kind.scale) for kind in several.augment.local_kinds] == [
        (16, 2, (0.05, 0.4)),
        (12, 3, (0.0, 0.2)),
    ]
    assert Config.from_yaml(several.to_yaml()) == several
    with pytest.raises(UserError, match="'local_crops' is not a section"):
        Config.load("demo", ["augment.local_crops=[]", "augment.local_crops.number=1"])


def test_what_a_recipe_leaves_out_of_the_crops_is_the_policys() -> None:
    published = Config()
    few = Config.from_mapping({"augment": {"local_crops": {"number": 2}}}).augment
    assert few.local_crops == published.augment.local_crops.model_copy(update={"number": 2})
    deit = Config.from_mapping({"augment": {"policy": "deit", "local_crops": {"scale": [0.05, 0.4]}}}).augment
    assert deit.global_crops.scale == (0.08, 1.0)
    assert deit.local_crops == published.augment.local_crops


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", "did you mean 'training.epochs'?"),
        ("epochs=3", "did you mean 'training.epochs'?"),
        ("training.epochs=many", "training.epochs: input should be a valid integer"),
        ("training.epochs", "expected key=value"),
        ("training.epochs=[", "not valid YAML"),
        ("training.epochs=0", "greater than 0"),
        ("augment.local_crops=[{size: 8, number: -1}]", "augment.local_crops.0.number: input should be greater than"),
        ("augment.local_crops.size=0", "augment.local_crops.size: input should be greater than 0"),
        ("augment.global_crops.number=3", "global_crops.number: expected 2"),
        ("mixup.use=true", "set objective.region to false"),
        ("optimizer.name=adam", "optimizer.name: input should be 'adamw', 'sgd' or 'lars'"),
    ],
)
def test_wrong_overrides_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Config.load("demo", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainng: {epochs: 3}", "did you mean 'training'?"),
        ("training: {epoch: 3}", "did you mean 'training.epochs'?"),
        ("- a list", "expected a mapping"),
        ("training: {epochs: 3", "not valid YAML"),
        ("evaluation: {transfer: [{name: a, source: x}, {name: a, source: y}]}", "distinct names"),
    ],
)
def test_wrong_recipe_files_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        Config.load(recipe)
    assert message in str(caught.value)
    assert str(recipe) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest_and_all() -> None:
    with pytest.raises(UserError, match=r"did you mean 'demo'.*presets: .*imagenet_swin_tiny_w7"):
        Config.load("demoo")


@given(st.sampled_from(sorted(valid_keys())), st.integers(0, 3), st.characters(categories=["Ll"]))
def test_a_key_with_a_typing_error_is_never_accepted(key: str, position: int, letter: str) -> None:
    typo = key[:position] + letter + key[position:]
    if typo in set(valid_keys()):
        return
    with pytest.raises(UserError, match="unknown key"):
        Config.load("demo", [f"{typo}=1"])


def test_the_digest_depends_on_every_value() -> None:
    digests = {Config.load("demo", [o]).digest() for o in ("seed=0", "seed=1", "training.epochs=3", "head.out_dim=64")}
    assert len(digests) == 4


def test_the_digest_does_not_depend_on_where_a_run_computes() -> None:
    elsewhere = ["cluster.image=mine:1", "cluster.train.accelerators=8", "cluster.run_as=null"]
    assert Config.load("demo", elsewhere).digest() == Config.load("demo").digest()


def test_a_kind_of_step_keeps_its_own_defaults_where_a_recipe_says_nothing() -> None:
    config = Config.load("demo", ["cluster.train.cpu=16", "cluster.train.node_selector={pool: gpu}"])
    assert config.cluster.train.model_dump() == Config().cluster.train.model_dump() | {
        "cpu": "16",
        "node_selector": {"pool": "gpu"},
    }
    with pytest.raises(UserError, match="requires operator: Exists"):
        Config.load("demo", ["cluster.train.tolerations=[{effect: NoSchedule}]"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.train.memory=8GiB", "cluster.train.memory: .*such as 4Gi or 500M.*'8GiB'"),
        ("cluster.train.memory=512K", "units are k, M, G, T .of 1000. and Ki"),
        ("cluster.train.memory=8", "less than 1Mi; expected a size with a unit"),
        (
            "cluster.train.memory_limit=null",
            "expected a size or auto; with null the namespace's LimitRange would decide",
        ),
        ("cluster.train.cpu=0", "such as 2, 0.5 or 500m"),
        ("cluster.train.cpu=4 cores", "such as 2, 0.5 or 500m"),
        ("cluster.ca_config_map=my.ca", "cluster.ca_config_map: .*without dots.*'my.ca'"),
        ("cluster.secret=My_Secret", "the name of a Kubernetes object: a-z, 0-9, - and ."),
        ("cluster.secret=a..b", "the name of a Kubernetes object"),
        ("cluster.train.accelerator=nvidia.com/", "a Kubernetes key such as gpu or example.com/gpu"),
        ("cluster.train.node_selector={a: b c}", "the value of a label"),
        ("cluster.priority=high", "priority: no effect without queue"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Config.load("demo", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, size", [("4Gi", 2**32), ("1.5G", 1_500_000_000), ("2000k", 2_000_000), ("7Ki", 7168)])
def test_quantities_are_those_of_kubernetes(text: str, size: int) -> None:
    assert quantity_bytes(text) == size
    assert size <= quantity_bytes(bytes_quantity(size)) < size + 2**20
    assert [quantity_cores(text) for text in ("2", "0.5", "250m")] == [2, 0.5, 0.25]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.nodes=2"], "launch.nodes: no effect with launch.scheduler local.*volcano or trainjob"),
        (["launch.queue=q", "launch.restarts=3"], "launch.queue, launch.restarts: no effect"),
        (["launch.scheduler=trainjob", "launch.ttl_minutes=5"], "launch.ttl_minutes: no effect.*trainjob.*volcano$"),
    ],
)
def test_a_setting_without_effect_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.load("demo", overrides)
    assert Config.load(
        "demo", ["launch.activation_checkpointing=true", "launch.nodes=1"]
    ).launch.activation_checkpointing


def test_a_step_ends_with_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "error.txt"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(record))
    with pytest.raises(SystemExit) as caught, step("prepare_data"):
        raise UserError("data/: no images;\n expected jpg or png")
    assert caught.value.code == USER_ERROR_EXIT_CODE
    assert capsys.readouterr().err == "error: prepare_data: data/: no images; expected jpg or png\n"
    left = read_error_file(record)
    assert isinstance(left, UserError) and str(left) == "prepare_data: data/: no images; expected jpg or png"
    assert (left.step, left.reason) == ("prepare_data", "data/: no images; expected jpg or png")


@pytest.mark.parametrize(
    "error, line",
    [
        (StoreUnavailable("s3://b/k: no answer"), "s3://b/k: no answer"),
        (StoreFull("s3://b/k: full"), "s3://b/k: full"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
            "/tmp/x: the disk failed (No space left on device)",
        ),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_step_ends_with_one_line_and_exit_code_75_where_trying_again_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    record = tmp_path / "error.txt"
    monkeypatch.setenv(ERROR_FILE_VARIABLE, str(record))
    with pytest.raises(SystemExit) as caught, step("knn"):
        raise error
    assert caught.value.code == TRY_AGAIN_EXIT_CODE
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: knn: {line}") and printed.count("\n") == 1
    assert isinstance(read_error_file(record), InfrastructureError)


def test_a_bug_in_a_step_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), step("knn"):
        raise KeyError("a bug")


@pytest.mark.parametrize("mistake", [NotFound, StoreRefused, StoreRejected, IntegrityError])
def test_what_stays_wrong_is_a_mistake_and_an_outage_is_none(mistake: type[StoreError]) -> None:
    assert issubclass(mistake, UserError) and mistake.exit_code == USER_ERROR_EXIT_CODE
    for outage in (StoreUnavailable, StoreFull):
        assert not issubclass(outage, UserError) and outage.exit_code == TRY_AGAIN_EXIT_CODE


def test_diagnostics_need_a_line_of_the_log_and_bounds_in_their_order() -> None:
    config = Config.load("demo", ["diagnostics.steps=20", "diagnostics.entropy_stop=0.5", "diagnostics.kl_stop=null"])
    assert (config.diagnostics.entropy_warn, config.diagnostics.kl_warn) == (1.1, 0.03)
    with pytest.raises(UserError, match=r"diagnostics.steps 7: expected a multiple of training.log_steps, which is 5"):
        Config.load("demo", ["diagnostics.steps=7"])
    with pytest.raises(UserError, match=r"kl_warn 0.001: expected at least kl_stop, which is 0.01"):
        Config.load("demo", ["diagnostics.kl_warn=0.001"])
    with pytest.raises(UserError, match=r"unknown key 'diagnostics\.entropy_wran', did you mean"):
        Config.load("demo", ["diagnostics.entropy_wran=1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.processes=0", "training.processes: input should be greater than 0 or 'auto', got 0"),
        (f"training.epochs={'x' * 500}", "training.epochs: .* got 'x{50,110}\\.\\.\\.$"),
    ],
)
def test_a_wrong_value_is_one_short_message(change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config.load("demo", [change])
