"""Confusion of pixels, and the metrics that follow from it. Imports no torch.

They are those of the field (Long et al. 2015, arXiv 1411.4038): pixels are counted over all images before
anything is divided. ``miou`` is torchmetrics' ``MulticlassJaccardIndex`` with macro average.
"""

from __future__ import annotations

import numpy as np

from shards import IGNORE


def confusion(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count the pixels of one image by true and by predicted class.

    Args:
        predicted: class numbers.
        truth: uint8 of the same shape; pixels that are IGNORE are not counted.
        num_classes: K.

    Returns:
        uint32 (K, K): truth × predicted.
    """
    counted = truth != IGNORE
    pairs = truth[counted].astype(np.int64) * num_classes + predicted[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, -1).astype(np.uint32)


def evaluate(confusions: np.ndarray) -> dict[str, float]:
    """Compute every metric from the counts of a split.

    Args:
        confusions: (N, K, K) pixel counts of N images, truth × predicted.

    Returns:
        ``miou`` and ``mean_dice``: means of intersection over union and of Dice over the classes that occur
        in the truth or in the prediction; ``mean_accuracy``: mean recall over the classes in the truth;
        ``pixel_accuracy``: share of pixels that are right. NaN where no pixel is counted.
    """
    total = confusions.sum(axis=0, dtype=np.float64)
    right, true, predicted = np.diagonal(total), total.sum(axis=1), total.sum(axis=0)
    return {
        "miou": _mean_ratio(right, true + predicted - right),
        "mean_dice": _mean_ratio(2 * right, true + predicted),
        "mean_accuracy": _mean_ratio(right, true),
        "pixel_accuracy": _mean_ratio(right.sum(keepdims=True), true.sum(keepdims=True)),
    }


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> float:
    """The mean over classes of part / whole, where there is a whole."""
    there = whole > 0
    return float((part[there] / whole[there]).mean()) if there.any() else float("nan")
