"""The metrics of one set of predictions, by scikit-learn's definitions. Imports no torch.

A class that no sample of the truth has is left out of every mean over classes: its recall and its AUROC do
not exist. Predicting it still costs, since the sample then misses its own class. A metric that does not exist
at all (AUROC where the truth has one class only) is NaN.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

THRESHOLD = 0.5  # a multi-label probability above it counts as "yes"


def evaluate(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Compute every metric that this kind of labels has.

    Args:
        probabilities: float (N, K). Multi-class: rows add up to 1. Multi-label: one probability a class.
        targets: int (N,) class numbers, or (N, K) of 0 and 1 for multi-label.

    Returns:
        ``accuracy`` (multi-label: share of samples with every label right), ``balanced_accuracy`` (mean
        recall over classes; multi-label: mean over classes of the mean of sensitivity and specificity),
        ``macro_f1``, ``micro_f1`` (multi-class: equal to the accuracy), ``macro_auroc`` (one class against
        the rest), and for multi-label ``map`` (mean average precision).

    Raises:
        ValueError: shapes that do not fit, no sample, or a probability that is not a number.
    """
    probabilities, targets = np.asarray(probabilities, np.float64), np.asarray(targets)
    if len(probabilities) != len(targets) or not len(targets):
        raise ValueError(f"{len(probabilities)} predictions for {len(targets)} targets")
    if not np.isfinite(probabilities).all():
        raise ValueError("a predicted probability is not a number: the training has diverged")
    if targets.ndim == 2:
        return _multilabel(probabilities, targets.astype(np.int64))
    return _multiclass(probabilities, targets.astype(np.int64))


def _multiclass(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    predicted = probabilities.argmax(axis=1)
    present = np.unique(targets)
    right = float((predicted == targets).mean())
    options = {"labels": present, "average": "macro", "zero_division": 0}
    aurocs = [roc_auc_score(targets == k, probabilities[:, k]) for k in present if len(present) > 1]
    return {
        "accuracy": right,
        "balanced_accuracy": float(recall_score(targets, predicted, **options)),
        "macro_f1": float(f1_score(targets, predicted, **options)),
        "micro_f1": right,
        "macro_auroc": _mean(aurocs),
    }


def _multilabel(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    predicted = (probabilities > THRESHOLD).astype(np.int64)
    present = np.flatnonzero(targets.any(axis=0))
    mixed = [k for k in present if not targets[:, k].all()]
    balanced = [_mean_recall(targets[:, k], predicted[:, k]) for k in present]
    f1 = [f1_score(targets[:, k], predicted[:, k], zero_division=0) for k in present]
    return {
        "accuracy": float((predicted == targets).all(axis=1).mean()),
        "balanced_accuracy": _mean(balanced),
        "macro_f1": _mean(f1),
        "micro_f1": float(f1_score(targets.ravel(), predicted.ravel(), zero_division=0)),
        "macro_auroc": _mean([roc_auc_score(targets[:, k], probabilities[:, k]) for k in mixed]),
        "map": _mean([average_precision_score(targets[:, k], probabilities[:, k]) for k in present]),
    }


def _mean_recall(targets: np.ndarray, predicted: np.ndarray) -> float:
    return _mean([(predicted[targets == value] == value).mean() for value in np.unique(targets)])


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
