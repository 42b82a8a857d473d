"""Average precision under weights is COCO's, of the images that the weights stand for."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from pipeline.evaluate.detection_metrics import AveragePrecision, Detections, Truth
from pipeline.evaluate.protocols import METRICS_OF
from pipeline.report import weighted_detection
from pipeline.report.predictions import Detected, prediction_of
from pipeline.report.statistics import resample_weights
from pipeline.report.weighted_detection import THRESHOLDS, DetectionResamples

IMAGES, CLASSES = 14, 3
NAMES = METRICS_OF["detection"][:3]
THEIRS = dict(zip(NAMES, ("map", "map_50", "map_75")))
IOUS = np.linspace(0.5, 0.95, THRESHOLDS)
Image = dict[str, np.ndarray]


def draw(seed: int) -> tuple[list[Image], list[Image]]:
    """What was found in each image and what is there: class 2 in two images only, and crowds.

    Scores are equal in several images and differ within one, where equal ones have no order of their own.
    """
    rng = np.random.default_rng(seed)
    found: list[Image] = []
    truth: list[Image] = []
    for image in range(IMAGES):
        number = int(rng.integers(1, 5)) if image else 0
        boxes = rng.uniform(0, 60, (number, 4))
        boxes[:, 2:] = boxes[:, :2] + rng.uniform(12, 40, (number, 2))
        labels = rng.integers(0, 2, number)
        if image in (3, 9):
            labels[0] = 2
        crowd = np.zeros(number, np.int64)
        crowd[:1] = image in (4, 5, 6)
        truth.append({"boxes": boxes, "labels": labels, "iscrowd": crowd})
        again = rng.choice(number, 3 * number) if number else np.empty(0, int)
        near = boxes[again] + rng.normal(0, 3, (len(again), 4))
        far = rng.uniform(0, 40, (3, 4))
        far[:, 2:] += 50
        where = np.concatenate([near, far])
        said = np.concatenate([labels[again], rng.integers(0, CLASSES, 3)])
        scores = rng.permutation(40)[: len(where)] / 40
        found.append({"boxes": where, "labels": said, "scores": scores})
    return found, truth


def overlap(box: np.ndarray, other: np.ndarray, crowd: bool) -> float:
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    both = float(np.prod(np.maximum(sides, 0)))
    areas = [float(np.prod(each[2:] - each[:2])) for each in (box, other)]
    return both / (areas[0] if crowd else sum(areas) - both)


def match(found: Image, truth: Image) -> np.ndarray:
    """COCO's rule, as slowly as it is said: the best free object of the class, by falling score."""
    matches = np.zeros((len(found["boxes"]), THRESHOLDS), np.int8)
    for column, threshold in enumerate(IOUS):
        taken: set[int] = set()
        for row in np.argsort(-found["scores"], kind="stable"):
            overlaps = {
                at: overlap(found["boxes"][row], box, bool(truth["iscrowd"][at]))
                for at, box in enumerate(truth["boxes"])
                if truth["labels"][at] == found["labels"][row]
            }
            fitting = [at for at, value in overlaps.items() if value >= threshold]
            free = [at for at in fitting if at not in taken and not truth["iscrowd"][at]]
            if free:
                taken.add(max(free, key=lambda at: overlaps[at]))
                matches[row, column] = 1
            elif any(truth["iscrowd"][at] for at in fitting):
                matches[row, column] = -1
    return matches


def prediction(found: list[Image], truth: list[Image], *, masks: list[Image] | None = None) -> Detected:
    counts = [np.bincount(each["labels"][each["iscrowd"] == 0], minlength=CLASSES) for each in truth]
    arrays: dict[str, Any] = {"truth_count": np.array(counts, np.int32), "rows": np.arange(IMAGES)}
    for prefix, several in (("", found), ("mask_", masks)):
        if several is not None:
            of_image = [np.full(len(each["boxes"]), at, np.int32) for at, each in enumerate(several)]
            arrays[f"{prefix}detection_image"] = np.concatenate(of_image)
            arrays[f"{prefix}detection_class"] = np.concatenate([each["labels"] for each in several])
            scores = np.concatenate([each["scores"] for each in several])
            arrays[f"{prefix}detection_score"] = scores.astype(np.float32)
            matches = [match(each, there) for each, there in zip(several, truth)]
            arrays[f"{prefix}detection_match"] = np.concatenate(matches)
    made = prediction_of(arrays)
    assert isinstance(made, Detected)
    return made


