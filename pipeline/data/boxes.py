"""Boxes and masks of objects follow their image: into the square, through augmentation, and back.

Boxes are (M, 4) arrays of x0, y0, x1, y1 in pixels, the left and top edge of the image being 0. Of an
object that a view cuts, the box is clipped to the view; an object is left out where less than ``VISIBLE`` of
its box's area, or less than a pixel of a side, remains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.data import geometry
from pipeline.data.squares import Fit, extent

VISIBLE = 0.25  # least share of a box's area
CHUNK = 32  # masks sampled at a time


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the square that :func:`pipeline.data.images.square` makes of it.

    A point (x, y) of the image goes to ``scale * (x, y) + offset``.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def of(cls, width: int, height: int, size: int, fit: Fit) -> Placement:
        """For an image of ``width`` x ``height`` pixels in a square of side ``size``."""
        left, top, right, bottom = (size * share for share in extent(width, height, size, fit))
        return cls(((right - left) / width, (bottom - top) / height), (left, top))

    def into(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes of the image as boxes of the square, where they may lie outside of it."""
        return boxes * np.tile(self.scale, 2) + np.tile(self.offset, 2)

    def back(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes of the square as boxes of the image, where they may lie outside of it."""
        return (boxes - np.tile(self.offset, 2)) / np.tile(self.scale, 2)

    def mask_size(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of the masks that :meth:`into_square` takes."""
        return max(1, round(height * self.scale[1])), max(1, round(width * self.scale[0]))

    def into_square(self, masks: np.ndarray, size: int) -> np.ndarray:
        """Masks (M, h, w) of the whole image, as :meth:`mask_size` says, cut or padded to (M, size, size)."""
        square = np.zeros((len(masks), size, size), masks.dtype)
        takes, gives = [], []
        for side, offset in zip(masks.shape[1:], (self.offset[1], self.offset[0])):
            first = round(offset)
            takes.append(slice(max(0, -first), min(side, size - first)))
            gives.append(slice(max(0, first), max(0, first) + takes[-1].stop - takes[-1].start))
        square[:, gives[0], gives[1]] = masks[:, takes[0], takes[1]]
        return square


def through(boxes: np.ndarray, view: np.ndarray, *, source: int, size: int) -> np.ndarray:
    """Boxes of a square image as boxes of a view of it.

    Where the view turns or distorts the image, the new box is the least that holds the old one's corners.

    Args:
        boxes: of the square of side ``source``.
        view: (3, 3), the map of :mod:`pipeline.data.geometry` that the view was sampled with.
        size: side of the view.
    """
    x, y = 2 * boxes[:, [0, 2, 2, 0]] / source - 1, 2 * boxes[:, [1, 1, 3, 3]] / source - 1
    points = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.linalg.inv(view).T
    corners = (points[..., :2] / points[..., 2:] + 1) * size / 2
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def masks_through(masks: np.ndarray, view: np.ndarray, *, size: int) -> np.ndarray:
    """Masks (M, S, S) bool of a square image as masks (M, size, size) bool of a view of it."""
    seen = np.zeros((len(masks), size, size), bool)
    for first in range(0, len(masks), CHUNK):
        part = torch.from_numpy(masks[None, first : first + CHUNK]).float()
        options = {"size": size, "scale": np.ones((1, 2)), "taps": 1, "padding": "zeros"}
        seen[first : first + CHUNK] = geometry.warp(part, view[None], **options)[0] > 0.5  # type: ignore[arg-type]
    return seen


def clip(boxes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to a view of side ``size``.

    Returns:
        The clipped boxes, (M, 4), and which objects still count, (M,) bool.
    """
    clipped = boxes.clip(0, size)
    sides, whole = clipped[:, 2:] - clipped[:, :2], boxes[:, 2:] - boxes[:, :2]
    kept = sides.prod(axis=1) >= VISIBLE * whole.prod(axis=1)
    return clipped, kept & (sides >= 1).all(axis=1)
