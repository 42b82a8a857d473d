"""Augmentation: right pixels, right distributions, and every draw a function of the key alone."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from pipeline.data import colour, geometry
from pipeline.data.augment import Augment
from pipeline.data.draws import Draws, sample_keys
from pipeline.data.recipes import RECIPES
from pipeline.data.rows import sum_rows
from pipeline.errors import UserError

torch.set_num_threads(1)


def smooth_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)
    return (large * 255).round().to(torch.uint8)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("size", [16, 40, 49])
def test_result_does_not_depend_on_the_batch_an_image_is_in(recipe, size, monkeypatch):
    images = smooth_images(13, 40)
    keys = sample_keys(torch.arange(13), seed=5, view=1)
    augment = Augment(recipe, size)
    together = augment(images, keys)
    assert together.shape == (13, 3, size, size)
    assert together.min() >= 0 and together.max() <= 1
    alone = torch.cat([augment(images[i : i + 1], keys[i : i + 1]) for i in range(13)])
    assert torch.equal(together, alone)
    backwards = augment(images.flip(0), keys.flip(0)).flip(0)
    assert torch.equal(together, backwards)
    monkeypatch.setattr("pipeline.data.augment.CACHED", 5 * 12 * size**2)
    assert torch.equal(together, augment(images, keys)), "five images at a time"


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_result_does_not_depend_on_the_number_of_threads(recipe):
    images, keys = smooth_images(5, 201), sample_keys(torch.arange(5), seed=2)
    augment = Augment(recipe, 121)  # an image is enough for two threads
    alone = augment(images, keys)
    try:
        torch.set_num_threads(2)
        assert torch.equal(alone, augment(images, keys))
    finally:
        torch.set_num_threads(1)


def test_another_epoch_view_or_seed_draws_anew_and_the_same_key_draws_the_same():
    images, counters = smooth_images(4, 32), torch.arange(4)
    augment = Augment("simclr", 32)
    base = augment(images, sample_keys(counters, seed=1, view=0))
    assert torch.equal(base, augment(images, sample_keys(counters, seed=1, view=0)))
    for other in (
        sample_keys(counters + 4, seed=1, view=0),
        sample_keys(counters, seed=1, view=1),
        sample_keys(counters, seed=2, view=0),
    ):
        assert not torch.allclose(base, augment(images, other), atol=0.05)


def test_draws_are_uniform_and_uncorrelated_across_samples_views_and_streams():
    count = 20000
    first = Draws(sample_keys(torch.arange(count), seed=0, view=0))
    second = Draws(sample_keys(torch.arange(count), seed=0, view=1))
    columns = np.stack([first.uniform(), first.uniform(), second.uniform(), second.uniform()])
    for column in columns:
        counts, _ = np.histogram(column, bins=20, range=(0, 1))
        assert ((counts - count / 20) ** 2 / (count / 20)).sum() < 50  # chi-squared, 19 degrees: p < 1e-4
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.03
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.03


def test_a_draw_is_splitmix64_of_the_key_and_the_streams_number():
    def splitmix64(state):
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return state ^ state >> 31

    keys = sample_keys(torch.arange(3), seed=0)
    draws = Draws(keys)
    for stream in range(1, 80):
        bits = [splitmix64((int(key) + stream * 0x9E3779B97F4A7C15) % 2**64) for key in keys]
        expected = [-2.0 + (5.0 - -2.0) * ((one >> 11) * 2.0**-53) for one in bits]
        assert draws.uniform(-2.0, 5.0).tolist() == expected


def test_order_is_a_uniform_permutation():
    order = Draws(sample_keys(torch.arange(24000), seed=3)).order(4)
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts - 1000).max() < 150


@pytest.mark.parametrize(("out", "box"), [(32, (5, 3, 20, 24)), (24, (0, 0, 40, 40)), (13, (2, 1, 38, 36))])
def test_crop_equals_torchvisions_antialiased_crop(out, box):
    top, left, height, width = box
    images = smooth_images(3, 40).float() / 255
    shares = [np.full(3, v / 40) for v in (left, top, width, height)]
    ours = geometry.warp(
        images,
        geometry.crop_map(*shares),
        size=out,
        scale=np.tile([[width / out, height / out]], (3, 1)),
        taps=geometry.taps_for(max(width, height) / out),
        padding="border",
    )
    theirs = tv.resized_crop(images, top, left, height, width, [out, out], antialias=True)
    # A crop sees a pixel beyond its border where torchvision repeats the border's: compare within.
    difference = (ours - theirs)[..., 1:-1, 1:-1].abs()
    assert difference.mean() < 0.008 and difference.max() < 0.03


def test_shrinking_removes_what_the_output_cannot_show():
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 1  # the finest pattern there is
    whole = np.ones((1,))
    maps = geometry.crop_map(whole * 0, whole * 0, whole, whole)
    scale = np.full((1, 2), 64 / 23)
    right = geometry.warp(
        stripes, maps, size=23, scale=scale, taps=geometry.taps_for(64 / 23), padding="border"
    )
    aliased = geometry.warp(stripes, maps, size=23, scale=scale, taps=1, padding="border")
    assert (right - 0.5).abs().mean() < 0.1 < (aliased - 0.5).abs().mean()


def test_rotation_equals_torchvisions():
    images = smooth_images(2, 33).float() / 255
    ours = geometry.warp(
        images,
        geometry.rotation_map(np.full(2, 8.0)),
        size=33,
        scale=np.ones((2, 2)),
        taps=1,
        padding="zeros",
    )
    theirs = tv.affine(
        images,
        8.0,
        [0, 0],
        1.0,
        [0.0, 0.0],
        interpolation=tv.InterpolationMode.BILINEAR,
    )
    assert (ours - theirs)[..., 3:-3, 3:-3].abs().max() < 1e-3


def test_perspective_equals_torchvisions():
    images = smooth_images(1, 32).float() / 255
    start = [[0, 0], [32, 0], [32, 32], [0, 32]]
    end = [[3, 1], [30, 2], [29, 31], [1, 28]]
    theirs = tv.perspective(images, start, end, interpolation=tv.InterpolationMode.BILINEAR)
    maps = geometry.perspective_map(np.array([start]) / 16 - 1, np.array([end]) / 16 - 1)
    ours = geometry.warp(images, maps, size=32, scale=np.ones((1, 2)), taps=1, padding="zeros")
    assert (ours - theirs).abs().max() < 2e-3


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize(("source", "size"), [(40, 40), (40, 57), (57, 20)])
def test_maps_along_the_axes_sample_what_any_map_does(source, size, padding):
    images = torch.rand(6, 3, source, source, generator=torch.Generator().manual_seed(0))
    width, height = np.array([1, 1, 0.4, 0.9, 1, 0.7]), np.array([1, 1, 0.9, 0.3, 0.8, 0.7])
    left, top = (1 - width) * 0.3, (1 - height) * 0.8
    maps = geometry.crop_map(left, top, width, height)
    maps = maps @ geometry.flip_map(np.array([0, 1, 0, 1, 0, 1], bool), np.array([0, 0, 1, 1, 0, 1], bool))
    options = {
        "size": size,
        "scale": np.stack([width, height], axis=1) * source / size,
        "taps": geometry.taps_for(source / size),
        "padding": padding,
    }
    straight = geometry.warp(images, maps, **options)
    maps[:, 0, 1] = 1e-12  # a turn too small to see
    assert (straight - geometry.warp(images, maps, **options)).abs().max() < 2e-5


def test_flips_are_exact():
    images = torch.rand(5, 3, 16, 16)
    horizontal, vertical = np.array([0, 1, 0, 1, 0], bool), np.array([0, 0, 1, 1, 0], bool)
    maps = geometry.flip_map(horizontal, vertical)
    ours = geometry.warp(images, maps, size=16, scale=np.ones((5, 2)), taps=1, padding="border")
    first, second, third, fourth, fifth = images
    theirs = torch.stack([first, second.flip(-1), third.flip(-2), fourth.flip(-1, -2), fifth])
    assert torch.equal(ours, theirs)


def test_what_does_not_happen_leaves_a_view_as_it_was_to_the_bit():
    images, keys = smooth_images(40, 24), sample_keys(torch.arange(40), seed=0)
    views, maps = Augment("cass", 24).with_maps(images, keys)
    assert 15 < (np.abs(maps) == np.eye(3)).all(axis=(1, 2)).sum() < 33, "not turned: 0.85 * 0.7"
    pixels = images.float() / 255
    mirrors = [pixels.flip(axes) for axes in ((), (2,), (3,), (2, 3))]
    same = torch.stack([(views == mirror).all(dim=(1, 2, 3)) for mirror in mirrors]).any(0)
    assert 10 < same.sum() < 30, "neither turned nor coloured: 0.7 * 0.7"


def test_sums_of_rows_are_products_with_matrices():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 7, 5, generator=generator)
    places, weights = torch.randint(0, 7, (3, 4, 6), generator=generator), torch.rand(3, 4, 6)
    matrices = torch.zeros(3, 4, 7).scatter_add_(2, places, weights)
    assert torch.allclose(sum_rows(images, places, weights), matrices[:, None] @ images)
    turned = sum_rows(images.transpose(2, 3).contiguous().transpose(2, 3), places, weights)
    assert torch.equal(turned, sum_rows(images, places, weights)), "however the images lie in memory"


@pytest.mark.parametrize(
    ("ours", "theirs", "strengths"),
    [
        (colour.adjust_brightness, tv.adjust_brightness, [0.2, 1.0, 1.8]),
        (colour.adjust_contrast, tv.adjust_contrast, [0.2, 1.0, 1.8]),
        (colour.adjust_saturation, tv.adjust_saturation, [0.0, 1.0, 1.8]),
        (colour.adjust_hue, tv.adjust_hue, [-0.3, 0.1, 0.5]),
    ],
)
def test_colour_equals_torchvisions(ours, theirs, strengths):
    images = smooth_images(3, 16).float() / 255
    images[0, :, :4] = 0.5  # grey: no hue
    expected = torch.stack([theirs(image, s) for image, s in zip(images, strengths)])
    assert (ours(images, torch.tensor(strengths)) - expected).abs().max() < 1e-5


def test_grey_solarise_and_blur_equal_torchvisions():
    images = smooth_images(2, 24).float() / 255
    assert (colour.grayscale(images) - tv.rgb_to_grayscale(images)).abs().max() < 1e-6
    assert torch.equal(colour.solarise(images.clone()), tv.solarize(images, 0.5))
    expected = torch.stack([tv.gaussian_blur(i, [5, 5], [s, s]) for i, s in zip(images, (0.4, 1.7))])
    blurred = colour.gaussian_blur(images, torch.tensor([0.4, 1.7]), radius=2)
    assert (blurred - expected).abs().max() < 1e-5


def test_every_turn_of_every_hue_equals_torchvisions():
    images = torch.rand(21, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[:, :, 0], images[:, 1, 1], images[:, 2, 2] = 0.3, images[:, 0, 1], images[:, 1, 2]  # ties
    shifts = torch.linspace(-0.5, 0.5, 21)
    expected = torch.stack([tv.adjust_hue(image, float(s)) for image, s in zip(images, shifts)])
    assert (colour.adjust_hue(images, shifts) - expected).abs().max() < 1e-5


def test_a_blur_does_not_depend_on_a_radius_beyond_its_reach():
    images, sigma = torch.rand(2, 3, 40, 40), np.array([0.3, 1.1])
    reach = colour.blur_reach(sigma)
    assert reach == 7
    near, far = (
        colour.gaussian_blur(images.clone(), torch.tensor(sigma), radius=radius) for radius in (reach, 19)
    )
    assert torch.equal(near, far)
    weights = torch.exp(-0.5 * (torch.arange(-19, 20) / 1.1) ** 2)
    point = torch.zeros(1, 3, 40, 40)
    point[..., 20, 20] = 1
    blurred = colour.gaussian_blur(point, torch.tensor(sigma[1:]), radius=19)
    whole = (weights / weights.sum()).outer(weights / weights.sum())
    assert (blurred[0, 0, 1:, 1:] - whole).abs().max() < 1e-7


def test_jitter_follows_each_images_own_order():
    images = smooth_images(2, 16).float() / 255
    strengths = np.array([[1.6, 0.5, 1.4, 0.1]] * 2)
    order = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    ours = colour.colour_jitter(images.clone(), np.array([True, True]), strengths, order)
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for image, own, result in zip(images, order, ours):
        for number in own:
            image = operations[number](image, strengths[0, number])
        assert (result - image).abs().max() < 1e-5


def test_recipes_do_what_they_say_as_often_as_they_say():
    count = 3000
    ramp = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 1, 16).expand(count, 3, 16, 16) * 10
    keys = sample_keys(torch.arange(count), seed=0)
    light = Augment("light", 16)(ramp, keys)
    mirrored = (light[:, 0, 8, 0] > light[:, 0, 8, -1]).float().mean()
    assert abs(mirrored - 0.5) < 0.04
    width = (light[:, 0, 8, 14] - light[:, 0, 8, 1]).abs() / (130 / 255)
    assert width.min() > 0.8 and width.max() < 1.01  # the area's root times the ratio's
    colourful = smooth_images(1, 16).expand(count, -1, -1, -1)
    views = Augment("dino_global_1", 16)(colourful, keys)
    grey = ((views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-6).float().mean()
    assert abs(grey - 0.2) < 0.03
    untouched = (Augment("cass", 16)(colourful, keys) - colourful / 255).abs().amax((1, 2, 3)) < 1e-4
    assert abs(untouched.float().mean() - 0.7**4) < 0.03


def test_an_unknown_recipe_is_one_line_with_a_hint():
    with pytest.raises(UserError, match="'simclrr', did you mean 'simclr'"):
        Augment("simclrr", 32)


STRONG, WEAK = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)


@pytest.mark.parametrize(
    ("name", "scale", "jitter", "grey", "blur", "solarise"),
    [
        ("simclr", (0.08, 1), STRONG, 0.2, 0.5, 0),  # arXiv 2002.05709
        ("byol_1", (0.08, 1), WEAK, 0.2, 1.0, 0),  # 2006.07733, table 6
        ("byol_2", (0.08, 1), WEAK, 0.2, 0.1, 0.2),
        ("dino_global_1", (0.4, 1), WEAK, 0.2, 1.0, 0),  # 2104.14294
        ("dino_global_2", (0.4, 1), WEAK, 0.2, 0.1, 0.2),
        ("dino_local", (0.05, 0.4), WEAK, 0.2, 0.5, 0),
        ("wide_global_1", (0.14, 1), WEAK, 0.2, 1.0, 0),  # 2310.05108
        ("wide_global_2", (0.14, 1), WEAK, 0.2, 0.1, 0.2),
        ("gentle", (0.3, 1), WEAK, 0.1, 0, 0),  # ours; docs/methods/cass.md
        ("gentle_local", (0.1, 0.4), WEAK, 0.1, 0, 0),
    ],
)
def test_recipes_are_what_they_are_said_to_be(name, scale, jitter, grey, blur, solarise):
    recipe = RECIPES[name]
    (block,) = recipe.blocks
    assert (recipe.scale, recipe.hflip, recipe.vflip) == (scale, 0.5, 0)
    assert (block.p, block.jitter, block.perspective, block.rotation) == (0.8, jitter, 0, 0)
    assert (recipe.grayscale, recipe.blur, recipe.solarise) == (grey, blur, solarise)


def test_cass_recipe_is_the_published_one():
    recipe = RECIPES["cass"]  # arXiv 2206.04170 and its code
    first, second = recipe.blocks
    assert (recipe.scale, recipe.hflip, recipe.vflip, recipe.grayscale, recipe.blur) == (None, 0.3, 0.3, 0, 0)
    assert (first.p, first.jitter, first.perspective, first.rotation) == (0.3, (0.2, 0.2, 0.2, 0), 0.2, 0)
    assert (second.p, second.jitter, second.perspective, second.rotation) == (0.3, (0.2, 0.2, 0.2, 0), 0, 10)
