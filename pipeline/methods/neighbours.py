"""The neighbours of each patch of a grid, and which of them look most like it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Edge = Literal["clip", "wrap"]


def window(side: int, edge: Edge, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The eight patches around each patch of a square grid, whose patches are numbered row by row.

    Args:
        side: patches a row; N = side².
        edge: ``clip``: beyond the edge there is nothing (3 neighbours at a corner, 5 at an edge); ``wrap``:
            there is the opposite edge.

    Returns:
        (N, 8) numbers of the neighbours, row by row, and (N, 8) bool: whether there is one. The number of a
        neighbour that does not exist is that of some patch.
    """
    places = torch.arange(side, device=device)
    row, column = (place.flatten()[:, None] for place in torch.meshgrid(places, places, indexing="ij"))
    near = torch.arange(8, device=device)
    near = near + (near >= 4)  # the fields of the window but the fifth, its centre
    row, column = row + near // 3 - 1, column + near % 3 - 1
    inside = (row >= 0) & (row < side) & (column >= 0) & (column < side)
    numbers = row % side * side + column % side
    return numbers, inside if edge == "clip" else torch.ones_like(inside)


@torch.no_grad()
def most_similar(tokens: Tensor, numbers: Tensor, exists: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
    """Of each patch's neighbours those whose tokens have the largest cosine with its own.

    Args:
        tokens: (B, N, C), of B images.
        numbers, exists: (N, W) each, of :func:`window`.
        count: how many at most, up to W.

    Returns:
        (B, N, count) numbers of patches, the most similar first, and (B, N, count) bool: whether there is
        one.
    """
    units = F.normalize(tokens.float(), dim=2)
    # One neighbour at a time: all at once would take W times the memory of the tokens.
    cosines = torch.stack([(units * units[:, column]).sum(dim=2) for column in numbers.T], dim=2)
    cosines = cosines.masked_fill(~exists, float("-inf"))
    order = cosines.argsort(dim=2, descending=True, stable=True)[..., :count]
    return numbers.expand(len(tokens), -1, -1).gather(2, order), exists.expand_as(cosines).gather(2, order)
