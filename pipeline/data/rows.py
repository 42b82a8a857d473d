"""Weighted sums of an image's rows: what crops, resizes and blurs are, along one axis at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sum_rows(images: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Make every row of the output a weighted sum of a few rows of the input.

    An image's result does not depend on the rest of the batch, to the bit, nor do places of weight 0 matter.

    Args:
        images: (B, C, H, W) float32.
        places: (B, N, K) int64, or (1, N, K) for all images alike: which rows, 0 to H - 1.
        weights: (B, N, K) float32.

    Returns:
        (B, C, N, W) float32.
    """
    count, channels, height, width = images.shape
    firsts = torch.arange(0, count * channels * height, height, device=images.device)
    rows = firsts.reshape(count, channels, 1, 1) + places.unsqueeze(1)
    shares = weights.unsqueeze(1).expand_as(rows)
    # A bag is summed in registers, in its own order; a product with a matrix of zeros would take longer.
    summed = F.embedding_bag(
        rows.flatten(0, 2), images.reshape(-1, width), mode="sum", per_sample_weights=shares.flatten(0, 2)
    )
    return summed.reshape(count, channels, -1, width)
