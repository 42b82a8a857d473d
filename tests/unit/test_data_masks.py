"""Masks go where their images go: through resizing, caching and augmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import augment as augmentation
from pipeline.data.augment import Augment
from pipeline.data.draws import sample_keys
from pipeline.data.images import ImageSet
from pipeline.data.recipes import RECIPES, Recipe
from pipeline.data.squares import extent, square, square_mask
from shards import IGNORE

torch.set_num_threads(1)


def shapes(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth blobs, white on black: (B, 3, S, S) uint8 whose threshold is the mask."""
    noise = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic")
    return ((large > 0.5) * 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


class Stub:
    """What an image set asks of an index."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self.images = images

    def decode(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])

    def mask(self, row: int) -> np.ndarray:
        return (self.images[row][..., 0] > 127).astype(np.uint8)


@pytest.mark.parametrize("size", [24, 48, 96])
@pytest.mark.parametrize("recipe", ["none", "light", "cass", "dino_local"])
def test_augmentation_moves_image_and_mask_together(recipe, size):
    images = shapes(24, 48)
    keys = sample_keys(torch.arange(24), seed=3)
    kept = RECIPES[recipe]
    geometry_only = Recipe(
        scale=kept.scale,
        ratio=kept.ratio,
        hflip=kept.hflip,
        vflip=kept.vflip,
        blocks=tuple(
            augmentation.Block(b.p, (0, 0, 0, 0), b.perspective, b.perspective_p, b.rotation)
            for b in kept.blocks
        ),
    )
    views, moved = Augment(geometry_only, size).pair(images, (images[:, 0] > 127).to(torch.uint8), keys)
    assert moved.shape == (24, size, size) and moved.dtype == torch.uint8
    bright, sure = views[:, 0] > 0.5, (views[:, 0] < 0.01) | (views[:, 0] > 0.99)
    inside = moved != IGNORE
    assert sure.float().mean() > 0.5, "else there is nothing to compare"
    assert torch.equal(bright[sure & inside], moved[sure & inside] == 1)
    assert (bright[inside] == (moved[inside] == 1)).float().mean() > 0.94, "all but a border"
    assert not (bright & ~inside & sure).any(), "outside the image there is black, and IGNORE"


def test_a_warp_leaves_ignore_and_a_crop_does_not():
    masks = torch.ones(40, 32, 32, dtype=torch.uint8)
    images, keys = torch.full((40, 3, 32, 32), 255, dtype=torch.uint8), sample_keys(torch.arange(40), seed=0)
    turned = Augment("cass", 32).pair(images, masks, keys)[1]
    assert set(turned.unique().tolist()) == {1, IGNORE}
    assert Augment("light", 32).pair(images, masks, keys)[1].unique().tolist() == [1]


def test_ignore_and_class_numbers_are_never_mixed():
    masks = torch.randint(0, 4, (16, 40, 40), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    masks[masks == 3] = IGNORE
    images, keys = torch.zeros(16, 3, 40, 40, dtype=torch.uint8), sample_keys(torch.arange(16), seed=0)
    for recipe in ("none", "light", "cass"):
        for size in (17, 40, 63):
            moved = Augment(recipe, size).pair(images, masks, keys)[1]
            assert set(moved.unique().tolist()) == {0, 1, 2, IGNORE}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_mask_beside_it_does_not_change_an_image(recipe):
    images, keys = shapes(6, 40), sample_keys(torch.arange(6), seed=5)
    augment = Augment(recipe, 32)
    views, moved = augment.pair(images, images[:, 0], keys)
    assert torch.equal(views, augment(images, keys))
    alone = torch.cat([augment.pair(images[[i]], images[[i], 0], keys[[i]])[1] for i in range(6)])
    assert torch.equal(moved, alone), "nor does the batch that it is in"


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(31, 57), (64, 40), (48, 48)])
def test_a_mask_is_made_square_as_its_image_is(shape, fit):
    white = np.zeros((*shape, 3), np.uint8)
    white[shape[0] // 4 : shape[0] // 2, shape[1] // 3 :] = 255
    pixels = square(Image.fromarray(white), 32, fit)[0]
    mask = square_mask((white[..., 0] > 127).astype(np.uint8), 32, fit)
    inside = mask != IGNORE
    assert inside.all() if fit != "pad" or shape[0] == shape[1] else not inside.all()
    assert (pixels[~inside] == 0).all()
    assert ((pixels > 127) == (mask == 1))[inside].mean() > 0.95
    sure = inside & ((pixels < 3) | (pixels > 252))
    assert ((pixels > 127) == (mask == 1))[sure].all()


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(31, 57), (64, 40), (48, 48), (7, 90)])
def test_extent_says_where_the_image_lies_in_its_square(shape, fit):
    """A ramp that is its own coordinate: the square shows at each place what extent says lies there."""
    height, width = shape
    size = 200
    left, top, right, bottom = extent(width, height, size, fit)
    places = (np.arange(size) + 0.5) / size
    for axis, (low, high), length in ((1, (left, right), width), (0, (top, bottom), height)):
        ramp = np.arange(length, dtype=np.uint8)
        image = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, shape)
        shown = square_mask(np.ascontiguousarray(image), size, fit)
        line = shown[:, size // 2] if axis == 0 else shown[size // 2]
        seen = (places - low) / (high - low) * length
        within = (seen > 0) & (seen < length)
        assert ((line != IGNORE) == within).all()
        assert np.abs(line[within] + 0.5 - seen[within]).max() <= 0.5 + 1e-9, "the pixel that lies there"


def test_masks_are_cached_beside_their_images_and_keep_their_order():
    rng = np.random.default_rng(0)
    index = Stub([rng.integers(0, 256, (20, 24, 3)).astype(np.uint8) for _ in range(9)])
    order = [3, 0, 8]
    for cache in ("ram", "none"):
        images = ImageSet(index, np.arange(9), image_size=16, masks=True, cache=cache)
        batch = images.batch(order)
        assert batch.shape == (3, 4, 16, 16)
        for found, row in zip(batch.numpy(), order):
            assert np.array_equal(found[:3], square(index.decode(row), 16, "squash"))
            assert np.array_equal(found[3], square_mask(index.mask(row), 16, "squash"))
