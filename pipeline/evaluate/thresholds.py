"""Operating points: for each class the score above which it is taken to be there, chosen on validation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Score = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]
DEFAULT = 0.5


def thresholds(probabilities: np.ndarray, targets: np.ndarray) -> list[float]:
    """A threshold a class, by what a validation split says.

    With several labels an image, each class gets the threshold of its greatest F1; with two classes of which
    an image has one, each gets that of the greatest Youden index (sensitivity + specificity - 1; Youden,
    *Index for rating diagnostic tests*, Cancer 1950). A threshold lies halfway between two scores that occur;
    among equally good ones the nearest to 0.5 is taken.

    Args:
        probabilities: (N, K).
        targets: int (N,), or for several labels 0 and 1 (N, K).

    Returns:
        K thresholds, 0.5 for a class without a positive or without a negative; none for one label of three
        or more classes, where the most probable class is the answer.
    """
    several = targets.ndim == 2
    if not several and probabilities.shape[1] != 2:
        return []
    truth = targets > 0.5 if several else np.stack([targets == 0, targets == 1], axis=1)
    score = _f1 if several else _youden
    return [_best(probabilities[:, k], truth[:, k], score) for k in range(probabilities.shape[1])]


def _best(scores: np.ndarray, truth: np.ndarray, score: Score) -> float:
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return DEFAULT
    values = np.unique(scores.astype(np.float64))
    candidates = np.concatenate([[DEFAULT], (values[1:] + values[:-1]) / 2])
    rising = np.sort(scores[truth].astype(np.float64)), np.sort(scores[~truth].astype(np.float64))
    true_positives = positives - np.searchsorted(rising[0], candidates, side="right")
    false_positives = negatives - np.searchsorted(rising[1], candidates, side="right")
    quality = np.round(score(true_positives, false_positives, positives, negatives), 12)
    best = candidates[quality == quality.max()]
    return float(best[np.abs(best - DEFAULT).argmin()])


def _f1(tp: np.ndarray, fp: np.ndarray, positives: int, negatives: int) -> np.ndarray:
    return 2 * tp / (positives + tp + fp)


def _youden(tp: np.ndarray, fp: np.ndarray, positives: int, negatives: int) -> np.ndarray:
    return tp / positives - fp / negatives
