"""Augmentation on a GPU in few launches: what :mod:`pipeline.data.augment` does to pixels, by Triton.

All that is drawn goes to the device in one copy, a row of numbers an image. One kernel samples the images and
changes their colours up to the first contrast, which must wait for the mean of its image; one kernel a block
of colours goes on from there; two blur. How many there are depends on the recipe alone. They are compiled at
its first batch, which takes Triton, a GPU that it knows and a C compiler, and are used if they make the views
there that PyTorch's operations make.

Views differ from those of PyTorch's operations by roundings, about 1e-6, at sharp edges of 224 px up to 1e-4.
They do not depend on the batch, to
the bit: nothing is added up in an order that could change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.data import colour, geometry
from pipeline.data.recipes import Recipe

if TYPE_CHECKING:
    from pipeline.data.augment import Drawn

GREY, SOLARISE = len(colour.JITTER), len(colour.JITTER) + 1  # operations beyond those of a jitter
MAP, BLURRED, SOLARISED, STARTS = 0, 9, 10, 11  # columns of every table
LEVELS = 65536  # of grey, in which its mean is summed
BLOCK = 512  # pixels a program works on
COMPARED = 8  # images of a recipe's first batch
AS_GOOD = 1e-3  # most that a pixel of theirs may differ; a level is 4e-3
OPTIONS = {"enable_fp_fusion": False}  # of every launch: products and sums are rounded one by one


@dataclass(frozen=True)
class Layout:
    """Where in an image's row of the table things begin.

    Attributes:
        passes: over an image's colours: one more than there can be contrasts.
        operations: pairs of an operation's number, -1 for none, and its strength. Pass k does those from
            number ``row[STARTS + k]`` to before number ``row[STARTS + k + 1]``.
        offsets: x and y of each sample of a pixel.
        weights: of the blur.
        width: of the row.
    """

    passes: int
    operations: int
    offsets: int
    weights: int
    width: int


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name in :mod:`pipeline.data.fused_kernels`.
        programs: how many run.
        tensors, constants: its arguments; it is compiled for each set of constants.
    """

    kernel: str
    programs: int
    tensors: dict[str, torch.Tensor]
    constants: dict[str, int]


