"""The metrics of :mod:`pipeline.evaluate.metrics` under sample weights, for many rows of weights at once.

A bootstrap of a thousand draws costs a few matrix products instead of a thousand calls. With all weights 1
the values are those of scikit-learn (tested).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from pipeline.evaluate.metrics import THRESHOLD


def weighted_metrics(
    names: tuple[str, ...], probabilities: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute metrics for every row of weights.

    Args:
        names: of ``pipeline.evaluate.protocols.METRICS`` or, for multi-label, ``MULTILABEL_METRICS``.
        probabilities: (N, K).
        targets: int (N,), or (N, K) of 0 and 1.
        weights: float32 (B, N), whole numbers.

    Returns:
        name → float64 (B,); NaN where a metric does not exist under that row's weights.
    """
    multilabel = targets.ndim == 2
    truth = targets > 0.5 if multilabel else targets[:, None] == np.arange(probabilities.shape[1])
    counted = _multilabel_counts if multilabel else _multiclass_counts
    found = dict(counted(probabilities, targets, truth, weights))
    if "macro_auroc" in names:
        found["macro_auroc"] = _per_class(_auroc, probabilities, truth, weights)
    if "map" in names:
        found["map"] = _per_class(_average_precision, probabilities, truth, weights)
    return {name: found[name] for name in names}


def _multiclass_counts(
    probabilities: np.ndarray, targets: np.ndarray, truth: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    guess = probabilities.argmax(axis=1)[:, None] == np.arange(probabilities.shape[1])
    hits, support, guessed = (_sums(weights, part) for part in (truth & guess, truth, guess))
    accuracy = hits.sum(axis=1) / support.sum(axis=1)
    return {
        "accuracy": accuracy,
        "micro_f1": accuracy,
        "balanced_accuracy": _mean_over_classes(hits, support, support > 0),
        "macro_f1": _mean_over_classes(2 * hits, support + guessed, support > 0),
    }


def _multilabel_counts(
    probabilities: np.ndarray, targets: np.ndarray, truth: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    guess = probabilities > THRESHOLD
    hits, support, guessed = (_sums(weights, part) for part in (truth & guess, truth, guess))
    total = weights.sum(axis=1, dtype=np.float64)[:, None]
    negatives = total - support
    rejected = total - support - guessed + hits
    with np.errstate(invalid="ignore", divide="ignore"):
        recalls = np.stack([hits / support, rejected / negatives])
        micro = 2 * hits.sum(axis=1) / (support + guessed).sum(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing are NaN, as meant
        balanced = np.nanmean(np.where(support > 0, np.nanmean(recalls, axis=0), np.nan), axis=1)
    return {
        "accuracy": weights.astype(np.float64) @ (guess == truth).all(axis=1) / total[:, 0],
        "balanced_accuracy": balanced,
        "macro_f1": _mean_over_classes(2 * hits, support + guessed, support > 0),
        "micro_f1": np.nan_to_num(micro),
    }


def _sums(weights: np.ndarray, part: np.ndarray) -> np.ndarray:
    """(B, K) sums of whole numbers, exact in float32 up to 2**24."""
    return (weights @ part.astype(np.float32)).astype(np.float64)


def _mean_over_classes(numerator: np.ndarray, denominator: np.ndarray, exists: np.ndarray) -> np.ndarray:
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=exists)
    classes = exists.sum(axis=1)
    return np.divide(ratio.sum(axis=1), classes, out=np.full(len(ratio), np.nan), where=classes > 0)


class _Ranking:
    """One class's samples, the most probable first, and the span of equal probabilities at each positive.

    Attributes:
        order: (N,) positions of the samples.
        positives: (P,) where in the order the positives are.
        start, end: (P,) the span of samples that share each positive's probability, ``end`` past the last.
    """

    def __init__(self, probabilities: np.ndarray, truth: np.ndarray) -> None:
        self.order = np.argsort(-probabilities, kind="stable")
        falling = -probabilities[self.order]
        self.positives = np.flatnonzero(truth[self.order])
        self.start = np.searchsorted(falling, falling[self.positives], side="left")
        self.end = np.searchsorted(falling, falling[self.positives], side="right")


Score = Callable[[_Ranking, np.ndarray], np.ndarray]


def _per_class(score: Score, probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of a ranking score over the classes that have one; it gets (N, B) weights in rank order."""
    by_sample = np.ascontiguousarray(weights.T)  # sums along ranks then run over contiguous memory
    total, classes = np.zeros(len(weights)), np.zeros(len(weights))
    for k in np.flatnonzero(truth.any(axis=0)):
        ranking = _Ranking(probabilities[:, k], truth[:, k])
        with np.errstate(invalid="ignore", divide="ignore"):
            value = score(ranking, by_sample[ranking.order])
        exists = np.isfinite(value)
        total += np.where(exists, value, 0.0)
        classes += exists
    return np.divide(total, classes, out=np.full(len(total), np.nan), where=classes > 0)


def _auroc(ranking: _Ranking, weights: np.ndarray) -> np.ndarray:
    """Share of (positive, negative) pairs in the right order, a tie counting half."""
    positive = weights[ranking.positives]
    weights[ranking.positives] = 0
    above = _sums_above(weights)
    lost = np.einsum("pb,pb->b", positive, above[ranking.start] + above[ranking.end], dtype=np.float64) / 2
    return 1 - lost / (positive.sum(axis=0, dtype=np.float64) * above[-1])


def _average_precision(ranking: _Ranking, weights: np.ndarray) -> np.ndarray:
    """Mean over positives of the precision among all samples at least as probable."""
    positive = weights[ranking.positives]
    every = _sums_above(weights)[ranking.end]
    upto = np.searchsorted(ranking.positives, ranking.end)
    precision = np.divide(_sums_above(positive)[upto], every, out=np.zeros_like(every), where=every > 0)
    found = np.einsum("pb,pb->b", positive, precision, dtype=np.float64)
    return found / positive.sum(axis=0, dtype=np.float64)


def _sums_above(weights: np.ndarray) -> np.ndarray:
    """(N + 1, B): row i is the sum of the first i rows; whole numbers, exact in float32 up to 2**24."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]), np.float32)
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums
