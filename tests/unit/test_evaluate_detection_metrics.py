"""Average precision: torchmetrics' numbers, and the arrays from which they can be computed again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from pipeline.evaluate.detection_metrics import (
    MOST,
    RECALLS,
    AveragePrecision,
    Detections,
    Truth,
    match_greedily,
)

SIDE = 40
CLASSES = 4


def ap_of(arrays: dict[str, np.ndarray], prefix: str = "") -> np.ndarray:
    """(T,) average precision from the arrays, written down from the definition: the oracle."""
    image, label, score, match = (
        arrays[f"{prefix}detection_{name}"] for name in ("image", "class", "score", "match")
    )
    assert (np.diff(image) >= 0).all()
    values = []
    for k, total in enumerate(arrays["truth_count"].sum(axis=0)):
        if not total:
            continue
        chosen = np.flatnonzero(label == k)
        chosen = chosen[np.argsort(-score[chosen], kind="stable")]
        per_threshold = []
        for column in match[chosen].T:
            column = column[column >= 0]
            right = np.cumsum(column == 1)
            recall, precision = right / total, right / np.arange(1, len(column) + 1)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            places = np.searchsorted(recall, RECALLS, side="left")
            per_threshold.append(np.mean([best[p] if p < len(best) else 0.0 for p in places]))
        values.append(per_threshold)
    return np.mean(values, axis=0)


def random_image(rng: np.random.Generator, *, whole: bool) -> tuple[Detections, Truth]:
    """Some objects, some of them crowds, found more or less; with ``whole`` numbers there are many ties."""

    def boxes(count: int) -> np.ndarray:
        start = rng.uniform(0, SIDE / 2, (count, 2))
        made = np.concatenate([start, start + rng.uniform(3, SIDE / 2, (count, 2))], axis=1)
        return (made.round() if whole else made).astype(np.float32)

    count, extra = rng.integers(0, 7), rng.integers(0, 12)
    truth = boxes(count)
    labels = rng.choice([0, 1, 3], count)  # class 2 never occurs, and class 3 is hardly found
    near = np.repeat(truth, 2, axis=0) + rng.normal(0, 1.5, (2 * count, 4)).astype(np.float32)
    found = np.concatenate([near.round() if whole else near, boxes(extra)])
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    found_labels = np.concatenate([np.repeat(labels, 2), rng.integers(0, 3, extra)])
    found_labels[found_labels == 3] = rng.choice([2, 3], (found_labels == 3).sum(), p=[0.8, 0.2])
    scores = rng.integers(1, 6, len(found)) / 7 if whole else rng.random(len(found))
    return (
        Detections(found, found_labels, scores.astype(np.float32), drawn(found)),
        Truth(
            truth,
            labels,
            rng.random(count) < 0.2,
            np.prod(truth[:, 2:] - truth[:, :2], axis=1).astype(np.float32),
            drawn(truth),
        ),
    )


def drawn(boxes: np.ndarray) -> np.ndarray:
    """Ellipses, so that masks overlap otherwise than boxes do."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    u = (x - centre[:, 0, None, None]) / half[:, 0, None, None]
    v = (y - centre[:, 1, None, None]) / half[:, 1, None, None]
    return u**2 + v**2 <= 1


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_arrays_give_torchmetrics_numbers(seed: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    images = [random_image(rng, whole=whole) for _ in range(30)]
    images.append((empty_detections(), images[0][1]))  # nothing found
    images.append((images[0][0], empty_truth()))  # nothing there
    images.append((empty_detections(), empty_truth()))
    ours = AveragePrecision(CLASSES, masks=True, matches=True)
    for found, truth in images:
        ours.add(found, truth)
    metrics, arrays = ours.metrics(), ours.arrays()
    assert 0.05 < metrics["mask_ap"] < metrics["mask_ap50"] < 0.95
    for kind, prefix in (("box", ""), ("mask", "mask_")):
        again = ap_of(arrays, prefix)
        assert abs(again.mean() - metrics[f"{kind}_ap"]) < 1e-6
        assert abs(again[0] - metrics[f"{kind}_ap50"]) < 1e-6
        assert abs(again[5] - metrics[f"{kind}_ap75"]) < 1e-6
        assert (arrays[f"{prefix}detection_match"] == -1).any(), "a test without crowds"
    assert arrays["truth_count"].shape == (33, CLASSES) and arrays["truth_count"].dtype == np.int32
    assert arrays["detection_match"].dtype == np.int8 and arrays["detection_match"].shape[1] == 10
    assert arrays["detection_image"].dtype == arrays["detection_class"].dtype == np.int32
    assert arrays["detection_score"].dtype == np.float32


def test_metrics_without_masks_are_torchmetrics_own() -> None:
    rng = np.random.default_rng(9)
    ours = AveragePrecision(CLASSES, masks=False)
    theirs = MeanAveragePrecision(backend="faster_coco_eval", rec_thresholds=RECALLS.tolist())
    for _ in range(10):
        found, truth = random_image(rng, whole=False)
        ours.add(found, truth)
        theirs.update(
            [
                {
                    "boxes": torch.from_numpy(found.boxes),
                    "labels": torch.from_numpy(found.labels),
                    "scores": torch.from_numpy(found.scores),
                }
            ],
            [
                {
                    "boxes": torch.from_numpy(truth.boxes),
                    "labels": torch.from_numpy(truth.labels),
                    "iscrowd": torch.from_numpy(truth.crowd.astype(int)),
                }
            ],
        )
    expected = theirs.compute()
    metrics = ours.metrics()
    assert set(metrics) == {"box_ap", "box_ap50", "box_ap75"}
    assert abs(metrics["box_ap"] - float(expected["map"])) < 1e-6


def test_more_than_a_hundred_of_a_class_in_an_image_do_not_count() -> None:
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (MOST + 1, 1))
    boxes[-1] += 20  # the only right one, with the least score
    scores = np.linspace(0.9, 0.1, MOST + 1).astype(np.float32)
    truth = Truth(boxes[-1:], np.zeros(1, np.int64), np.zeros(1, bool), np.full(1, 100, np.float32))
    ours = AveragePrecision(1, masks=False, matches=True)
    ours.add(Detections(boxes, np.zeros(MOST + 1, np.int64), scores), truth)
    assert ours.metrics()["box_ap"] == 0
    assert len(ours.arrays()["detection_score"]) == MOST


