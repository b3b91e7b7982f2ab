"""Weighted k-NN against the published implementation."""

from __future__ import annotations

import pytest

from esvit_core.evaluation.knn import weighted_knn


def test_knn(golden, golden_file, record):
    arrays = golden.arrays(golden_file)
    data = [arrays[f"{split}_{kind}"] for split in ("train", "test") for kind in ("features", "labels")]
    ks = sorted(int(name.removeprefix("top1/")) for name in arrays if name.startswith("top1/"))
    assert ks
    for k in ks:
        top1, top5 = weighted_knn(*data, k, float(arrays["temperature"]))
        record(f"{golden_file} k={k}", {"top1": top1 - arrays[f"top1/{k}"], "top5": top5 - arrays[f"top5/{k}"]})
        assert top1 == pytest.approx(float(arrays[f"top1/{k}"]), abs=1e-6)
        if k >= 20:  # below, classes without a vote tie
            assert top5 == pytest.approx(float(arrays[f"top5/{k}"]), abs=1.0)


test_knn.golden_file = "knn"
