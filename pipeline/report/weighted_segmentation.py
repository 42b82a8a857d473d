"""The metrics of segmentation under sample weights, for many rows of weights at once.

All of them are made of pixels counted by class, and counts of several images add up: a resample is a weighted
sum of whole numbers, exact in float64 below 2**53.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.report.predictions import Segmented
from pipeline.report.weighted import Metrics, divide, mean_over_classes

CELLS = 4_000_000  # weights that are turned into float64 at a time


class SegmentationResamples:
    """One test split under many rows of weights, for any number of predictions made on it.

    Args:
        first: any of them.
        weights: (B, N) whole numbers.
    """

    def __init__(self, first: Segmented, weights: np.ndarray) -> None:
        self._weights = weights.astype(np.min_scalar_type(int(weights.max(initial=0))))
        self._at_once = max(1, CELLS // len(first.rows))

    def metrics(self, names: tuple[str, ...], predictions: Sequence[Segmented]) -> Metrics:
        """Compute metrics of several predictions under every row of weights.

        Args:
            names: of ``METRICS_OF["segmentation"]``.
            predictions: T of them.

        Returns:
            name → float64 (T, B).
        """
        each = [self._metrics(prediction) for prediction in predictions]
        return {name: np.stack([found[name] for found in each]) for name in names}

    def _metrics(self, prediction: Segmented) -> Metrics:
        pixels = np.concatenate([prediction.right, prediction.true, prediction.predicted], axis=1)
        pixels = pixels.astype(np.float64)
        sums = [
            self._weights[start : start + self._at_once].astype(np.float64) @ pixels
            for start in range(0, len(self._weights), self._at_once)
        ]
        right, true, predicted = np.split(np.concatenate(sums), 3, axis=1)  # (B, K) each
        occurs = true + predicted > 0  # a class that is neither there nor predicted has no part in a mean
        return {
            "miou": mean_over_classes(right, true + predicted - right, occurs),
            "mean_dice": mean_over_classes(2 * right, true + predicted, occurs),
            "mean_accuracy": mean_over_classes(right, true, true > 0),
            "pixel_accuracy": divide(right.sum(axis=1), true.sum(axis=1)),
        }
