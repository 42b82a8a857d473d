"""The metrics of :mod:`pipeline.evaluate.metrics` under sample weights, for many rows of weights at once.

A bootstrap of a thousand draws costs a few matrix products instead of a thousand calls. With all weights 1
the values are those of scikit-learn (tested). Weights are whole numbers, so every sum below is exact in
whatever order it is made, as long as it stays below ``EXACT``; the bits of a metric do not depend on it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from pipeline.evaluate.metrics import THRESHOLD
from pipeline.report.predictions import Classified

EXACT = 2**24  # float32 holds every whole number up to here
PAIR_CELLS = 16_000_000  # products of two samples' weights that may be kept, at 4 bytes each
Metrics = dict[str, np.ndarray]


def weighted_metrics(
    names: tuple[str, ...], probabilities: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> Metrics:
    """Compute metrics for every row of weights.

    Args:
        names: of ``pipeline.evaluate.protocols.METRICS`` or, for multi-label, ``MULTILABEL_METRICS``.
        probabilities: (N, K).
        targets: int (N,), or (N, K) of 0 and 1.
        weights: float32 (B, N), whole numbers.

    Returns:
        name → float64 (B,); NaN where a metric does not exist under that row's weights.
    """
    whole = Classified(probabilities, targets, np.arange(len(targets)))
    found = Resamples(whole, weights).metrics(names, [whole])
    return {name: values[0] for name, values in found.items()}


class Resamples:
    """One test split under many rows of weights, for any number of predictions made on it.

    Args:
        first: any of them.
        weights: (B, N) whole numbers.
    """

    def __init__(self, first: Classified, weights: np.ndarray) -> None:
        targets = first.targets
        self.multilabel = targets.ndim == 2
        self.truth = targets > 0.5 if self.multilabel else targets[:, None] == np.arange(first.classes)
        self._weights = weights.astype(np.min_scalar_type(int(weights.max(initial=0))))
        self._total = weights.sum(axis=1, dtype=np.float64)
        self._support = _sums(weights, self.truth)  # (B, K)

    def metrics(self, names: tuple[str, ...], predictions: Sequence[Classified]) -> Metrics:
        """Compute metrics of several predictions under every row of weights.

        Args:
            names: as for :func:`weighted_metrics`.
            predictions: T of them.

        Returns:
            name → float64 (T, B).
        """
        probabilities = np.stack([prediction.probabilities for prediction in predictions])
        weights = self._weights.astype(np.float32)
        if self.multilabel:
            each = [_multilabel_counts(one, self.truth, weights) for one in probabilities]
            found = {name: np.stack([one[name] for one in each]) for name in each[0]}
        else:
            found = self._multiclass_counts(probabilities, weights)
        if "macro_auroc" in names:
            if self._pairs is not None:
                found["macro_auroc"] = self._auroc_of_pairs(probabilities, self._pairs)
            else:
                found["macro_auroc"] = self._per_class(_auroc, probabilities, weights)
        if "map" in names:
            found["map"] = self._per_class(_average_precision, probabilities, weights)
        return {name: found[name] for name in names}

    def _multiclass_counts(self, probabilities: np.ndarray, weights: np.ndarray) -> Metrics:
        tasks, samples, classes = probabilities.shape
        guess = probabilities.argmax(axis=2)[:, None, :] == np.arange(classes)[:, None]  # (T, K, N)
        both = np.concatenate([guess & self.truth.T, guess]).astype(np.float32)
        counts = (both.reshape(-1, samples) @ weights.T).astype(np.float64)
        hits, guessed = counts.reshape(2, tasks, classes, -1)  # each (T, K, B)
        support = self._support.T
        present = (support > 0).sum(axis=0)  # of the others there are no hits either
        accuracy = hits.sum(axis=1) / support.sum(axis=0)
        recalls = _sum_over_classes(hits / np.maximum(support, 1))
        f1 = _sum_over_classes(2 * hits / np.maximum(support + guessed, 1))
        return {
            "accuracy": accuracy,
            "micro_f1": accuracy,
            "balanced_accuracy": divide(recalls, present),
            "macro_f1": divide(f1, present),
        }

    @cached_property
    def _pairs(self) -> dict[int, np.ndarray] | None:
        """Class → float32 (P · Q, B): weights of each positive times weights of each negative.

        None where that would take too much memory, or a sum of them would not be exact.
        """
        positives = self.truth.sum(axis=0)
        products = positives * (len(self.truth) - positives)
        greatest = (self._support * (self._total[:, None] - self._support)).max(initial=0)
        if int(products.sum()) * len(self._weights) > PAIR_CELLS or 2 * greatest >= EXACT:
            return None
        by_sample = self._weights.T.astype(np.float32)
        return {
            k: (by_sample[truth][:, None] * by_sample[~truth]).reshape(-1, by_sample.shape[1])
            for k, truth in enumerate(self.truth.T)
            if truth.any()
        }

    def _auroc_of_pairs(self, probabilities: np.ndarray, pairs: dict[int, np.ndarray]) -> np.ndarray:
        """As :func:`_auroc`, from a comparison of every positive with every negative: one product a class."""
        found, classes = np.zeros((len(probabilities), len(self._weights))), np.zeros(len(self._weights))
        for k, products in pairs.items():
            truth, support = self.truth[:, k], self._support[:, k]
            positive = probabilities[:, truth, k][:, :, None]
            negative = probabilities[:, ~truth, k][:, None, :]
            wrong = np.add(negative > positive, negative >= positive, dtype=np.float32)  # a tie is half wrong
            lost = (wrong.reshape(len(wrong), -1) @ products).astype(np.float64) / 2
            possible = support * (self._total - support)
            exists = possible > 0
            found += np.where(exists, 1 - lost / np.maximum(possible, 1), 0.0)
            classes += exists
        return divide(found, classes)

    def _per_class(self, score: Score, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Mean of a ranking score over the classes that have one; it gets (N, B) weights in rank order."""
        by_sample = np.ascontiguousarray(weights.T)  # sums along ranks then run over contiguous memory
        found = np.zeros((len(probabilities), len(weights)))
        classes = np.zeros_like(found)
        for task, one in enumerate(probabilities):
            for k in np.flatnonzero(self.truth.any(axis=0)):
                ranking = _Ranking(one[:, k], self.truth[:, k])
                with np.errstate(invalid="ignore", divide="ignore"):
                    value = score(ranking, by_sample[ranking.order])
                exists = np.isfinite(value)
                found[task] += np.where(exists, value, 0.0)
                classes[task] += exists
        return divide(found, classes)


