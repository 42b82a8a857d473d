"""COCO's average precision under sample weights, for many rows of weights at once.

An image of weight w counts like w copies of it. Which detection finds which object is settled within an
image, so that matches hold in every resample; only the order of all detections by score, and the sums along
it, are over images. With all weights 1 the values are those of COCO's own evaluation (tested): 101 recalls,
objects of every size. At most 100 detections an image and class are for whoever matched them to see to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.report.predictions import Detected, Detections
from pipeline.report.weighted import Metrics, divide

RECALLS = np.linspace(0, 1, 101)
THRESHOLDS = 10  # IoU of .50, .55, … .95
AT = {"ap": slice(None), "ap50": slice(0, 1), "ap75": slice(5, 6)}  # of the thresholds
CELLS = 4_000_000  # detections × draws that are computed at a time


class DetectionResamples:
    """One test split under many rows of weights, for any number of predictions made on it.

    Args:
        first: any of them.
        weights: (B, N) whole numbers.
    """

    def __init__(self, first: Detected, weights: np.ndarray) -> None:
        small = np.min_scalar_type(int(weights.max(initial=0)))
        self._by_image = np.ascontiguousarray(weights.T.astype(small))  # (N, B)
        self._objects = first.truth.astype(np.float64).T @ weights.T.astype(np.float64)  # (K, B)

    def metrics(self, names: tuple[str, ...], predictions: Sequence[Detected]) -> Metrics:
        """Compute metrics of several predictions under every row of weights.

        Args:
            names: of ``METRICS_OF["detection"]``; those of masks only where every prediction has masks.
            predictions: T of them.

        Returns:
            name → float64 (T, B); NaN where no image that counts has an object.
        """
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for prediction in predictions:
            for matched, detections in (("box", prediction.boxes), ("mask", prediction.masks)):
                if detections is not None:
                    precisions = self._precisions(detections)
                    for name, thresholds in AT.items():
                        found[f"{matched}_{name}"].append(precisions[thresholds].mean(axis=0))
        return {name: np.stack(values) for name, values in found.items()}

    def _precisions(self, detections: Detections) -> np.ndarray:
        """(10, B): the average precision at each threshold, averaged over the classes that have an object."""
        total = np.zeros((THRESHOLDS, self._by_image.shape[1]))
        for label in np.flatnonzero(self._objects.any(axis=1)):
            mine = np.flatnonzero(detections.label == label)
            order = mine[np.lexsort((detections.image[mine], -detections.score[mine]))]
            image, match = detections.image[order], detections.match[order]
            at_once = max(1, CELLS // max(1, len(order)))
            for start in range(0, total.shape[1], at_once):
                draws = slice(start, start + at_once)
                total[:, draws] += _average_precision(
                    self._by_image[:, draws][image], match, self._objects[label, draws]
                )
        return divide(total, (self._objects > 0).sum(axis=0))


def _average_precision(weights: np.ndarray, match: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Of one class, at every threshold.

    A recall's precision is the best one at that recall or a greater one. It is reached where a detection
    finds an object, so nothing needs to be computed at those that find none.

    Args:
        weights: (D, B) of each detection's image, the detection with the greatest score first.
        match: (D, 10), of :class:`Detections`.
        objects: (B,) weighted number of objects.

    Returns:
        (10, B); 0 where there is no object.
    """
    found = np.zeros((match.shape[1], len(objects)))
    ranked = np.cumsum(weights, axis=0, dtype=np.int32)  # how many are up to here
    for threshold, matches in enumerate(match.T):
        hits = np.flatnonzero(matches == 1)
        ignored = np.flatnonzero(matches == -1)
        if not len(hits):
            continue
        true = np.cumsum(weights[hits], axis=0, dtype=np.int32)
        counted = ranked[hits]
        if len(ignored):
            before = np.cumsum(weights[ignored], axis=0, dtype=np.int32)
            place = np.searchsorted(ignored, hits)
            counted = counted - np.where(place[:, None] > 0, before[place - 1], 0)
        precision = true / np.maximum(counted, 1)
        falling = precision[::-1]
        np.maximum.accumulate(falling, axis=0, out=falling)
        reached = np.searchsorted(RECALLS, true / np.maximum(objects, 1), side="right")
        found[threshold] = (precision * np.diff(reached, axis=0, prepend=0)).sum(axis=0) / len(RECALLS)
    return found
