"""Average precision of boxes and masks as COCO defines it, and the matches that it can be computed from.

Lin et al. 2014 (arXiv 1405.0312) and its evaluation code: detections of a class go by falling score, each
takes the free object that it overlaps most; precision is averaged over 101 recalls, ten thresholds of the
overlap, and the classes that have objects. The numbers are torchmetrics', with the COCO library behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from faster_coco_eval.core import mask as coco
from torchmetrics.detection import MeanAveragePrecision

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the intersection over union
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of a class in an image that count
_NAMES = {"ap": "map", "ap50": "map_50", "ap75": "map_75"}  # ours, and torchmetrics'


@dataclass(frozen=True, eq=False)
class Truth:
    """The objects of one image.

    Attributes:
        boxes: (M, 4) float32, x0, y0, x1, y1 in pixels.
        labels: (M,) int64.
        crowd: (M,) bool; what is found there counts neither for nor against.
        area: (M,) float32, square pixels.
        masks: (M, H, W) bool, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    masks: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image.

    Attributes:
        boxes: (D, 4) float32, in pixels of the image that the truth is of.
        labels: (D,) int64.
        scores: (D,) float32.
        masks: (D, H, W) bool, or None.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None = None


class AveragePrecision:
    """Takes what was found image by image, and says how good it was.

    Args:
        num_classes: K.
        masks: judge masks beside boxes.
        matches: keep what :meth:`arrays` gives.
    """

    def __init__(self, num_classes: int, *, masks: bool, matches: bool = False) -> None:
        self._num_classes = num_classes
        self._kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
        # torchmetrics' own thresholds are rounded to float32: a recall of 1/10 would miss its step
        self._metric = MeanAveragePrecision(
            iou_type=tuple(self._kinds.values()),  # type: ignore[arg-type]
            iou_thresholds=THRESHOLDS.tolist(),
            rec_thresholds=RECALLS.tolist(),
            max_detection_thresholds=[1, 10, MOST],
            backend="faster_coco_eval",
        )
        self._metric.warn_on_many_detections = False
        self._matches: dict[str, list[dict[str, np.ndarray]]] | None = None
        if matches:
            self._matches = {kind: [] for kind in self._kinds}
        self._counts: list[np.ndarray] = []

    def add(self, found: Detections, truth: Truth) -> None:
        """The next image."""
        theirs = {
            "boxes": torch.from_numpy(found.boxes),
            "scores": torch.from_numpy(found.scores),
            "labels": torch.from_numpy(found.labels),
        }
        ours = {
            "boxes": torch.from_numpy(truth.boxes),
            "labels": torch.from_numpy(truth.labels),
            "iscrowd": torch.from_numpy(truth.crowd.astype(np.int64)),
            "area": torch.from_numpy(truth.area),
        }
        if "mask" in self._kinds:
            assert found.masks is not None and truth.masks is not None
            theirs["masks"], ours["masks"] = torch.from_numpy(found.masks), torch.from_numpy(truth.masks)
        self._metric.update([theirs], [ours])
        self._counts.append(np.bincount(truth.labels[~truth.crowd], minlength=self._num_classes))
        if self._matches is not None:
            for kind, matches in self._matches.items():
                matches.append(_matches_of(found, truth, masks=kind == "mask"))

    def metrics(self) -> dict[str, float]:
        """``box_ap``, ``box_ap50``, ``box_ap75``, with masks also those of masks; NaN without an object."""
        computed = self._metric.compute()
        found = {}
        for kind, theirs in self._kinds.items():
            prefix = "" if len(self._kinds) == 1 else f"{theirs}_"
            for ours, name in _NAMES.items():
                value = float(computed[prefix + name])
                found[f"{kind}_{ours}"] = value if value >= 0 else float("nan")
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """What average precision is computed from under any weights of the images; see docs/formats.md.

        Returns:
            ``truth_count`` int32 (N, K); of D detections in order of their images, and in each by falling
            score, ``detection_image`` int32 (D,), ``detection_class`` int32 (D,), ``detection_score`` float32
            (D,), ``detection_match`` int8 (D, T); with masks the same with ``mask_`` before the name.
        """
        assert self._matches is not None
        arrays: dict[str, np.ndarray] = {
            "truth_count": np.array(self._counts, np.int32).reshape(-1, self._num_classes)
        }
        for kind, matches in self._matches.items():
            prefix = "mask_" if kind == "mask" else ""
            counts = [len(image["class"]) for image in matches]
            arrays[f"{prefix}detection_image"] = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
            for name in ("class", "score", "match"):
                arrays[f"{prefix}detection_{name}"] = np.concatenate([image[name] for image in matches])
        return arrays


def _matches_of(found: Detections, truth: Truth, *, masks: bool) -> dict[str, np.ndarray]:
    """The detections of one image that count, by falling score, and what each matched."""
    overlaps_of = _overlaps(found, truth, masks=masks)
    order = np.argsort(-found.scores, kind="stable")
    match = np.zeros((len(order), len(THRESHOLDS)), np.int8)
    counts = np.ones(len(order), bool)
    for label in np.unique(found.labels):
        places = np.flatnonzero(found.labels[order] == label)
        counts[places[MOST:]] = False
        places = places[:MOST]
        objects = np.flatnonzero(truth.labels == label)
        match[places] = match_greedily(overlaps_of(order[places], objects), truth.crowd[objects])
    return {
        "class": found.labels[order][counts].astype(np.int32),
        "score": found.scores[order][counts].astype(np.float32),
        "match": match[counts],
    }


def match_greedily(overlaps: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """COCO's assignment of detections to objects of one class in one image.

    Args:
        overlaps: (D, M), detections by falling score; of crowds, the share of the detection within the crowd.
        crowd: (M,) bool.

    Returns:
        int8 (D, T): 1 where it took an object, 0 where it took none, -1 where it took none but is in a crowd.
    """
    match = np.zeros((len(overlaps), len(THRESHOLDS)), np.int8)
    for column, threshold in enumerate(np.minimum(THRESHOLDS, 1 - 1e-10)):
        free = ~crowd
        for row, overlap in enumerate(overlaps):
            reached = overlap >= threshold
            wanted = np.flatnonzero(reached & free)
            if len(wanted):
                best = wanted[::-1][overlap[wanted[::-1]].argmax()]  # of equals COCO takes the last
                free[best], match[row, column] = False, 1
            elif (reached & crowd).any():
                match[row, column] = -1
    return match


def _overlaps(found: Detections, truth: Truth, *, masks: bool):
    """A function from numbers of detections and of objects to their overlaps, by the COCO library."""
    if masks:
        assert found.masks is not None and truth.masks is not None
        left, right = ([_run_lengths(mask) for mask in every] for every in (found.masks, truth.masks))
    else:
        left, right = (_sides(boxes).tolist() for boxes in (found.boxes, truth.boxes))

    def of(detections: np.ndarray, objects: np.ndarray) -> np.ndarray:
        if not len(detections) or not len(objects):
            return np.zeros((len(detections), len(objects)))
        crowd = truth.crowd[objects].astype(int).tolist()
        return np.asarray(coco.iou([left[d] for d in detections], [right[m] for m in objects], crowd))

    return of


def _sides(boxes: np.ndarray) -> np.ndarray:
    """x0, y0, width, height, as the COCO library wants boxes."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _run_lengths(mask: np.ndarray) -> dict:
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))
