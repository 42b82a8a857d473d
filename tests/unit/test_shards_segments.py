"""Outlines become masks by one rule: a pixel is in if its centre is; run lengths are COCO's."""

from __future__ import annotations

import numpy as np
import pytest

from shards import InputError
from shards.segments import Polygons, Runs, drawn, polygon_area, run_lengths, runs_text, scaled, to_runs


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width)) < 0.5


def by_centres(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The even-odd rule at each pixel's centre, edge by edge."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    inside = np.zeros((height, width), bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0)):
        if y0 != y1:
            crosses = (y >= min(y0, y1)) & (y < max(y0, y1))
            inside ^= crosses & (x >= x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


@pytest.mark.parametrize("seed", range(20))
def test_polygon_is_filled_where_its_centres_are_inside(seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-8, 40, (int(rng.integers(3, 12)), 2))  # also crossing itself, and beyond the image
    mask = drawn(Polygons((points,)), (33, 21), 21, 33)
    assert np.array_equal(mask, by_centres(points, 21, 33))


def test_polygon_of_whole_pixels_has_its_area_and_parts_are_united():
    square = np.array([[2, 1], [7, 1], [7, 5], [2, 5]], float)
    mask = drawn(Polygons((square,)), (10, 10), 10, 10)
    assert mask.sum() == 20 == polygon_area(square) and mask[1:5, 2:7].all()
    both = drawn(Polygons((square, square + 1)), (10, 10), 10, 10)
    assert both.sum() == 20 + 20 - 12


def test_polygon_is_scaled_with_its_image():
    square = np.array([[2, 2], [8, 2], [8, 6], [2, 6]], float)
    small = drawn(Polygons((square,)), (20, 10), 5, 10)
    assert np.array_equal(small, drawn(scaled(Polygons((square,)), (20, 10), (10, 5)), (10, 5), 5, 10))
    assert small.sum() == 6 and small[1:3, 1:4].all()


def test_many_crossings_are_filled_in_blocks(monkeypatch):
    points = np.random.default_rng(0).uniform(0, 60, (40, 2))
    expected = by_centres(points, 60, 60)
    monkeypatch.setattr("shards.segments.CROSSINGS", 7)
    assert np.array_equal(drawn(Polygons((points,)), (60, 60), 60, 60), expected)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 3), (64, 200)])
def test_run_lengths_there_and_back(shape):
    for mask in (noise(*shape), np.zeros(shape, bool), np.ones(shape, bool)):
        runs = to_runs(mask)
        assert np.array_equal(drawn(runs, (shape[1], shape[0]), *shape), mask)
        assert runs_text(run_lengths(runs)) == runs.counts


def test_run_lengths_are_cocos():
    coco = pytest.importorskip("faster_coco_eval.core.mask")
    for seed, shape in enumerate([(7, 5), (300, 200), (1, 900)]):
        mask = noise(*shape, seed) if seed != 1 else np.kron(noise(3, 2), np.ones((100, 100))).astype(bool)
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
        assert to_runs(mask).counts == (theirs.decode() if isinstance(theirs, bytes) else theirs)
    # The text of a mask of 4 rows and 3 columns whose middle column is set.
    assert to_runs(np.eye(3, dtype=bool)[1] & np.ones((4, 1), bool)) == Runs(4, 3, "444")


def test_run_lengths_in_another_size_take_the_nearest_pixel():
    from PIL import Image

    mask = noise(13, 17)
    nearest = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((8, 21), Image.Resampling.NEAREST))
    assert np.array_equal(drawn(to_runs(mask), (17, 13), 21, 8), nearest.astype(bool))
    assert np.array_equal(
        drawn(scaled(to_runs(mask), (17, 13), (8, 21)), (8, 21), 21, 8), nearest.astype(bool)
    )


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (Runs(4, 3, ""), "not in COCO's form"),
        (Runs(4, 3, "44"), "do not add up"),
        (Runs(4, 3, "4444"), "do not add up"),
        (Runs(4, 3, "44\x10"), "not in COCO's form"),
        (Runs(4, 3, "44é"), "not in COCO's form"),
        (Runs(4, 3, "44o"), "not in COCO's form"),
        (Runs(4, 3, "o" * 20 + "0"), "number too large"),
        (Runs(4, 3, "OO"), "do not add up"),
        (Runs(4, 3, "0" * 1000), "more run lengths than 3 x 4 pixels can have"),
        (Runs(10**9, 10**9, "0"), "run lengths of 1000000000 x 1000000000"),
        (Runs(-4, -3, "444"), "run lengths of -3 x -4"),
    ],
)
def test_broken_run_lengths_are_refused(runs, message):
    with pytest.raises(InputError, match=message):
        run_lengths(runs)


def test_run_lengths_of_another_size_than_the_image_are_refused():
    with pytest.raises(InputError, match="run lengths of 3 x 4 pixels on an image of 4 x 3"):
        drawn(Runs(4, 3, "444"), (4, 3), 3, 4)