class Fused:
    """One recipe at one output size.

    Args:
        recipe: what may happen to an image.
        size: of the views, in pixels.
        radius: where a blur is cut off, in pixels.
    """

    def __init__(self, recipe: Recipe, size: int, *, radius: int) -> None:
        self.recipe, self.size, self.radius = recipe, size, radius
        self._works: bool | None = None

    def takes(self, images: torch.Tensor) -> bool:
        """Whether images are where kernels run."""
        return images.is_cuda and len(images) > 0

    def works(
        self,
        images: torch.Tensor,
        drawn: Drawn,
        *,
        taps: int,
        expected: Callable[[torch.Tensor, Drawn], torch.Tensor],
    ) -> bool:
        """Whether kernels can be compiled and launched here, and make the views that they should.

        Found out by some images of the first call; if they do not, a warning tells.

        Args:
            images, drawn, taps: as of :meth:`__call__`.
            expected: makes views without fused kernels.
        """
        if self._works is None:
            some, theirs = images[:COMPARED], drawn[slice(COMPARED)]
            try:
                views = self(some, theirs, taps=taps)
                self._works = torch.allclose(views, expected(some, theirs), rtol=0, atol=AS_GOOD)
                why = "they make other views"
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self._works = False
                why = (str(error).strip() or repr(error)).splitlines()[0]
            if not self._works:
                warnings.warn(
                    "augmentation by single operations, which is slower: its kernels do not work here"
                    f" ({why})",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._works

    def __call__(self, images: torch.Tensor, drawn: Drawn, *, taps: int) -> torch.Tensor:
        """Views of a batch.

        Args:
            images: (B, 3, S, S) uint8.
            drawn: for each image.
            taps: samples of an output pixel along each axis.

        Returns:
            (B, 3, size, size) float32 in [0, 1].
        """
        from pipeline.data import fused_kernels

        table = self.table(drawn, taps=taps, pinned=images.is_cuda)
        with torch.cuda.device_of(images):
            there = table.to(images.device, non_blocking=True)
            views = images.new_empty((len(images), 3, self.size, self.size), dtype=torch.float32)
            for launch in self.launches(images.contiguous(), there, views, taps=taps):
                kernel = getattr(fused_kernels, launch.kernel)
                kernel[(launch.programs,)](**launch.tensors, **launch.constants, **OPTIONS)
        return views

    def table(self, drawn: Drawn, *, taps: int, pinned: bool) -> torch.Tensor:
        """(B, width) float32 on the CPU: all that is drawn, in the columns of :meth:`layout`."""
        operations, starts = _operations(drawn, passes=self.layout(taps).passes)
        offsets = geometry.offsets(drawn.scale, size=self.size, taps=taps)
        columns = [drawn.maps.reshape(-1, 9), drawn.blurred[:, None], drawn.solarised[:, None], starts]
        columns += [operations, np.stack([along for pair in offsets for along in pair], axis=1)]
        if self.recipe.blur:
            sigma = torch.from_numpy(drawn.sigma.astype(np.float32))
            columns.append(colour.gaussian_weights(sigma, radius=self.radius).numpy())
        shape = (len(drawn.grey), self.layout(taps).width)
        table = torch.empty(shape, dtype=torch.float32, pin_memory=pinned)
        np.concatenate(columns, axis=1, out=table.numpy(), casting="same_kind")
        return table

    def layout(self, taps: int) -> Layout:
        """Where things are in a table, whatever is drawn."""
        passes = 1 + sum(block.jitter[1] > 0 for block in self.recipe.blocks)
        operations = STARTS + passes + 1
        in_jitters = sum(len(block.jitter) for block in self.recipe.blocks if any(block.jitter))
        offsets = operations + 2 * (in_jitters + 2)  # grey and solarise
        weights = offsets + 2 * taps**2
        width = weights + (2 * self.radius + 1 if self.recipe.blur else 0)
        return Layout(passes, operations, offsets, weights, width)

    def launches(
        self, images: torch.Tensor, table: torch.Tensor, views: torch.Tensor, *, taps: int
    ) -> Iterator[Launch]:
        """What is to be launched, in order: images to views, all on one device."""
        size, count, layout = self.size, len(images), self.layout(taps)
        tiles = -(-(size**2) // BLOCK)
        sums = [table.new_empty((count, tiles), dtype=torch.int32) for _ in range(layout.passes)]
        common = {"SIZE": size, "WIDTH": layout.width, "TILES": tiles, "BLOCK": BLOCK}
        colours = common | {"PASSES": layout.passes, "OPERATIONS": layout.operations}
        sampling = {
            "SOURCE": images.shape[-1],
            "SAMPLES": taps**2,
            "BEYOND": int(self.recipe.warps),
            "OFFSETS": layout.offsets,
        }
        tensors = {"images": images, "table": table, "views": views, "sums": sums[0]}
        yield Launch("sample", count * tiles, tensors, colours | sampling)
        for number in range(1, layout.passes):
            tensors = {"table": table, "views": views, "sums": sums[number - 1], "sums_after": sums[number]}
            own = {"PASS": number, "TILES_UP": 1 << (tiles - 1).bit_length()}
            yield Launch("recolour", count * tiles, tensors, colours | own)
        if self.recipe.blur:
            lines = torch.empty_like(views)
            for down, (sharp, blurred) in enumerate(((views, lines), (lines, views))):
                tensors = {"table": table, "sharp": sharp, "blurred": blurred}
                own = {"DOWN": down, "RADIUS": self.radius, "WEIGHTS": layout.weights}
                yield Launch("blur", 3 * count * tiles, tensors, common | own)


def _operations(drawn: Drawn, *, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, 2 N) numbers and strengths in an image's own order, and (B, passes + 1) where its passes begin."""
    count = len(drawn.grey)
    numbers, strengths = [], []
    for applies, how, order in drawn.jitters:
        strength = np.take_along_axis(how, order, axis=1)
        numbers.append(np.where(applies[:, None] & ~np.isnan(strength), order, -1))
        strengths.append(strength)
    at_once = drawn.solarised & ~drawn.blurred  # else after the blur
    numbers += [np.where(drawn.grey, GREY, -1)[:, None], np.where(at_once, SOLARISE, -1)[:, None]]
    strengths.append(np.zeros((count, 2)))
    number = np.concatenate(numbers, axis=1)
    contrasts = np.cumsum(number == colour.JITTER.index(colour.adjust_contrast), axis=1)
    starts = (contrasts[:, None] < np.arange(passes + 1)[:, None]).sum(axis=2)
    pairs = np.stack([number, np.concatenate(strengths, axis=1)], axis=2)
    return pairs.reshape(count, 2 * number.shape[1]), starts
