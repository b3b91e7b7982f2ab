"""The evaluation steps on a whole run: what they write, that they write it once, and what they leave out."""

from __future__ import annotations

import io
import multiprocessing
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from esvit_core.config import Config
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import UserError
from esvit_core.evaluation.features import (
    compute_features,
    eval_transform,
    features_of,
)
from esvit_core.evaluation.few_shot import evaluate_few_shot
from esvit_core.evaluation.knn import evaluate_knn, weighted_knn
from esvit_core.evaluation.linear_probe import augmented_features, evaluate_linear
from esvit_core.evaluation.outcomes import unpack_correct
from esvit_core.evaluation.retrieval import evaluate_retrieval
from esvit_core.evaluation.stored_features import extract_features, load_features
from esvit_core.evaluation.transfer import evaluate_transfer, logistic_transfer
from esvit_core.evaluation.visualize import visualize
from esvit_core.registry.promotion import promote
from esvit_core.weights.backbone import load_backbone

MODELS = ("trained", "baseline")


@pytest.fixture(scope="module")
def measured_run(run, bucket, config):
    extract_features(run, bucket, config)
    return run


def objects(bucket, uri) -> dict:
    return {s.uri: (s.etag, s.modified) for s in bucket.list(uri)}


@pytest.mark.parametrize("model", MODELS)
def test_features_are_those_of_the_backbone(measured_run, bucket, model, tmp_path, config):
    place = {"trained": "backbone", "baseline": "baseline"}[model]
    backbone = load_backbone(f"{measured_run}/{place}", bucket)
    dataset = ShardDataset(bucket, f"{measured_run}/data", "val", tmp_path)
    features = load_features(bucket, measured_run, model, "val", blocks=True)
    transform = eval_transform(config)
    with torch.no_grad():
        for i in range(len(dataset)):
            x = transform(dataset.image(i))[None]
            assert features.view[i] == pytest.approx(backbone(x)[0].numpy(), abs=1e-5)
            assert features.blocks[i] == pytest.approx(backbone.last_blocks(x, 2)[0].numpy(), abs=1e-5)
    assert features.labels.tolist() == [dataset.label(i) for i in range(len(dataset))]


def test_features_are_extracted_once(measured_run, bucket, config):
    manifest = bucket.read_manifest(f"{measured_run}/features")
    assert manifest["samples"] == {"train": 25, "val": 11}
    before = objects(bucket, f"{measured_run}/features")
    assert extract_features(measured_run, bucket, config) == manifest
    assert objects(bucket, f"{measured_run}/features") == before


def test_features_do_not_depend_on_the_batch(measured_run, bucket, tmp_path, config):
    backbone = load_backbone(f"{measured_run}/backbone", bucket)
    dataset = ShardDataset(bucket, f"{measured_run}/data", "train", tmp_path)
    one, all_at_once = (compute_features(backbone, dataset, eval_transform(config), size) for size in (1, 100))
    assert one.view == pytest.approx(all_at_once.view, abs=1e-5)


def test_features_of_several_devices_are_those_of_one(measured_run, bucket, tmp_path, config):
    backbone = load_backbone(f"{measured_run}/backbone", bucket)
    dataset = ShardDataset(bucket, f"{measured_run}/data", "val", tmp_path)
    one, two = (
        compute_features(backbone, dataset, eval_transform(config), 3, 2, devices=[torch.device("cpu")] * many)
        for many in (1, 2)
    )
    assert len(two) == len(dataset) == 11
    for kind in ("view", "blocks", "labels"):
        assert np.array_equal(getattr(one, kind), getattr(two, kind))


@pytest.mark.parametrize("workers", [1, 3])
def test_features_are_the_same_bit_for_bit_with_any_number_of_workers(
    measured_run, bucket, tmp_path, config, workers: int
) -> None:
    backbone = load_backbone(f"{measured_run}/backbone", bucket)
    dataset = ShardDataset(bucket, f"{measured_run}/data", "val", tmp_path)
    handler, children = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    alone, shared = (
        compute_features(backbone, dataset, eval_transform(config), 3, 2, workers=number) for number in (0, workers)
    )
    for kind in ("view", "blocks", "labels"):
        assert np.array_equal(getattr(alone, kind), getattr(shared, kind))
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert set(multiprocessing.active_children()) <= children  # another test's may have ended meanwhile


def test_an_error_in_a_worker_ends_the_extraction(measured_run, bucket, config) -> None:
    class Damaged:
        labels = np.zeros(9)

        def __len__(self) -> int:
            return 9

        def image(self, index: int) -> np.ndarray:
            if index == 4:
                raise UserError("image 4 is damaged")
            return np.zeros((64, 64, 3), np.uint8)

    backbone = load_backbone(f"{measured_run}/backbone", bucket)
    children = set(multiprocessing.active_children())
    with pytest.raises(UserError, match="image 4 is damaged"):
        compute_features(backbone, Damaged(), eval_transform(config), 2, 2, workers=2)
    assert set(multiprocessing.active_children()) <= children  # another test's may have ended meanwhile