def coco(found: list[Image], truth: list[Image]) -> dict[str, float]:
    """torchmetrics' values, at recalls that are not rounded to float32: 3 of 10 objects are .3."""
    metric = MeanAveragePrecision(
        backend="faster_coco_eval",
        iou_thresholds=IOUS.tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
    )
    metric.update([_tensors(each) for each in found], [_tensors(each) for each in truth])
    values = metric.compute()
    return {name: float(values[theirs]) for name, theirs in THEIRS.items()}


def _tensors(image: Image) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(value.astype(np.int64 if value.dtype.kind == "i" else np.float32))
        for name, value in image.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_a_resamples_average_precision_is_cocos_of_its_images(seed: int) -> None:
    found, truth = draw(seed)
    weights = resample_weights(None, count=IMAGES, draws=8, seed=seed)
    weights[0] = 1
    made = prediction(found, truth)
    assert set(made.boxes.match.ravel()) == {-1, 0, 1} and len(set(made.boxes.score)) < len(made.boxes.score)
    values = DetectionResamples(made, weights).metrics(NAMES, [made])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row, weight in enumerate(weights):
            drawn = np.repeat(np.arange(IMAGES), weight.astype(int))
            wanted = coco([found[at] for at in drawn], [truth[at] for at in drawn])
            assert {name: values[name][0, row] for name in NAMES} == pytest.approx(wanted, abs=1e-6)


def test_weights_of_one_give_what_the_protocols_report() -> None:
    judge = AveragePrecision(CLASSES, masks=False, matches=True)
    for found, truth in zip(*draw(2)):
        area = np.prod(truth["boxes"][:, 2:] - truth["boxes"][:, :2], axis=1)
        theirs = [truth["boxes"].astype(np.float32), truth["labels"], truth["iscrowd"].astype(bool), area]
        scores = found["scores"].astype(np.float32)
        judge.add(Detections(found["boxes"].astype(np.float32), found["labels"], scores), Truth(*theirs))
    made = prediction_of(judge.arrays() | {"rows": np.arange(IMAGES)})
    assert isinstance(made, Detected)
    values = DetectionResamples(made, np.ones((1, IMAGES))).metrics(NAMES, [made])
    assert {name: values[name][0, 0] for name in NAMES} == pytest.approx(judge.metrics(), abs=1e-6)


def test_classes_without_objects_are_left_out_and_without_any_there_is_no_value() -> None:
    found, truth = draw(0)
    made = prediction(found, truth)
    empty = made.truth.sum(axis=1) == 0
    assert empty.any()
    weights = np.stack([empty, ~empty]).astype(np.float32)
    values = DetectionResamples(made, weights).metrics(NAMES, [made])
    assert np.isnan(values["box_ap"][0, 0]) and 0 < values["box_ap"][0, 1] < 1


def test_masks_have_matches_of_their_own() -> None:
    found, truth = draw(0)
    perfect = [
        {"boxes": each["boxes"], "labels": each["labels"], "scores": np.ones(len(each["labels"]))}
        for each in truth
    ]
    assert prediction(found, truth).metrics == NAMES
    made = prediction(found, truth, masks=perfect)
    assert made.metrics == METRICS_OF["detection"]
    values = DetectionResamples(made, np.ones((1, IMAGES))).metrics(made.metrics, [made])
    assert values["mask_ap"][0, 0] == pytest.approx(1) and values["box_ap"][0, 0] < 0.9


def test_draws_taken_in_parts_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    made, weights = prediction(*draw(1)), resample_weights(None, count=IMAGES, draws=50, seed=0)
    once = DetectionResamples(made, weights).metrics(NAMES, [made])
    monkeypatch.setattr(weighted_detection, "CELLS", 300)
    parts = DetectionResamples(made, weights).metrics(NAMES, [made])
    for name in NAMES:
        np.testing.assert_array_equal(once[name], parts[name])
