"""Scores on another test set: values and intervals by an independent way of making them."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate.metrics import evaluate
from pipeline.inference.score import Scorer
from pipeline.report.bootstrap import SEED
from pipeline.report.statistics import interval_of_mean, resample_weights
from pipeline.specs import ReportSettings

SETTINGS = ReportSettings(bootstrap=40, confidence=0.9)
CLASSES = ["a", "b", "c"]


def made(several: bool, classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Probabilities and targets of 60 images of 20 patients."""
    rng = np.random.default_rng(classes)
    scores = rng.random((60, classes)).astype(np.float32)
    targets = rng.integers(0, 2, (60, classes)) if several else rng.integers(0, classes, 60)
    groups = [f"p{place // 3}" for place in range(60)]
    return scores if several else scores / scores.sum(axis=1, keepdims=True), targets, groups


@pytest.mark.parametrize(("several", "classes"), [(False, 2), (False, 3), (True, 3)])
def test_values_and_intervals_are_those_of_images_repeated_as_drawn(several: bool, classes: int) -> None:
    scores, targets, groups = made(several, classes)
    scorer = Scorer(targets, groups, classes=CLASSES[:classes], settings=SETTINGS)
    found = {(one.metric, one.of): one for one in scorer.scores(scores, [0.4] * classes)}
    whole = evaluate(scores, targets)
    weights = resample_weights(groups, count=60, draws=40, seed=SEED).astype(int)
    repeated = [np.repeat(np.arange(60), row) for row in weights]
    drawn = [evaluate(scores[rows], targets[rows]) for rows in repeated]
    for name, value in whole.items():
        one = found[name, ""]
        variance = np.var([some[name] for some in drawn], ddof=1)
        low, high = interval_of_mean(value, variance, units=20, confidence=0.9)
        assert one.value == value
        assert (one.low, one.high) == pytest.approx((low, high), abs=1e-9)
    for k, name in enumerate(CLASSES[:classes]):
        truth = targets[:, k] == 1 if several else targets == k
        for metric, side in (("sensitivity", truth), ("specificity", ~truth)):
            right = (scores[:, k] > 0.4) == truth
            shares = [right[rows][side[rows]].mean() for rows in repeated]
            value = right[side].mean()
            one, units = found[metric, name], len({groups[row] for row in np.flatnonzero(side)})
            low, high = interval_of_mean(value, np.var(shares, ddof=1), units=units, confidence=0.9)
            assert (one.groups, one.images) == (units, side.sum())
            assert (one.value, one.low, one.high) == pytest.approx((value, low, high), abs=1e-6)
            assert one.threshold == 0.4


def test_sensitivity_rests_on_the_patients_with_the_class() -> None:
    """All of 10 patients of 100 are found: that says no more than 10 of 10, and of 5 nothing."""
    for number, exists in ((10, True), (5, False)):
        targets = (np.arange(100) < number).astype(np.int64)
        scores = np.stack([targets == 0, targets == 1], axis=1).astype(np.float32)
        scorer = Scorer(targets, None, classes=["a", "b"], settings=SETTINGS)
        found = {(one.metric, one.of): one for one in scorer.scores(scores, [0.5, 0.5])}
        one = found["sensitivity", "b"]
        assert one.value == 1 and one.groups == number
        expected = interval_of_mean(1.0, 0.0, units=number, confidence=0.9)
        assert (one.low, one.high) == expected if exists else np.isnan(one.low)


def test_a_class_without_images_has_no_sensitivity() -> None:
    scores, _, _ = made(several=False, classes=2)
    scorer = Scorer(np.zeros(60, np.int64), None, classes=["a", "b"], settings=SETTINGS)
    found = {(one.metric, one.of): one.value for one in scorer.scores(scores, [0.5, 0.5])}
    assert np.isnan(found["sensitivity", "b"]) and np.isnan(found["specificity", "a"])
    assert np.isnan(found["macro_auroc", ""])