def _multilabel_counts(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> Metrics:
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
        "macro_f1": mean_over_classes(2 * hits, support + guessed, support > 0),
        "micro_f1": np.nan_to_num(micro),
    }


def _sums(weights: np.ndarray, part: np.ndarray) -> np.ndarray:
    """(B, K) sums of whole numbers, exact in float32."""
    return (weights.astype(np.float32, copy=False) @ part.astype(np.float32)).astype(np.float64)


def mean_over_classes(numerator: np.ndarray, denominator: np.ndarray, exists: np.ndarray) -> np.ndarray:
    """Mean of a ratio over the classes for which it exists: three times (B, K) → (B,)."""
    ratio = np.divide(numerator, denominator, out=np.zeros_like(numerator), where=exists)
    return divide(ratio.sum(axis=1), exists.sum(axis=1))


def _sum_over_classes(values: np.ndarray) -> np.ndarray:
    """(T, K, B) → (T, B), with the bits of a sum along contiguous classes.

    Of those, numpy adds fewer than eight one after the other, as it does whole rows, which is much faster.
    """
    if values.shape[1] < 8:
        return values.sum(axis=1)
    return np.ascontiguousarray(values.swapaxes(1, 2)).sum(axis=2)


def divide(total: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Means; NaN where they are of nothing."""
    number = np.broadcast_to(number, total.shape)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


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
