"""Boxes and masks lie where their objects are, in the square, in every view, and back in the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.augment import Augment
from pipeline.data.boxes import Placement, clip, masks_through, through
from pipeline.data.draws import sample_keys
from pipeline.data.recipes import RECIPES, Block, Recipe
from pipeline.data.squares import square

SIZE = 96
SHAPES = [(96, 96), (200, 120), (90, 150), (301, 77)]
FITS = ["squash", "crop", "pad"]


def painted(width: int, height: int, box: np.ndarray) -> Image.Image:
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box.astype(int)
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def bright(image: np.ndarray) -> np.ndarray:
    """The box around what is bright in (3, H, W) of 0 to 1, to a fraction of a pixel."""
    down, across = image[0].max(axis=1), image[0].max(axis=0)
    found = []
    for profile in (across, down):
        profile = profile / profile.max()
        first, last = np.flatnonzero(profile > 0.5)[[0, -1]]
        before = profile[first - 1] if first else 0
        after = profile[last + 1] if last + 1 < len(profile) else 0
        left = first - (profile[first] - 0.5) / max(profile[first] - before, 1e-6) + 0.5 if first else 0.0
        right = last + (profile[last] - 0.5) / max(profile[last] - after, 1e-6) + 0.5
        found.append((left, right if last + 1 < len(profile) else float(len(profile))))
    return np.array([found[0][0], found[1][0], found[0][1], found[1][1]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FITS)
def test_a_box_lies_on_its_object_in_the_square(fit: str, shape: tuple[int, int]) -> None:
    width, height = shape
    box = np.array([width * 0.4, height * 0.35, width * 0.55, height * 0.6]).round()
    seen = square(painted(width, height, box), SIZE, fit) / 255  # type: ignore[arg-type]
    placement = Placement.of(width, height, SIZE, fit)  # type: ignore[arg-type]
    found = placement.into(box[None])
    np.testing.assert_allclose(bright(seen), found[0], atol=0.6)
    np.testing.assert_allclose(placement.back(found), box[None], atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", FITS)
def test_a_mask_lies_on_its_object_in_the_square(fit: str, shape: tuple[int, int]) -> None:
    width, height = shape
    box = np.array([width * 0.1, height * 0.3, width * 0.5, height * 0.7]).round()
    seen = square(painted(width, height, box), SIZE, fit) / 255 > 0.5  # type: ignore[arg-type]
    placement = Placement.of(width, height, SIZE, fit)  # type: ignore[arg-type]
    rows, columns = placement.mask_size(width, height)
    y, x = (np.arange(rows) + 0.5) * height / rows, (np.arange(columns) + 0.5) * width / columns
    drawn = (y[:, None] > box[1]) & (y[:, None] < box[3]) & (x > box[0]) & (x < box[2])
    mask = placement.into_square(drawn[None], SIZE)[0]
    assert mask.shape == (SIZE, SIZE)
    assert (mask ^ seen[0]).sum() <= 0.08 * seen[0].sum() + 4


FLIPS = Recipe(scale=(0.4, 1), hflip=0.5, vflip=0.5)


@pytest.mark.parametrize("recipe", [FLIPS, RECIPES["light"], RECIPES["none"]])
def test_boxes_and_masks_go_with_the_image_through_augmentation(recipe: Recipe) -> None:
    count, size = 24, 80
    rng = np.random.default_rng(0)
    start = rng.uniform(20, 50, (count, 2)).round()
    boxes = np.concatenate([start, start + rng.uniform(12, 26, (count, 2)).round()], axis=1)
    images = torch.from_numpy(
        np.stack([np.asarray(painted(SIZE, SIZE, box)).transpose(2, 0, 1) for box in boxes])
    )
    views, maps = Augment(recipe, size).with_maps(images, sample_keys(torch.arange(count), seed=1))
    moved = []
    for image, view, box, shown in zip(images, views, boxes, maps):
        found, kept = clip(through(box[None], shown, source=SIZE, size=size), size)
        if not kept[0]:
            continue
        moved.append(found[0])
        np.testing.assert_allclose(bright(view.numpy()), found[0], atol=0.7)
        mask = masks_through(image[:1].numpy() > 0, shown, size=size)[0]
        assert (mask ^ (view[0].numpy() > 0.5)).mean() < 0.02
    assert len(moved) > count / 2
    if recipe is not RECIPES["none"]:
        assert np.std(np.array(moved) * SIZE / size - boxes[: len(moved)], axis=0).min() > 1, "nothing moved"


def test_a_box_that_is_turned_still_holds_its_object() -> None:
    recipe = Recipe(blocks=(Block(p=1, rotation=30, perspective=0.2),))
    box = np.array([30.0, 40, 60, 52])
    image = np.array(painted(SIZE, SIZE, box)).transpose(2, 0, 1)
    images = torch.from_numpy(image).repeat(8, 1, 1, 1)
    views, maps = Augment(recipe, SIZE).with_maps(images, sample_keys(torch.arange(8), seed=0))
    for view, shown in zip(views, maps):
        found = through(box[None], shown, source=SIZE, size=SIZE)[0]
        seen = bright(view.numpy())
        assert (found[:2] <= seen[:2] + 1).all() and (found[2:] >= seen[2:] - 1).all()
        assert ((found[2:] - found[:2]) <= 1.5 * (seen[2:] - seen[:2]) + 2).all()


def test_what_a_view_cuts_is_clipped_and_what_it_hardly_shows_is_left_out() -> None:
    boxes = np.array(
        [
            [10, 10, 30, 30],  # inside
            [-10, 10, 30, 30],  # three quarters of it
            [-31, 10, 9, 30],  # less than a quarter
            [50, 50, 70, 70],  # outside
            [39.5, 0, 40.5, 40],  # half a pixel of a side
        ],
        float,
    )
    clipped, kept = clip(boxes, 40)
    assert kept.tolist() == [True, True, False, False, False]
    assert clipped[1].tolist() == [0, 10, 30, 30]
