"""Geometric augmentation: maps from output to input coordinates, composed, and sampled once.

Coordinates are normalised: -1 is the image's left (top) edge and 1 its right (bottom) edge. A map is a 3x3
homography that takes a point of the *output* to the point of the *input* it shows, so "first A, then B" is
the product A @ B. Maps are (B, 3, 3) float64 numpy arrays; only :func:`warp` and :func:`warp_nearest` touch
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.data.chosen import put, rows_of, take
from pipeline.data.rows import sum_rows

_MIRRORED = ((), (3,), (2,), (2, 3))  # axes that are flipped: x first


def crop_map(left: np.ndarray, top: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Show a box; all four (B,), as shares of the image's sides."""
    maps = _identity(len(left))
    maps[:, 0, 0], maps[:, 1, 1] = width, height
    maps[:, 0, 2], maps[:, 1, 2] = 2 * left + width - 1, 2 * top + height - 1
    return maps


def flip_map(horizontal: np.ndarray, vertical: np.ndarray) -> np.ndarray:
    """Mirror the images for which these (B,) bools are true."""
    maps = _identity(len(horizontal))
    maps[:, 0, 0], maps[:, 1, 1] = np.where(horizontal, -1.0, 1.0), np.where(vertical, -1.0, 1.0)
    return maps


def rotation_map(degrees: np.ndarray) -> np.ndarray:
    """Turn a square image clockwise about its centre by (B,) degrees."""
    radians = np.deg2rad(degrees)
    maps = _identity(len(degrees))
    maps[:, 0, 0] = maps[:, 1, 1] = np.cos(radians)
    maps[:, 0, 1], maps[:, 1, 0] = np.sin(radians), -np.sin(radians)
    return maps


