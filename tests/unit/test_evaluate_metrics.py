from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as oracle

from pipeline.errors import UserError
from pipeline.evaluate.metrics import evaluate
from pipeline.evaluate.protocols import METRICS, MULTILABEL_METRICS, PROTOCOLS, check_metric


def predictions(n: int = 200, k: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.choice(k, n, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    probabilities = rng.dirichlet(np.ones(k), n) + 0.5 * np.eye(k)[targets]
    return (probabilities / probabilities.sum(axis=1, keepdims=True)), targets


def test_multiclass_metrics_agree_with_torchmetrics() -> None:
    probabilities, targets = predictions()
    p, t = torch.tensor(probabilities), torch.tensor(targets)
    found = evaluate(probabilities, targets)
    assert tuple(found) == METRICS
    assert found["accuracy"] == pytest.approx(oracle.multiclass_accuracy(p, t, 5, average="micro").item())
    assert found["balanced_accuracy"] == pytest.approx(oracle.multiclass_accuracy(p, t, 5).item())
    assert found["macro_f1"] == pytest.approx(oracle.multiclass_f1_score(p, t, 5).item())
    assert found["micro_f1"] == pytest.approx(oracle.multiclass_f1_score(p, t, 5, average="micro").item())
    assert found["macro_auroc"] == pytest.approx(oracle.multiclass_auroc(p, t, 5).item())


def test_multilabel_metrics_agree_with_torchmetrics() -> None:
    rng = np.random.default_rng(1)
    targets = (rng.random((150, 4)) < [0.5, 0.3, 0.2, 0.1]).astype(np.int64)
    probabilities = np.clip(0.4 * targets + 0.6 * rng.random((150, 4)), 0, 1)
    p, t = torch.tensor(probabilities), torch.tensor(targets)
    found = evaluate(probabilities, targets)
    assert tuple(found) == MULTILABEL_METRICS
    assert found["accuracy"] == pytest.approx(oracle.multilabel_exact_match(p, t, 4).item())
    assert found["macro_f1"] == pytest.approx(oracle.multilabel_f1_score(p, t, 4).item())
    assert found["micro_f1"] == pytest.approx(oracle.multilabel_f1_score(p, t, 4, average="micro").item())
    assert found["macro_auroc"] == pytest.approx(oracle.multilabel_auroc(p, t, 4).item())
    assert found["map"] == pytest.approx(oracle.multilabel_average_precision(p, t, 4).item())
    sensitivity = oracle.multilabel_recall(p, t, 4, average=None)
    specificity = oracle.multilabel_specificity(p, t, 4, average=None)
    assert found["balanced_accuracy"] == pytest.approx(((sensitivity + specificity) / 2).mean().item())


def test_macro_f1_is_not_recall() -> None:
    probabilities = np.eye(2)[[0, 0, 0, 0, 1, 0]]
    found = evaluate(probabilities, np.array([0, 0, 0, 1, 1, 1]))
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["macro_f1"] == pytest.approx((2 * 3 / (3 + 5) + 2 * 1 / (3 + 1)) / 2)


def test_class_absent_from_truth_is_left_out_of_means() -> None:
    probabilities = np.eye(3)[[0, 0, 1, 2]] * 0.9 + 0.03
    found = evaluate(probabilities, np.array([0, 0, 1, 1]))
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert not math.isnan(found["macro_auroc"])


def test_metric_that_does_not_exist_is_nan() -> None:
    found = evaluate(np.full((4, 2), 0.5), np.zeros(4, np.int64))
    assert math.isnan(found["macro_auroc"])
    assert found["accuracy"] == 1
    nothing = evaluate(np.full((4, 2), 0.2), np.zeros((4, 2), np.int64))
    assert math.isnan(nothing["map"]) and math.isnan(nothing["macro_f1"])
    assert nothing["accuracy"] == 1


def test_diverged_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="diverged"):
        evaluate(np.full((3, 2), np.nan), np.zeros(3, np.int64))


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"select_by.*'macro_f2'.*did you mean 'macro_f1'"):
        check_metric("macro_f2", task="multiclass", key="select_by")
    with pytest.raises(UserError, match="'map' for single-label"):
        check_metric("map", task="multiclass", key="select_by")
    assert check_metric("map", task="multilabel", key="select_by") == "map"


def test_one_metric_of_an_experiment_means_each_kinds_main_one() -> None:
    assert check_metric("macro_f1", task="segmentation", key="select_by") == "miou"
    assert check_metric("pixel_accuracy", task="segmentation", key="select_by") == "pixel_accuracy"
    assert check_metric("macro_f1", task="detection", key="select_by") == "box_ap"
    with pytest.raises(UserError, match="'miuo' for segmentation data, did you mean 'miou'"):
        check_metric("miuo", task="segmentation", key="select_by")
    with pytest.raises(UserError, match="'miou' for single-label"):
        check_metric("miou", task="multiclass", key="select_by")


def test_names_need_no_torch() -> None:
    code = "import sys; import pipeline.evaluate.protocols; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_protocol_is_there() -> None:
    import importlib

    for info in PROTOCOLS.values():
        module, name = info.target.split(":")
        assert callable(getattr(importlib.import_module(module), name))