def test_without_any_object_there_is_no_average_precision() -> None:
    ours = AveragePrecision(2, masks=False, matches=True)
    ours.add(empty_detections(), empty_truth())
    assert all(np.isnan(value) for value in ours.metrics().values())
    assert ours.arrays()["detection_match"].shape == (0, 10)
    assert ours.arrays()["truth_count"].tolist() == [[0, 0]]


def test_an_object_is_taken_once_and_a_crowd_by_many() -> None:
    overlaps = np.array([[0.7, 0.9], [0.8, 0.9], [0.3, 0.9]])
    crowd = np.array([False, True])
    assert match_greedily(overlaps, crowd)[:, 0].tolist() == [1, -1, -1]
    assert match_greedily(overlaps, ~crowd & False)[:, 0].tolist() == [1, 1, 0]


def empty_detections() -> Detections:
    nothing = np.zeros((0, 4), np.float32)
    return Detections(
        nothing, np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, SIDE, SIDE), bool)
    )


def empty_truth() -> Truth:
    nothing = np.zeros((0, 4), np.float32)
    return Truth(
        nothing,
        np.zeros(0, np.int64),
        np.zeros(0, bool),
        np.zeros(0, np.float32),
        np.zeros((0, SIDE, SIDE), bool),
    )


def test_of_objects_that_overlap_equally_the_last_is_taken() -> None:
    truth = Truth(
        np.array([[0, 0, 10, 10], [2, 0, 12, 10]], np.float32),
        np.zeros(2, np.int64),
        np.zeros(2, bool),
        np.full(2, 100, np.float32),
    )
    found = Detections(  # the first lies midway between both, the second on the last
        np.array([[1, 0, 11, 10], [2, 0, 12, 10]], np.float32),
        np.zeros(2, np.int64),
        np.array([0.9, 0.8], np.float32),
    )
    ours = AveragePrecision(1, masks=False, matches=True)
    ours.add(found, truth)
    assert ours.arrays()["detection_match"][1].tolist() == [1] * 4 + [0] * 3 + [1] * 3
    assert ap_of(ours.arrays()).mean() == pytest.approx(ours.metrics()["box_ap"], abs=1e-6)
