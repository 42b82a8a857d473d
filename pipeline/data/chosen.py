"""Some images of a batch: without a copy where they lie side by side, as in a batch of one or two."""

from __future__ import annotations

import numpy as np
import torch

Rows = slice | torch.Tensor


def rows_of(chosen: np.ndarray, device: torch.device) -> Rows:
    """Which images of a batch are chosen: (B,) bool, at least one of them."""
    rows = np.flatnonzero(chosen)
    first, stop = int(rows[0]), int(rows[-1]) + 1
    if stop - first == len(rows):
        return slice(first, stop)
    return torch.from_numpy(rows).to(device, non_blocking=True)


def take(images: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The images of these rows: a part of ``images`` where they lie side by side, else a copy."""
    return images[rows] if isinstance(rows, slice) else images.index_select(0, rows)


def put(images: torch.Tensor, rows: Rows, new: torch.Tensor) -> torch.Tensor:
    """Replace these rows of ``images``, which are returned."""
    if isinstance(rows, slice):
        images[rows] = new
        return images
    return images.index_copy_(0, rows, new)
