from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate.metrics import evaluate
from pipeline.evaluate.protocols import METRICS, MULTILABEL_METRICS
from pipeline.report.statistics import resample_weights
from pipeline.report.weighted import weighted_metrics


def data(multilabel: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions with many ties, a class that is never true, and one that is rare."""
    rng = np.random.default_rng(seed)
    if multilabel:
        targets = (rng.random((60, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(np.uint8)
        targets[0, 2] = 1
        probabilities = 0.4 * targets + 0.6 * rng.random((60, 4))
    else:
        targets = rng.choice(4, 60, p=[0.6, 0.35, 0.05, 0.0])
        probabilities = rng.dirichlet(np.ones(4), 60) + 0.4 * np.eye(4)[targets]
    return np.round(probabilities, 1).astype(np.float32), targets


@pytest.mark.parametrize("multilabel", [False, True])
def test_weights_of_one_give_scikit_learns_values(multilabel: bool) -> None:
    probabilities, targets = data(multilabel)
    names = MULTILABEL_METRICS if multilabel else METRICS
    found = weighted_metrics(names, probabilities, targets, np.ones((1, len(targets)), np.float32))
    expected = evaluate(probabilities, targets)
    assert {name: value[0] for name, value in found.items()} == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("multilabel", [False, True])
def test_a_resamples_metrics_are_those_of_its_samples(multilabel: bool) -> None:
    probabilities, targets = data(multilabel, seed=3)
    names = MULTILABEL_METRICS if multilabel else METRICS
    weights = resample_weights(None, count=len(targets), draws=25, seed=2)
    found = weighted_metrics(names, probabilities, targets, weights)
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(len(targets)), weight.astype(int))
        expected = evaluate(probabilities[drawn], targets[drawn])
        assert {name: found[name][row] for name in names} == pytest.approx(expected, nan_ok=True)


def test_metric_that_does_not_exist_in_a_resample_is_nan() -> None:
    probabilities, targets = np.eye(2, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 1])
    weights = np.array([[3, 0, 0], [1, 1, 1]], np.float32)
    found = weighted_metrics(METRICS, probabilities, targets, weights)
    assert np.isnan(found["macro_auroc"][0]) and found["macro_auroc"][1] == 1
    assert (found["accuracy"] == 1).all()