def perspective_map(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The homography that shows the four points ``start`` of the input at ``end`` in the output.

    Args:
        start, end: (B, 4, 2), x and y in normalised coordinates.
    """
    x, y = end[..., 0], end[..., 1]
    zero, one = np.zeros_like(x), np.ones_like(x)
    columns, rows = start[..., 0], start[..., 1]
    for_x = np.stack([x, y, one, zero, zero, zero, -columns * x, -columns * y], axis=-1)
    for_y = np.stack([zero, zero, zero, x, y, one, -rows * x, -rows * y], axis=-1)
    system = np.concatenate([for_x, for_y], axis=1)
    solution = np.linalg.solve(system, np.concatenate([columns, rows], axis=1)[..., None])[..., 0]
    return np.concatenate([solution, np.ones((len(start), 1))], axis=1).reshape(-1, 3, 3)


def _identity(count: int) -> np.ndarray:
    return np.tile(np.eye(3), (count, 1, 1))


def taps_for(scale: float) -> int:
    """Samples an output pixel and axis needs when ``scale`` input pixels fall on it."""
    return max(1, math.ceil(math.sqrt(max(2 * scale**2 - 1, 1)) - 1e-6))


def warp(
    images: torch.Tensor, maps: np.ndarray, *, size: int, scale: np.ndarray, taps: int, padding: str
) -> torch.Tensor:
    """Sample the images through their maps, without aliasing where they shrink.

    An output pixel is the mean of ``taps`` x ``taps`` bilinear samples. Their spacing gives the filter the
    variance of the triangle filter that an antialiased resize by the same scale uses; where nothing shrinks
    they coincide, and it is plain bilinear sampling.

    Args:
        images: (B, C, H, W) float.
        maps: (B, 3, 3), output to input.
        size: of the output, in pixels.
        scale: (B, 2), input pixels an output pixel spans along x and y.
        taps: as :func:`taps_for` gives for the largest scale; the same for a whole recipe, so that an image's
            result does not depend on the batch it is in.
        padding: ``zeros`` or ``border``: what lies outside the image.

    Returns:
        (B, C, size, size).
    """
    by_points = partial(_warp_points, size=size, taps=taps, padding=padding)
    if images.is_cuda:  # fewer launches
        return by_points(images, maps, scale)
    straight = ~maps[:, [0, 1, 2, 2], [1, 0, 0, 1]].any(axis=1)
    still = straight & (np.abs(maps) == np.eye(3)).all(axis=(1, 2)) & (images.shape[-1] == size)
    mirrored = 2 * (maps[:, 1, 1] < 0) + (maps[:, 0, 0] < 0)
    kinds = np.where(still, mirrored, np.where(straight, len(_MIRRORED), len(_MIRRORED) + 1))

    def sample(kind: int, images: torch.Tensor, maps: np.ndarray, scale: np.ndarray) -> torch.Tensor:
        if kind < len(_MIRRORED):
            return images.flip(_MIRRORED[kind])
        if kind == len(_MIRRORED):
            return _warp_axes(images, maps, scale, size=size, taps=taps, padding=padding)
        return by_points(images, maps, scale)

    first, *others = set(kinds.tolist())
    if not others:
        return sample(first, images, maps, scale)
    warped = images.new_empty((*images.shape[:2], size, size))
    for kind in (first, *others):
        chosen = kinds == kind
        rows = rows_of(chosen, images.device)
        put(warped, rows, sample(kind, take(images, rows), maps[chosen], scale[chosen]))
    return warped


def _warp_points(
    images: torch.Tensor, maps: np.ndarray, scale: np.ndarray, *, size: int, taps: int, padding: str
) -> torch.Tensor:
    """:func:`warp` by maps of any kind."""
    total: torch.Tensor | None = None
    for grid in _grids(maps, offsets(scale, size=size, taps=taps), size=size, device=images.device):
        sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)
        total = sampled if total is None else total.add_(sampled)
    assert total is not None
    return total.div_(taps**2) if taps > 1 else total


def _warp_axes(
    images: torch.Tensor, maps: np.ndarray, scale: np.ndarray, *, size: int, taps: int, padding: str
) -> torch.Tensor:
    """:func:`warp` by maps that keep the axes: the same samples, summed along y, then along x."""
    centres = (2 * np.arange(size) + 1) / size - 1
    along = _along(scale, size=size, taps=taps)
    for axis, side in ((1, images.shape[2]), (0, images.shape[3])):
        points = centres[:, None] + along[:, axis, None]
        points = maps[:, axis, axis, None, None] * points + maps[:, axis, 2, None, None]
        points = ((points + 1) * side - 1) / 2
        below = np.floor(points)
        places = np.concatenate([below, below + 1], axis=2)
        weights = np.concatenate([below + 1 - points, points - below], axis=2) / taps
        inside = places.clip(0, side - 1)
        if padding == "zeros":
            weights *= places == inside
        images = sum_rows(
            images, torch.from_numpy(inside.astype(np.int64)), torch.from_numpy(weights.astype(np.float32))
        ).transpose(2, 3)
    return images.contiguous()


def warp_nearest(numbers: torch.Tensor, maps: np.ndarray, *, size: int, outside: int) -> torch.Tensor:
    """Take what lies nearest to each output pixel's centre, for numbers that must not be mixed.

    Args:
        numbers: (B, H, W) uint8, such as masks.
        maps: (B, 3, 3), output to input.
        size: of the output, in pixels.
        outside: the number of what lies outside the image.

    Returns:
        (B, size, size) uint8.
    """
    (grid,) = _grids(
        maps, offsets(np.ones((len(maps), 2)), size=size, taps=1), size=size, device=numbers.device
    )
    shifted = numbers[:, None].float() - outside  # what lies outside is sampled as 0
    sampled = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return (sampled[:, 0] + outside).to(torch.uint8)


def _grids(
    maps: np.ndarray, offsets: list[tuple[np.ndarray, np.ndarray]], *, size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """For each pair of offsets, (B, size, size, 2): where the output pixels' centres, so moved, lie in the
    input."""
    centres = (2 * np.arange(size, dtype=np.float32) + 1) / size - 1
    by_x, by_y, constant = maps.astype(np.float32)[..., None].transpose(2, 0, 1, 3)
    for offset_x, offset_y in offsets:
        x = centres + offset_x.astype(np.float32)[:, None, None]
        y = centres + offset_y.astype(np.float32)[:, None, None]
        terms = (by_x * x)[:, :, None], (by_y * y)[..., None], constant[..., None]
        along_x, along_y, shift = (torch.from_numpy(term).to(device, non_blocking=True) for term in terms)
        grid = (along_x[:, :2] + along_y[:, :2]).add_(shift[:, :2])
        if maps[:, 2, :2].any():
            grid.div_((along_x[:, 2:] + along_y[:, 2:]).add_(shift[:, 2:]))
        # As stack(…, dim=-1), which would take half as long as the sampling.
        yield torch.view_as_real(torch.complex(grid[:, 0], grid[:, 1]))


def offsets(scale: np.ndarray, *, size: int, taps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where a pixel's samples lie, relative to its centre, in normalised output coordinates: (B,) x and y."""
    along = _along(scale, size=size, taps=taps)
    return [(along[:, 0, i], along[:, 1, j]) for j in range(taps) for i in range(taps)]


def _along(scale: np.ndarray, *, size: int, taps: int) -> np.ndarray:
    """(B, 2, taps): the same along x and along y, of which the samples are all pairs."""
    if taps == 1:
        return np.zeros((len(scale), 2, 1))
    shrink = np.maximum(scale, 1.0)
    spacing = np.sqrt(2 * (shrink**2 - 1) / (taps**2 - 1)) / shrink * (2 / size)
    return spacing[:, :, None] * (np.arange(taps) - (taps - 1) / 2)
