"""Geometric augmentation: maps from output to input coordinates, composed, and sampled once.

Coordinates are normalised: -1 is the image's left (top) edge and 1 its right (bottom) edge. A map is a 3x3
homography that takes a point of the *output* to the point of the *input* it shows, so "first A, then B" is
the product A @ B. Maps are (B, 3, 3) float64 numpy arrays; only :func:`warp` and :func:`warp_nearest` touch
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F


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
    total: torch.Tensor | None = None
    for grid in _grids(maps, offsets(scale, size=size, taps=taps), size=size, device=images.device):
        sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)
        total = sampled if total is None else total + sampled
    assert total is not None
    return total / taps**2


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
    m = torch.from_numpy(maps.astype(np.float32)).to(device, non_blocking=True)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = m.reshape(-1, 9, 1, 1).unbind(1)
    centres = (2 * torch.arange(size, device=device, dtype=torch.float32) + 1) / size - 1
    for offset_x, offset_y in offsets:
        x = (centres + _column(offset_x, device)).unsqueeze(1)
        y = (centres + _column(offset_y, device)).unsqueeze(2)
        depth = m20 * x + m21 * y + m22
        grid_x = (m00 * x + m01 * y + m02) / depth
        grid_y = (m10 * x + m11 * y + m12) / depth
        yield torch.stack((grid_x, grid_y), dim=-1)


def offsets(scale: np.ndarray, *, size: int, taps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Where a pixel's samples lie, relative to its centre, in normalised output coordinates: (B,) x and y."""
    if taps == 1:
        return [(np.zeros(len(scale)), np.zeros(len(scale)))]
    shrink = np.maximum(scale, 1.0)
    spacing = np.sqrt(2 * (shrink**2 - 1) / (taps**2 - 1)) / shrink * (2 / size)
    places = np.arange(taps) - (taps - 1) / 2
    return [(spacing[:, 0] * i, spacing[:, 1] * j) for j in places for i in places]


def _column(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32)[:, None]).to(device, non_blocking=True)
