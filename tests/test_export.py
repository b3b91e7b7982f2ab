"""A published backbone round-trips, and errors are reported in one line."""

from __future__ import annotations

import json

import pytest
import torch

import esvit_core
from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.models.factory import create_backbone
from esvit_core.weights.backbone import load_backbone, save_backbone

TINY = Config.from_mapping(
    {
        "recipe": "tiny",
        "augment": {"global_crops": {"size": 32, "number": 2, "scale": [0.4, 1.0]}},
        "model": {
            "arch": "swin",
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "drop_path": 0.1,
        },
        "evaluation": {"resize": 36, "crop": 32},
    }
)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone(TINY.model, img_size=32).eval()


@pytest.fixture
def published(store, backbone):
    uri = store.uri("runs/a/backbone")
    save_backbone(store, uri, backbone, TINY, {"run": store.uri("runs/a"), "step": 7})
    return uri


@pytest.fixture
def folder(store, published, tmp_path):
    store.fetch(published, tmp_path / "copy")
    return tmp_path / "copy"


def same(a, b) -> bool:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def test_a_backbone_round_trips(store, backbone, published):
    loaded = load_backbone(published, store)
    assert same(loaded, backbone)
    assert not loaded.training
    assert loaded.state_dict().keys() == backbone.state_dict().keys()


def test_it_has_timm_s_interface(store, published):
    loaded = load_backbone(published, store)
    x = torch.zeros(2, 3, 32, 32)
    assert loaded.num_features == 32
    assert loaded.forward_head(loaded.forward_features(x), pre_logits=True).shape == (2, 32)
    assert loaded(x).shape == (2, 32)
    assert all(p.requires_grad for p in loaded.parameters())


def test_it_can_be_trained_further_wherever_it_was_loaded(store, published):
    with torch.inference_mode():
        loaded = load_backbone(published, store)
    loaded(torch.ones(1, 3, 32, 32)).sum().backward()
    assert next(loaded.parameters()).grad is not None


def test_the_description_contains_the_preprocessing(store, published):
    message = load_backbone(published, store).backbone_config
    assert (message["arch"], message["num_features"], message["img_size"]) == ("swin", 32, 32)
    assert (message["eval_resize"], message["eval_crop"], message["mean"]) == (36, 32, [0.485, 0.456, 0.406])
    assert (message["run"], message["step"], message["recipe"]) == (store.uri("runs/a"), 7, "tiny")


def test_publishing_again_finds_what_is_there(store, backbone, published):
    before = {s.uri: s.modified for s in store.list(published)}
    save_backbone(store, published, backbone, TINY, {"run": store.uri("runs/a"), "step": 7})
    assert {s.uri: s.modified for s in store.list(published)} == before


def test_it_loads_from_a_folder(backbone, folder):
    assert same(load_backbone(folder), backbone)
    assert same(load_backbone(str(folder)), backbone)


def test_it_loads_by_the_name_of_a_pointer(store_env, backbone, published, monkeypatch):
    store_env.swap_pointer(store_env.uri("pointers/champion"), {"backbone": published}, None)
    monkeypatch.setenv("ESVIT_BUCKET", store_env.bucket)
    assert same(esvit_core.load_backbone("champion"), backbone)


def test_it_finds_the_store_of_a_run_on_this_machine(store, store_server, backbone, published, monkeypatch):
    monkeypatch.delenv("ESVIT_S3_ENDPOINT", raising=False)
    monkeypatch.setenv("ESVIT_STORE_DIR", str(store_server.directory))
    assert same(load_backbone(published), backbone)
    assert store.exists(published + "/manifest.json"), "a server that was running before keeps running"


def test_an_unknown_pointer_is_reported(store_env, monkeypatch):
    monkeypatch.setenv("ESVIT_BUCKET", store_env.bucket)
    with pytest.raises(UserError, match=r"backbone champoin: no such pointer \(s3://.*/pointers/champoin\)"):
        load_backbone("champoin")


def test_a_pointer_without_a_backbone_is_reported(store_env, monkeypatch):
    store_env.swap_pointer(store_env.uri("pointers/champion"), {"run": "x"}, None)
    monkeypatch.setenv("ESVIT_BUCKET", store_env.bucket)
    with pytest.raises(UserError, match="does not name a backbone"):
        load_backbone("champion")


def test_a_prefix_with_nothing_in_it_is_reported(store):
    with pytest.raises(UserError, match="no complete backbone is published there"):
        load_backbone(store.uri("runs/nowhere"), store)


def test_a_folder_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_backbone(f"{tmp_path}/nowhere")
    with pytest.raises(UserError, match=r"it contains no backbone\.json"):
        load_backbone(tmp_path)


def test_no_store_named_is_reported(monkeypatch, tmp_path):
    monkeypatch.delenv("ESVIT_S3_ENDPOINT", raising=False)
    monkeypatch.delenv("ESVIT_STORE_DIR", raising=False)
    with pytest.raises(UserError, match="set ESVIT_S3_ENDPOINT"):
        load_backbone("champion")
    monkeypatch.setenv("ESVIT_STORE_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"ESVIT_STORE_DIR names .*nowhere, which is not a folder"):
        load_backbone("champion")


@pytest.mark.parametrize("name", ["model.safetensors", "backbone.json"])
def test_a_damaged_object_is_named(store, published, name):
    data = bytearray(store.get_bytes(f"{published}/{name}"))
    data[len(data) // 2] ^= 1
    store.put_bytes(f"{published}/{name}", bytes(data))
    with pytest.raises(UserError, match=f"{name}.*damaged"):
        load_backbone(published, store)


def test_a_missing_object_is_named(store, published):
    store.remove(f"{published}/model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_backbone(published, store)


def test_a_damaged_file_is_named(folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged \(its SHA-256 differs\)"):
        load_backbone(folder)


def test_missing_weights_are_reported(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "esvit-backbone/9"}, "unknown format 'esvit-backbone/9'; this version reads esvit-backbone/1"),
        ({"model": {"arch": "swin", "colour": 3}}, "this version does not know its architecture"),
        ({"model": {"arch": "swim"}}, "model.arch swim: unknown"),
    ],
)
def test_a_description_of_another_version_is_reported(folder, change, message):
    description = json.loads((folder / "backbone.json").read_text())
    (folder / "backbone.json").write_text(json.dumps(description | change))
    with pytest.raises(UserError) as caught:
        load_backbone(folder)
    assert message in str(caught.value)


def test_weights_of_another_network_are_reported(folder):
    description = json.loads((folder / "backbone.json").read_text())
    description["model"]["depths"] = [1, 2]
    (folder / "backbone.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="the weights do not fit swin"):
        load_backbone(folder)


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_a_description_that_is_none_is_reported(folder, text):
    (folder / "backbone.json").write_text(text)
    with pytest.raises(UserError, match="backbone"):
        load_backbone(folder)
