"""Detection on small sets of rectangles: it learns, repeats itself, and knows where objects lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detection_cases import RectangleIndex, Rectangles, problem_of, rectangles

from pipeline.data.augment import Augment
from pipeline.data.draws import sample_keys
from pipeline.errors import UserError
from pipeline.evaluate import detection, images
from pipeline.evaluate.detection_metrics import AveragePrecision
from pipeline.evaluate.objects import Objects
from pipeline.evaluate.problem import Prediction, Problem
from pipeline.specs import Architecture

torch.set_num_threads(1)
TINY = [range(0, 4), range(4, 6), range(6, 9)]


@pytest.fixture(autouse=True)
def forget() -> None:
    images._recent.clear()


def index_of(count: int, *, most: int = 3, shapes: tuple = ((64, 48), (56, 64))) -> RectangleIndex:
    """Images of unequal shape with up to ``most`` objects, at least one of them without any."""
    rng = np.random.default_rng(0)
    numbers = [i % (most + 1) for i in range(count)]
    return RectangleIndex([rectangles(rng, shapes[i % len(shapes)], n) for i, n in enumerate(numbers)])


def same(first: Prediction, second: Prediction) -> bool:
    """To the bit."""
    assert first.arrays.keys() == second.arrays.keys()
    equal = all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)
    return equal and first.log == second.log and len(first.arrays["detection_score"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_it_learns_to_find_rectangles(tmp_path: Path, arch: Architecture) -> None:
    problem = problem_of(
        index_of(50), tmp_path, arch, [range(32), range(32, 38), range(38, 50)], epochs=8, size=48, lr=3e-3
    )
    found = detection.run(problem)
    assert found.test["box_ap50"] > 0.25, "chance is below 0.01"
    assert found.best_epoch > 1 and found.images_seen == 8 * 32
    assert found.val["box_ap"] == max(line["val"]["box_ap"] for line in found.log)
    assert set(found.test) == {"box_ap", "box_ap50", "box_ap75"}


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_same_seed_gives_same_bits_with_masks(tmp_path: Path, arch: Architecture) -> None:
    problem = problem_of(index_of(9), tmp_path, arch, TINY, epochs=1, size=32)
    first, again = detection.run_masks(problem), detection.run_masks(problem)
    assert same(first, again)
    assert not same(first, detection.run_masks(replace(problem, seed=4)))
    assert {"box_ap", "mask_ap", "mask_ap50", "mask_ap75"} <= set(first.test)
    assert first.arrays["mask_detection_match"].shape == first.arrays["detection_match"].shape
    assert first.arrays["truth_count"].sum(axis=1).tolist() == [2, 3, 0]
    assert first.arrays["detection_image"].max() <= 2 and first.arrays["detection_class"].max() <= 1


def test_crowds_are_not_for_training(tmp_path: Path) -> None:
    index = index_of(9)
    crowd = Rectangles(np.array([[3, 3, 30, 30]], np.float32), np.array([1]), np.ones(1, bool), (64, 48))
    index.found[1] = crowd
    problem = problem_of(index, tmp_path, "cnn", TINY, epochs=1, size=32)
    objects = Objects(problem, problem.train, image_size=32, masks=True)
    target = objects.targets(np.array([1]), np.eye(3)[None], torch.device("cpu"))[0]
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"]) == 0
    assert objects.truth(1).crowd.tolist() == [True]

    def with_crowd(box: list[int], label: int) -> Prediction:
        index.found[1] = replace(crowd, boxes=np.array([box], np.float32), labels=np.array([label]))
        moved = Problem(**vars(problem))
        index.decode = lambda row, plain=RectangleIndex.decode: plain(index, 0)  # the pixels stay
        images._recent.clear()
        return detection.run(moved)

    assert same(with_crowd([3, 3, 30, 30], 1), with_crowd([20, 10, 40, 44], 0))


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
def test_what_is_found_comes_back_to_where_the_object_is(tmp_path: Path, fit: str) -> None:
    index = index_of(9, shapes=((190, 61), (50, 123)))
    problem = problem_of(index, tmp_path, "cnn", TINY, size=64, fit=fit)
    objects = Objects(problem, problem.test, image_size=64, masks=True)
    places = np.arange(len(problem.test))
    score = AveragePrecision(2, masks=True)
    for place, target in enumerate(objects.targets(places, np.tile(np.eye(3), (3, 1, 1)), problem.device)):
        count = len(target["boxes"])
        perfect = {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": torch.linspace(0.9, 0.5, count),
            "masks": torch.ones(count, 1, 28, 28),
        }
        score.add(objects.detected(place, perfect), objects.truth(place))
        if fit == "crop":
            assert count <= len(objects.truth(place).boxes)
    metrics = score.metrics()
    if fit == "crop":  # what was cut off cannot be found
        assert 0.1 < metrics["box_ap50"] < 1
    else:
        assert metrics["box_ap"] == pytest.approx(1) and metrics["mask_ap"] == pytest.approx(1)


def test_a_mask_is_painted_where_its_box_lies(tmp_path: Path) -> None:
    index = index_of(9, shapes=((64, 64),))
    problem = problem_of(index, tmp_path, "cnn", TINY, size=32)
    objects = Objects(problem, problem.test, image_size=32, masks=True)
    chances = torch.zeros(2, 1, 28, 28)
    chances[0, 0, :, :14] = 1  # the left half
    chances[1, 0] = 1
    found = {
        "boxes": torch.tensor([[4.0, 6, 20, 16], [30.1, 30.1, 30.2, 30.2]]),
        "labels": torch.tensor([1, 1]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": chances,
    }
    masks = objects.detected(0, found).masks
    assert masks is not None
    expected = np.zeros((64, 64), bool)
    expected[12:32, 8:24] = True
    np.testing.assert_array_equal(masks[0], expected)
    assert not masks[1].any()


def test_targets_lie_on_the_bright_rectangles_of_augmented_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "border", lambda mean: (0, 0, 0))  # as dark as what is no rectangle
    index = index_of(40, shapes=((97, 61), (50, 83)))
    problem = problem_of(index, tmp_path, "cnn", [range(40), TINY[1], TINY[2]], size=64, fit="pad")
    objects = Objects(problem, problem.train, image_size=64, masks=True)
    batch, where = images.images_of(problem, problem.train, image_size=64)
    places = np.arange(40)
    views, maps = Augment("light", 64).with_maps(
        batch.batch(where), sample_keys(torch.from_numpy(places), seed=0)
    )
    shares, masked = [], []
    for view, target in zip(views, objects.targets(places, maps, problem.device)):
        bright = view.amax(dim=0) > 0.4
        for (left, top, right, bottom), mask in zip(target["boxes"].round().int().tolist(), target["masks"]):
            shares.append(float(bright[top:bottom, left:right].float().mean()))
            masked.append(float(bright[mask > 0].float().mean()))
        boxes = target["boxes"].round().int().tolist()
        covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        assert covered >= 0.8 * float(bright.sum())
    assert len(shares) > 40 and min(shares) > 0.8 and min(masked) > 0.85


def test_masks_need_outlines(tmp_path: Path) -> None:
    index = index_of(9)
    index.found[1] = replace(index.found[1], outlined=False)
    problem = problem_of(index, tmp_path, "cnn", TINY, epochs=1, size=32)
    with pytest.raises(UserError, match="outline of every object, but image1 has objects without") as caught:
        detection.run_masks(problem)
    assert "\n" not in str(caught.value)


def test_a_metric_of_masks_means_that_of_boxes_where_there_are_none(tmp_path: Path) -> None:
    problem = problem_of(index_of(9), tmp_path, "cnn", TINY, epochs=1, size=32, select_by="mask_ap50")
    assert detection.run(problem).val.keys() == {"box_ap", "box_ap50", "box_ap75"}


def test_validation_without_objects_is_one_line(tmp_path: Path) -> None:
    problem = problem_of(
        index_of(9), tmp_path, "cnn", [TINY[0], [4, 8], TINY[2]], epochs=1, size=32, validation="full"
    )
    said = (
        "select_by: box_ap does not exist on the 2 validation images, which lack objects that are no crowds;"
    )
    with pytest.raises(UserError) as refused:
        detection.run(problem)
    assert str(refused.value) == f"{said} the validation split needs some"
    share = problem_of(
        index_of(9), tmp_path, "cnn", [TINY[0], [4, 8], TINY[2]], epochs=1, size=32, validation="fraction"
    )
    with pytest.raises(UserError) as refused:
        detection.run(share)
    assert str(refused.value) == f"{said} choose validation: full"


def test_the_test_split_is_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(index_of(9), tmp_path, "cnn", TINY, epochs=3, max_steps=3, size=32)
    judged, asked = detection.judged, []
    monkeypatch.setattr(
        detection,
        "judged",
        lambda problem, detector, split, *rest, **more: (
            asked.append(split.rows.tolist()) or judged(problem, detector, split, *rest, **more)
        ),
    )
    detection.run(problem)
    assert asked == [[4, 5]] * 3 + [[6, 7, 8]]
