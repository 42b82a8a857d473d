"""Augmentation recipes, applied to whole batches on the device the images are on.

``Augment(recipe, size)(images, keys)`` takes uint8 images and gives float images in [0, 1]. Every draw is a
function of an image's key alone (:mod:`pipeline.data.draws`), so the result is the same, to the bit,
whatever the batch, the rank or the number of ranks. All geometry is composed into one map an image and
sampled once; colour follows on the result, where the published recipes have colour and geometry in another
order (this differs only in what fills the corners that a rotation leaves empty). On a GPU the pixels are
:mod:`pipeline.data.fused`'s, where that works.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.data import colour, geometry
from pipeline.data.draws import Draws
from pipeline.data.fused import Fused
from pipeline.data.recipes import RECIPES, Block, Recipe, find_recipe
from shards import IGNORE

CACHED = 2**21  # bytes of views that a CPU core augments at a time: more a call, and caches hold most of it
_CROP_TRIES = 10  # torchvision's RandomResizedCrop


class Augment:
    """One recipe at one output size.

    Args:
        recipe: a name in :data:`RECIPES`, or a recipe.
        size: of the views, in pixels.

    Raises:
        UserError: no recipe of this name.
    """

    def __init__(self, recipe: str | Recipe, size: int) -> None:
        self.recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
        self.size = size
        self._fused = Fused(self.recipe, size, radius=blur_radius(size))

    def __call__(self, images: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Augment a batch.

        Args:
            images: (B, 3, S, S) uint8.
            keys: (B,) int64, on the CPU for speed; :func:`pipeline.data.draws.sample_keys` makes them.

        Returns:
            (B, 3, size, size) float32 in [0, 1].
        """
        return self.with_maps(images, keys)[0]

    def with_maps(self, images: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """The same, and what shows where everything went: (B, 3, 3) float64 maps of :mod:`geometry`."""
        if self.recipe == RECIPES["none"]:
            return _resize(images.float() / 255, self.size), np.tile(np.eye(3), (len(images), 1, 1))
        drawn = self._draw(Draws(keys), images.shape[-1])
        if self._fused.takes(images):
            taps = self._taps(images.shape[-1])
            if self._fused.works(images, drawn, taps=taps, expected=self._in_parts):
                return self._fused(images, drawn, taps=taps), drawn.maps
        return self._in_parts(images, drawn), drawn.maps

    def pair(
        self, images: torch.Tensor, masks: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment images as :meth:`__call__` does, and move their masks with them.

        Args:
            images: (B, 3, S, S) uint8.
            masks: (B, S, S) uint8 class numbers.
            keys: (B,) int64.

        Returns:
            (B, 3, size, size) float32 in [0, 1], and (B, size, size) uint8: the class at each pixel's centre,
            :data:`shards.IGNORE` where that lies outside the image.
        """
        views, maps = self.with_maps(images, keys)
        return views, geometry.warp_nearest(masks, maps, size=self.size, outside=IGNORE)

    def _draw(self, draws: Draws, source: int) -> Drawn:
        """All that is random about some views of images of ``source`` pixels."""
        recipe = self.recipe
        maps, scale = self._crop_and_flip(draws, source)
        jitters = []
        for block in recipe.blocks:
            happens = draws.happens(block.p)
            maps = maps @ _warp_maps(block, draws, happens)
            if any(block.jitter):
                jitters.append((happens, _jitter_strengths(block, draws), draws.order(4)))
        grey, blurred, solarised = (
            draws.happens(p) for p in (recipe.grayscale, recipe.blur, recipe.solarise)
        )
        return Drawn(maps, scale, jitters, grey, blurred, solarised, draws.uniform(*recipe.sigma))

    def _in_parts(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """(B, 3, size, size) float32 in [0, 1]; on a CPU no more at a time than its cache holds."""
        cached = CACHED * torch.get_num_threads()
        at_once = max(1, len(images) if images.is_cuda else cached // (12 * self.size**2))
        views = _empty((len(images), 3, self.size, self.size), images.device)
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            torch.clamp(self._apply(images[part], drawn[part]), 0, 1, out=views[part])
        return views

    def _apply(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """(B, 3, size, size) float32 in [0, 1], but for rounding."""
        views = self._sample(images.float().div_(255), drawn.maps, drawn.scale)
        for jitter in drawn.jitters:
            views = colour.colour_jitter(views, *jitter)
        views = colour.apply_where(views, drawn.grey, colour.make_grey)
        reach = colour.blur_reach(drawn.sigma[drawn.blurred])
        blur = partial(colour.gaussian_blur, radius=blur_radius(self.size), reach=reach)
        views = colour.apply_where(views, drawn.blurred, blur, drawn.sigma)
        return colour.apply_where(views, drawn.solarised, colour.solarise)

    def _crop_and_flip(self, draws: Draws, source: int) -> tuple[np.ndarray, np.ndarray]:
        """(B, 3, 3) maps and the (B, 2) input pixels an output pixel spans."""
        recipe = self.recipe
        if recipe.scale is None:
            width = height = np.ones(len(draws))
        else:
            width, height = _crop_sides(draws, recipe.scale, recipe.ratio)
        left, top = draws.uniform() * (1 - width), draws.uniform() * (1 - height)
        maps = geometry.crop_map(left, top, width, height)
        maps = maps @ geometry.flip_map(draws.happens(recipe.hflip), draws.happens(recipe.vflip))
        return maps, np.stack([width, height], axis=1) * (source / self.size)

    def _sample(self, pixels: torch.Tensor, maps: np.ndarray, scale: np.ndarray) -> torch.Tensor:
        return geometry.warp(
            pixels,
            maps,
            size=self.size,
            scale=scale,
            taps=self._taps(pixels.shape[-1]),
            padding="zeros" if self.recipe.warps else "border",
        )

    def _taps(self, source: int) -> int:
        """Samples an output pixel and axis may need of images of ``source`` pixels."""
        recipe = self.recipe
        longest = 1.0
        if recipe.scale is not None:
            longest = min(1.0, (recipe.scale[1] * max(recipe.ratio[1], 1 / recipe.ratio[0])) ** 0.5)
        return geometry.taps_for(longest * source / self.size)


@dataclass(frozen=True)
class Drawn:
    """What happens to each of B images.

    Attributes:
        maps: (B, 3, 3), output to input.
        scale: (B, 2) input pixels an output pixel spans.
        jitters: of each block with colours: (B,) whether, (B, 4) how strongly, (B, 4) in which order.
        grey, blurred, solarised: (B,) whether.
        sigma: (B,) of the blur.
    """

    maps: np.ndarray
    scale: np.ndarray
    jitters: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    grey: np.ndarray
    blurred: np.ndarray
    solarised: np.ndarray
    sigma: np.ndarray

    def __getitem__(self, part: slice) -> Drawn:
        jitters = [(happens[part], how[part], order[part]) for happens, how, order in self.jitters]
        rest = (self.grey, self.blurred, self.solarised, self.sigma)
        return Drawn(self.maps[part], self.scale[part], jitters, *(one[part] for one in rest))


def blur_radius(size: int) -> int:
    """Where a blur is cut off, in pixels: its kernel is a tenth of the view's side, as in SimCLR."""
    return max(1, int(0.1 * size) // 2)


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Room for views, float32."""
    if device.type == "cuda":
        return torch.empty(shape, device=device)
    # numpy asks for large pages: 38 MB in small ones take as long to get as half of the views.
    return torch.from_numpy(np.empty(shape, np.float32))


def _resize(pixels: torch.Tensor, size: int) -> torch.Tensor:
    if pixels.shape[-1] == size:
        return pixels
    resized = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp_(0, 1)


def _crop_sides(
    draws: Draws, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """(B,) width and height of a square image's crop: the first of ten draws that fits, else the whole."""
    logs = np.log(ratio[0]), np.log(ratio[1])
    tries = [(draws.uniform(*scale), draws.uniform(*logs)) for _ in range(_CROP_TRIES)]
    area, aspect = np.stack(tries, axis=1)
    aspect = np.exp(aspect)
    sides = np.sqrt([area * aspect, area / aspect])
    fits = (sides <= 1).all(axis=0)
    width, height = sides[:, fits.argmax(axis=0), np.arange(len(draws))]
    fit = fits.any(axis=0)
    return np.where(fit, width, 1.0), np.where(fit, height, 1.0)


def _warp_maps(block: Block, draws: Draws, happens: np.ndarray) -> np.ndarray:
    maps = np.tile(np.eye(3), (len(draws), 1, 1))
    if block.perspective:
        corners = np.tile(np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]), (len(draws), 1, 1))
        inwards = np.stack([draws.uniform(0, block.perspective) for _ in range(8)], axis=1).reshape(-1, 4, 2)
        chosen = (happens & draws.happens(block.perspective_p))[:, None, None]
        found = geometry.perspective_map(corners, corners * (1 - inwards))
        maps = maps @ np.where(chosen, found, np.eye(3))
    if block.rotation:
        angle = np.where(happens, draws.uniform(-block.rotation, block.rotation), 0.0)
        maps = maps @ geometry.rotation_map(angle)
    return maps


def _jitter_strengths(block: Block, draws: Draws) -> np.ndarray:
    """(B, 4): three factors about 1 and the shift of the hue; NaN where the block leaves one out."""
    columns = []
    for number, strength in enumerate(block.jitter):
        centre = 0.0 if number == 3 else 1.0
        low = max(0.0, centre - strength) if number < 3 else -strength
        drawn = draws.uniform(low, centre + strength)
        columns.append(drawn if strength else np.full(len(draws), np.nan))
    return np.stack(columns, axis=1)