def test_features_in_bfloat16_point_where_those_in_float32_do(measured_run, bucket, tmp_path, config):
    backbone = load_backbone(f"{measured_run}/backbone", bucket)
    dataset = ShardDataset(bucket, f"{measured_run}/data", "val", tmp_path)
    exact, rounded = (
        compute_features(backbone, dataset, eval_transform(config), 7, 2, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    for kind in ("view", "blocks"):
        a, b = getattr(exact, kind), getattr(rounded, kind)
        assert b.dtype == np.float32 and not np.array_equal(a, b)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert cosine.min() > 0.9995


def test_only_a_run_that_asks_for_bfloat16_is_measured_in_it(measured_run, bucket, tmp_path, config):
    backbone = load_backbone(f"{measured_run}/backbone", bucket)
    dataset = ShardDataset(bucket, f"{measured_run}/data", "val", tmp_path)
    views = {}
    for precision in ("auto", "float32", "bfloat16"):
        asked = config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})
        views[precision] = features_of(backbone, dataset, asked, "features").view
    assert np.array_equal(views["auto"], views["float32"])
    assert not np.array_equal(views["auto"], views["bfloat16"])


def test_features_come_before_what_needs_them(bucket):
    with pytest.raises(UserError, match="run the step extract_features first"):
        load_features(bucket, "s3://evaluation/runs/none", "trained", "val")


def test_knn_of_a_run(measured_run, bucket, config):
    result = evaluate_knn(measured_run, bucket, config)
    assert (result["status"], result["headline"], result["unit"]) == ("measured", "knn/20", "%")
    assert result["classes"] == ["blue", "green", "red"]
    for model in MODELS:
        train, val = (load_features(bucket, measured_run, model, split) for split in ("train", "val"))
        for k in (1, 20, 200):
            top1, top5 = weighted_knn(train.view, train.labels, val.view, val.labels, k)
            assert result["results"][model][f"knn/{k}"] == pytest.approx(top1, abs=1e-4)
            assert result["top5"][model][f"knn/{k}"] == pytest.approx(top5, abs=1e-4)
    assert result["notes"] == [
        "knn/200: there are only 25 training images, all of which vote",
        "1 class without held-out images, so not measured: blue",
        "1 class with a single training image: blue",
    ]


def test_linear_of_a_run(measured_run, bucket, config):
    result = evaluate_linear(measured_run, bucket, config)
    assert (result["status"], result["headline"]) == ("measured", "linear")
    for model in MODELS:
        assert 0 <= result["results"][model]["linear"] <= 100
        assert result["chosen"][model]["feature"] in ("last block", "last blocks")
    confusion = np.array(result["confusion"])
    assert confusion.sum(1).tolist() == [0, 5, 6]
    assert np.trace(confusion) / 11 * 100 == pytest.approx(result["results"]["trained"]["linear"], abs=1e-4)


def test_the_published_linear_probe_sees_new_crops_in_every_epoch(measured_run, bucket, config):
    linear = config.evaluation.linear.model_copy(update={"protocol": "published", "epochs": 2})
    asked = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"linear": linear})})
    network = load_backbone(f"{measured_run}/backbone", bucket)
    of_epoch = augmented_features({"trained": network}, measured_run, bucket, asked)["trained"]
    first, second, again = of_epoch(0), of_epoch(1), of_epoch(0)
    assert first.shape == load_features(bucket, measured_run, "trained", "train", blocks=True).blocks.shape
    assert np.array_equal(first, again) and not np.allclose(first, second, atol=1e-3)


def test_transfer_of_a_run(measured_run, bucket, config):
    result = evaluate_transfer(measured_run, bucket, config, "stripes")
    assert (result["status"], result["headline"], result["metric"]) == (
        "measured",
        "transfer/stripes",
        "mean_per_class",
    )
    assert set(result["lambda"]) == set(MODELS)
    assert result["samples"] == {"train": 25, "val": 11}
    # The set holds the same images as the run, so its features are those of the run.
    for model in MODELS:
        train, val = (load_features(bucket, measured_run, model, split) for split in ("train", "val"))
        expected = logistic_transfer(train.view, train.labels, val.view, val.labels, "mean_per_class", config.seed)
        assert result["results"][model]["transfer/stripes"] == pytest.approx(expected.figure, abs=1e-4)
        assert result["lambda"][model] == pytest.approx(expected.strength)


