"""A run that evaluates an existing backbone, on a real object store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esvit_core.config import Config, ModelConfig
from esvit_core.errors import UserError
from esvit_core.evaluation.import_backbone import import_backbone
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import measured
from esvit_core.models.factory import create_backbone
from esvit_core.reporting import verdict
from esvit_core.reporting.run_records import read_run_records
from esvit_core.runs.run import Run, start_run
from esvit_core.storage import ObjectStore
from esvit_core.weights.backbone import load_backbone, save_backbone


@pytest.fixture
def trained(store_env: Any, micro_recipe: Path, images: Any, tmp_path: Path) -> Run:
    """A run that has published a backbone with its initial weights, which takes a few seconds."""
    folder = images.folder(tmp_path / "images", ["a", "b"], 6)
    config = Config.load(micro_recipe, [f"bucket={store_env.bucket}"])
    run = start_run(config, str(folder), store_env.uri("runs/micro-1"))
    save_backbone(run.store, run.at("backbone"), network(config), config, {"run": run.uri, "step": 8})
    return run


@pytest.fixture
def arguments(trained: Run, tmp_path: Path) -> dict[str, Any]:
    """A configuration of another architecture, which the backbone's architecture replaces."""
    other = trained.config.model_copy(update={"model": ModelConfig(arch="swin_tiny_w7")})
    return {"source": str(tmp_path / "images"), "config": other}


def network(config: Config) -> torch.nn.Module:
    return create_backbone(config.model, config.augment.global_crops.size, drop_path=0.0)


def weights(run: Run, name: str) -> dict[str, torch.Tensor]:
    return load_backbone(run.at(name), run.store).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_measured_again_as_a_run_of_its_own(trained: Run, arguments: Any) -> None:
    arguments["config"] = arguments["config"].model_copy(update={"seed": 3})
    run = import_backbone(trained.uri, **arguments)
    assert run.uri.startswith(f"s3://{trained.config.bucket}/runs/evaluate-micro-")
    assert run.config.model == trained.config.model.model_copy(update={"img_size": 32})
    assert (run.config.seed, run.config.evaluation.crop, run.config.init.source) == (3, 32, None)
    assert same(weights(run, "backbone"), weights(trained, "backbone"))
    assert not same(weights(run, "baseline"), weights(trained, "backbone"))
    assert run.store.get_json(run.at("baseline/backbone.json"))["step"] == 0
    assert run.store.get_json(run.at("measured.json"))["backbone"] == trained.at("backbone")
    assert import_backbone(trained.uri, **arguments).uri == run.uri
    records = read_run_records(run.uri, run.store, run.config)
    assert records.training.reason.endswith(trained.at("backbone"))
    assert verdict.promotion(records).details[0].endswith("it does not promote.")


def test_a_checkpoint_is_measured_while_the_run_has_published_nothing(
    trained: Run, arguments: Any, tmp_path: Path
) -> None:
    inside = {f"backbone.{name}": value for name, value in network(trained.config).state_dict().items()}
    torch.save(inside, tmp_path / "teacher.pt")
    training = start_run(trained.config, arguments["source"], f"{trained.uri}-training")
    place = training.at("training/checkpoints/00000004")
    training.store.publish(place, {"teacher.pt": tmp_path / "teacher.pt"}, "checkpoint", {"epoch": 1.0})
    run = import_backbone(training.uri, **arguments)
    measured = run.store.get_json(run.at("measured.json"))
    assert (measured["backbone"], measured["run"], measured["step"]) == (place, training.uri, 4)
    assert same({f"backbone.{name}": value for name, value in weights(run, "backbone").items()}, inside)


