"""Views to compare: by PyTorch's operations when imported, by the fused kernels on a CPU when run.

    TRITON_INTERPRET=1 python tests/unit/fused_cases.py FILE

computes them all by Triton's interpreter, which must be chosen before Triton is imported, into FILE.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import numpy as np
import torch

from pipeline.data.augment import Augment, Drawn
from pipeline.data.draws import sample_keys
from pipeline.data.fused import Fused
from pipeline.data.recipes import RECIPES, Block, Recipe

COUNT = 2
SIZES = [(24, 24), (9, 9), (30, 11)]  # of images, of views: two tiles, part of one, and many samples a pixel
WARPED = Block(p=1, jitter=(0.4, 0.4, 0.2, 0.1), perspective=0.2)
EVERYTHING = Recipe(
    hflip=0.5, vflip=0.5, blocks=(WARPED, replace(WARPED, rotation=20)), grayscale=0.3, blur=0.5, solarise=0.5
)
ORDERS = np.array(list(itertools.permutations(range(4))))


def smooth_images(count: int, size: int) -> torch.Tensor:
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(noise, size=(size, size), mode="bicubic").clamp(0, 1)
    return (large * 255).round().to(torch.uint8)


def recipe_views(name: str, source: int, size: int, *, seed: int = 1) -> torch.Tensor:
    keys = sample_keys(torch.arange(COUNT), seed=seed)
    return Augment(name, size)(smooth_images(COUNT, source), keys)


class InEveryOrder(Augment):
    """Two jitters an image, each in all orders, the second in those of the first backwards."""

    def __init__(self) -> None:
        super().__init__(EVERYTHING, 8)

    def _draw(self, draws, source: int) -> Drawn:
        drawn = super()._draw(draws, source)
        orders = (ORDERS, ORDERS[::-1])
        jitters = [(*jitter[:2], order) for jitter, order in zip(drawn.jitters, orders)]
        return replace(drawn, jitters=jitters)


def ordered_views() -> torch.Tensor:
    """(24, 3, 8, 8)"""
    count = len(ORDERS)
    return InEveryOrder()(smooth_images(count, 12), sample_keys(torch.arange(count), seed=3))


def batched_views() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images together, and the same one by one."""
    images, keys, augment = (
        smooth_images(4, 24),
        sample_keys(torch.arange(4), seed=2),
        Augment(EVERYTHING, 24),
    )
    return augment(images, keys), torch.cat([augment(images[i : i + 1], keys[i : i + 1]) for i in range(4)])


def all_views() -> dict[str, torch.Tensor]:
    views = {f"{name} {SIZES[0]}": recipe_views(name, *SIZES[0]) for name in sorted(set(RECIPES) - {"none"})}
    views |= {
        f"{name} {sizes}": recipe_views(name, *sizes) for name in ("cass", "byol_2") for sizes in SIZES[1:]
    }
    views["together"], views["alone"] = batched_views()
    return views | {"orders": ordered_views()}


if __name__ == "__main__":
    Fused.takes = lambda self, images: len(images) > 0
    torch.save(all_views(), sys.argv[1])
