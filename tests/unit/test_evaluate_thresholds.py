"""Operating points by validation, against a search through all of them."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score

from pipeline.evaluate.thresholds import thresholds


def by_hand(scores, truth, quality):
    values = np.unique(scores)
    candidates = [0.5, *((values[1:] + values[:-1]) / 2)]
    found = [quality(truth, scores > candidate) for candidate in candidates]
    best = [c for c, q in zip(candidates, found) if q > max(found) - 1e-9]
    return min(best, key=lambda candidate: abs(candidate - 0.5))


def youden(truth, said):
    return recall_score(truth, said) + recall_score(truth, said, pos_label=0) - 1


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_get_the_greatest_youden_index(seed):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, 40)
    one = np.clip(0.2 * targets + rng.uniform(0, 0.6, 40), 0, 1)
    probabilities = np.stack([1 - one, one], axis=1)
    found = thresholds(probabilities, targets)
    assert found == pytest.approx([by_hand(probabilities[:, k], targets == k, youden) for k in (0, 1)])


@pytest.mark.parametrize("seed", range(5))
def test_several_labels_get_the_greatest_f1_each(seed):
    rng = np.random.default_rng(seed)
    targets = (rng.uniform(size=(30, 3)) < [0.5, 0.2, 0.1]).astype(np.float32)
    targets[0] = 1
    probabilities = np.round(np.clip(0.3 * targets + rng.uniform(0, 0.6, (30, 3)), 0, 1), 2)
    expected = [by_hand(probabilities[:, k], targets[:, k] > 0, f1_score) for k in range(3)]
    assert thresholds(probabilities, targets) == pytest.approx(expected)


def test_what_cannot_be_chosen_is_a_half_and_three_classes_have_none():
    assert thresholds(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[1, 0], [1, 0]])) == [0.5, 0.5]
    assert thresholds(np.full((4, 3), 1 / 3), np.array([0, 1, 2, 0])) == []
