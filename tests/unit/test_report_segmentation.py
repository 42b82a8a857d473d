"""Segmentation's metrics under weights are those of the images that the weights stand for."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score, recall_score

from pipeline.evaluate.protocols import METRICS_OF
from pipeline.evaluate.segmentation_metrics import confusion, evaluate
from pipeline.report import weighted_segmentation
from pipeline.report.predictions import Segmented, prediction_of
from pipeline.report.statistics import resample_weights
from pipeline.report.weighted_segmentation import SegmentationResamples

NAMES = METRICS_OF["segmentation"]
IMAGES, PIXELS, CLASSES = 12, 30, 5  # class 3 is in one image, class 4 nowhere and never predicted


@pytest.fixture
def maps() -> tuple[np.ndarray, np.ndarray]:
    """(N, P) classes of pixels: what they are, and what was predicted."""
    rng = np.random.default_rng(0)
    true = rng.choice(3, (IMAGES, PIXELS), p=[0.6, 0.35, 0.05])
    true[5, :4] = 3
    guess = rng.choice(3, (IMAGES, PIXELS))
    predicted = np.where(rng.random(true.shape) < 0.6, true, guess)
    predicted[7, :2] = 3
    return true, predicted


def prediction(true: np.ndarray, predicted: np.ndarray) -> Segmented:
    counts = np.zeros((IMAGES, CLASSES, CLASSES), np.uint32)
    np.add.at(counts, (np.arange(IMAGES)[:, None], true, predicted), 1)
    found = prediction_of({"confusion": counts, "rows": np.arange(IMAGES)})
    assert isinstance(found, Segmented)
    return found


def expected(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """By scikit-learn's definitions of each class, and means over those that exist."""
    true, predicted = true.ravel(), predicted.ravel()
    either, there = np.union1d(true, predicted), np.unique(true)
    return {
        "miou": jaccard_score(true, predicted, labels=either, average="macro"),
        "mean_dice": f1_score(true, predicted, labels=either, average="macro"),
        "mean_accuracy": recall_score(true, predicted, labels=there, average="macro"),
        "pixel_accuracy": (true == predicted).mean(),
    }


def test_a_resamples_metrics_are_those_of_its_images(maps: tuple[np.ndarray, np.ndarray]) -> None:
    true, predicted = maps
    weights = resample_weights(None, count=IMAGES, draws=40, seed=0)
    weights[0] = 1
    other = prediction(true, true)
    found = SegmentationResamples(other, weights).metrics(NAMES, [prediction(true, predicted), other])
    missing = 0
    for row, weight in enumerate(weights):
        drawn = np.repeat(np.arange(IMAGES), weight.astype(int))
        missing += 3 not in true[drawn]
        wanted = expected(true[drawn], predicted[drawn])
        assert {name: found[name][0, row] for name in NAMES} == pytest.approx(wanted)
        assert all(found[name][1, row] == 1 for name in NAMES)
    assert 5 < missing < 35  # the mean is over another number of classes then


def test_weights_of_one_give_what_the_protocols_report(maps: tuple[np.ndarray, np.ndarray]) -> None:
    confusions = np.stack([confusion(said, truth.astype(np.uint8), CLASSES) for truth, said in zip(*maps)])
    found = prediction_of({"confusion": confusions, "rows": np.arange(IMAGES)})
    assert isinstance(found, Segmented)
    once = SegmentationResamples(found, np.ones((1, IMAGES))).metrics(NAMES, [found])
    assert {name: once[name][0, 0] for name in NAMES} == pytest.approx(evaluate(confusions), rel=1e-12)


def test_draws_taken_in_parts_give_the_same_bits(
    maps: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, weights = prediction(*maps), resample_weights(None, count=IMAGES, draws=50, seed=0)
    once = SegmentationResamples(whole, weights).metrics(NAMES, [whole])
    monkeypatch.setattr(weighted_segmentation, "CELLS", 7 * IMAGES)
    parts = SegmentationResamples(whole, weights).metrics(NAMES, [whole])
    for name in NAMES:
        np.testing.assert_array_equal(once[name], parts[name])