def test_a_file_is_measured_with_a_batch_for_its_images(
    trained: Run, arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm

    # It tries one network after the other, which is tested with the import and takes its time.
    monkeypatch.setattr("esvit_core.weights.import_checkpoint.recognize_architecture", lambda state: "deit_tiny")
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    evaluation = trained.config.evaluation.model_copy(update={"batch_size": 256})  # for images of 32 pixels
    arguments["config"] = arguments["config"].model_copy(update={"evaluation": evaluation})
    run = import_backbone(str(tmp_path / "weights.pth"), **arguments)
    assert run.config.model.arch == "deit_tiny" and run.config.augment.global_crops.size == 224
    assert run.config.evaluation.batch_size == 64
    assert "evaluation.batch_size: 64 images of 224 pixels, not 256" in capsys.readouterr().out


def test_a_champion_that_has_moved_is_another_run(trained: Run, arguments: Any) -> None:
    store: ObjectStore = trained.store
    pointer = f"s3://{trained.config.bucket}/pointers/champion"
    found = []
    for name in ("backbone", "other"):
        if name == "other":
            save_backbone(store, trained.at(name), network(trained.config), trained.config)
        present = store.read_pointer(pointer)
        store.swap_pointer(pointer, {"backbone": trained.at(name)}, present)
        found.append(import_backbone("champion", **arguments).uri)
    assert len(set(found)) == 2


def test_a_missing_backbone_is_reported_in_one_line(arguments: Any) -> None:
    with pytest.raises(UserError, match=r"^backbone nobody: no such file"):
        import_backbone("nobody", **arguments)
    with pytest.raises(UserError, match=r"^--baseline nobody: no such file"):
        import_backbone("nobody", **arguments, setting="--baseline")


def test_the_weights_are_read_once(trained: Run, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = import_backbone(trained.uri, **arguments)

    def fail(*_: Any) -> None:
        raise AssertionError("the weights are read again")

    monkeypatch.setattr("esvit_core.evaluation.imported_network.load_backbone", fail)
    assert import_backbone(trained.at("backbone"), **arguments, uri=run.uri).config == run.config
    assert import_backbone(trained.uri, **arguments, before_loading=fail).uri == run.uri


def test_a_damaged_description_is_named_by_loading_it(trained: Run, arguments: Any) -> None:
    description = trained.at("backbone/backbone.json")
    for content in (b"{", b"[]", b"{}"):
        trained.store.put_bytes(description, content)
        with pytest.raises(UserError, match=r"backbone"):
            import_backbone(trained.uri, **arguments)


def test_weights_of_a_file_in_a_network_of_timm(trained: Run, arguments: Any, tmp_path: Path) -> None:
    import timm

    torch.save(timm.create_model("test_resnet.r160_in1k", num_classes=7).state_dict(), tmp_path / "weights.pth")
    run = import_backbone(f"timm:test_resnet.r160_in1k:{tmp_path / 'weights.pth'}", **arguments)
    stated = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    assert run.config.model.arch == "timm:test_resnet.r160_in1k"
    assert (run.config.evaluation.crop, list(run.config.augment.mean)) == (stated.input_size[-1], list(stated.mean))
    with pytest.raises(UserError, match=r"^backbone timm:resnet18:none.pth: no such file none.pth"):
        import_backbone("timm:resnet18:none.pth", **arguments)


def test_a_batch_that_was_chosen_for_small_images_is_smaller_for_large_ones(
    trained: Run, arguments: Any, tmp_path: Path
) -> None:
    import timm

    torch.save(timm.create_model("test_resnet.r160_in1k").state_dict(), tmp_path / "weights.pth")
    evaluation = trained.config.evaluation.model_copy(update={"crop": 32, "batch_size": 1000})
    arguments["config"] = trained.config.model_copy(update={"evaluation": evaluation})
    run = import_backbone(f"timm:test_resnet.r160_in1k:{tmp_path / 'weights.pth'}", **arguments)
    assert (run.config.evaluation.crop, run.config.evaluation.batch_size) == (160, 64 * 224**2 // 160**2)


def test_the_verdict_on_an_existing_backbone_does_not_speak_of_a_training(trained: Run, arguments: Any) -> None:
    run = import_backbone(trained.uri, **arguments)
    correct = {"trained": {"linear": np.arange(400) < 165}, "baseline": {"linear": np.arange(400) < 146}}
    figures = {"trained": {"linear": 41.25}, "baseline": {"linear": 36.5}}
    result = {"name": "linear"} | keep_outcomes(measured("linear", figures, ["a"]), pack_outcomes("images", correct))
    run.store.put_bytes(run.at("evaluation/linear.json"), json.dumps(result).encode())
    sentence = verdict.judge(read_run_records(run.uri, run.store, run.config)).sentence
    assert sentence.startswith("The backbone is better than its baseline: Linear probe is 41.2")
    assert "4.7 points above the same network with random weights" in sentence