def test_the_outcome_of_every_held_out_image_is_kept(measured_run, bucket, config):
    found = {
        "knn": evaluate_knn(measured_run, bucket, config),
        "linear": evaluate_linear(measured_run, bucket, config),
        "transfer-stripes": evaluate_transfer(measured_run, bucket, config, "stripes"),
    }
    assert {key for each in found.values() for key in each["differences"]} == {
        *("knn/1", "knn/20", "knn/200", "linear", "transfer/stripes")
    }
    for name, result in found.items():
        assert result["outcomes"]["images"] == 11 and ("labels" in result["outcomes"]) == (name == "transfer-stripes")
        for key, difference in result["differences"].items():
            trained, baseline = (result["results"][model][key] for model in MODELS)
            assert difference["points"] == pytest.approx(trained - baseline, abs=1e-3)
            if name != "transfer-stripes":  # its metric is the mean over the classes
                for model in MODELS:
                    correct = unpack_correct(result["outcomes"], model, key)
                    assert 100 * correct.mean() == pytest.approx(result["results"][model][key], abs=1e-3)
    # The set holds the same images as the run.
    assert len({result["outcomes"]["held_out"] for result in found.values()}) == 1


def test_few_shot_and_retrieval_of_a_run_are_written_once(measured_run, bucket, config):
    asked = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"few_shot": ("1", "50%"), "retrieval": True})}
    )
    few, retrieval = (evaluate(measured_run, bucket, asked) for evaluate in (evaluate_few_shot, evaluate_retrieval))
    assert set(few["results"]["trained"]) == {"few-shot/1", "few-shot/50%"} and few["seeds"] == 5
    assert set(retrieval["results"]["baseline"]) == {
        "retrieval/map",
        "retrieval/r@1",
        "retrieval/r@5",
        "retrieval/r@10",
    }
    assert retrieval["outcomes"]["images"] == 11
    assert evaluate_few_shot(measured_run, bucket, asked) == few
    assert evaluate_retrieval(measured_run, bucket, asked) == retrieval


def test_transfer_to_an_unlabelled_set_is_left_out(measured_run, bucket, config):
    result = evaluate_transfer(measured_run, bucket, config, "plain")
    assert result["status"] == "left_out"
    assert "no labels" in result["reason"]


def test_transfer_to_an_unknown_set_is_reported(measured_run, bucket, config):
    with pytest.raises(UserError, match=r"transfer set stripe: not in evaluation.transfer; .* stripes, plain"):
        evaluate_transfer(measured_run, bucket, config, "stripe")


def test_results_are_written_once(measured_run, bucket, config):
    first = evaluate_knn(measured_run, bucket, config)
    before = objects(bucket, f"{measured_run}/evaluation")
    assert evaluate_knn(measured_run, bucket, config) == first == bucket.get_json(f"{measured_run}/evaluation/knn.json")
    assert objects(bucket, f"{measured_run}/evaluation") == before


def test_images_of_a_run(measured_run, bucket, config):
    index = visualize(measured_run, bucket, config)
    assert [p["file"] for p in index["images"]] == ["correspondence.png", "attention.png"]
    assert index["left_out"] == []
    figure = index["figures"]["correspondence"]
    assert figure["images"] == 5 and figure["regions"] >= 5
    assert all(0 <= figure[key] <= 100 for key in (*MODELS, "chance"))
    for drawn in index["images"]:
        image = Image.open(io.BytesIO(bucket.get_bytes(f"{measured_run}/visualization/{drawn['file']}")))
        assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 0, "the page's own colour shows through"
        assert min(image.size) > 200
    before = objects(bucket, f"{measured_run}/visualization")
    assert visualize(measured_run, bucket, config) == index
    assert objects(bucket, f"{measured_run}/visualization") == before


def test_the_run_can_be_promoted(measured_run, bucket, config):
    evaluate_knn(measured_run, bucket, config)
    chosen = Config.from_mapping({"promotion": {"metric": "knn/200", "pointer": "whole-run"}})
    decision = promote(measured_run, bucket, chosen)
    assert decision["metric"] == "knn/200" and decision["reason"]


def test_without_labels_figures_are_left_out_and_images_drawn(unlabelled_run, bucket, config):
    extract_features(unlabelled_run, bucket, config)
    for evaluate in (evaluate_knn, evaluate_linear):
        result = evaluate(unlabelled_run, bucket, config)
        assert (result["status"], result["results"]) == ("left_out", {})
        assert "no labels" in result["reason"]
    assert len(visualize(unlabelled_run, bucket, config)["images"]) == 2
    decision = promote(unlabelled_run, bucket, Config())
    assert not decision["promoted"] and "left out" in decision["reason"]
