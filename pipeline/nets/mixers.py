"""Token mixers on a grid: attention, shifted windows, an MLP over positions; for any height and width.

All take and give (B, H, W, C), and are what ``timm.models.metaformer.MetaFormerBlock`` calls a token mixer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.swin_transformer import WindowAttention, window_partition, window_reverse
from torch import Tensor, nn


class GridAttention(nn.Module):
    """Every token attends to every other, as in a ViT.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int, **_: Any) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads=attention_heads(dim), qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → the same."""
        return self.attention(x.flatten(1, 2)).view(x.shape)


class ShiftedWindows(nn.Module):
    """Attention within windows, as in Swin (Liu et al. 2021, arXiv 2103.14030).

    A grid that the window does not divide is padded; nothing attends to the padding. An axis that one window
    covers is not shifted.

    Args:
        dim: channels C.
        window: side of a window in tokens.
        shift: tokens by which the grid is rolled before it is cut, 0 for none.
    """

    def __init__(self, dim: int, *, window: int, shift: int, **_: Any) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.attention = WindowAttention(dim, num_heads=attention_heads(dim), window_size=window)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → the same."""
        window, (height, width) = self.window, x.shape[1:3]
        high, wide = (-(-side // window) * window for side in (height, width))
        down, right = (self.shift if side > window else 0 for side in (high, wide))
        x = F.pad(x, (0, 0, 0, wide - width, 0, high - height)).roll((-down, -right), dims=(1, 2))
        rows = _regions(height, high, down, x.device)
        columns = _regions(width, wide, right, x.device)
        regions = window_partition((3 * rows[:, None] + columns)[None, :, :, None], (window, window))
        regions = regions.flatten(1)  # (windows, tokens of one)
        apart = torch.zeros((), dtype=x.dtype, device=x.device).expand(len(regions), window**2, window**2)
        apart = apart.masked_fill(regions[:, :, None] != regions[:, None, :], float("-inf"))
        windows = window_partition(x, (window, window)).flatten(1, 2)
        mixed = self.attention(windows, mask=apart).unflatten(1, (window, window))
        whole = window_reverse(mixed, (window, window), high, wide)
        return whole.roll((down, right), dims=(1, 2))[:, :height, :width]


class GridMlp(nn.Module):
    """An MLP over positions, one for all channels, as in MLP-Mixer (Tolstikhin et al. 2021, 2105.01601).

    Its weights are for one grid. A map of another size (of a local crop) is resized to it before and back
    after, bilinearly: that is the MLP with weights interpolated to the map's own positions.

    Args:
        dim: channels C.
        grid: height and width that the weights are for.
    """

    def __init__(self, dim: int, *, grid: tuple[int, int], **_: Any) -> None:
        super().__init__()
        self.grid = grid
        self.mlp = Mlp(grid[0] * grid[1], hidden_features=dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → the same."""
        size = (x.shape[1], x.shape[2])
        tokens = resize(x, self.grid).flatten(1, 2).transpose(1, 2)
        return resize(self.mlp(tokens).transpose(1, 2).unflatten(1, self.grid), size)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, (B, H, W, C) → (B, *size, C), as products of matrices: the same bits on each run of a GPU."""
    if (x.shape[1], x.shape[2]) == size:
        return x
    rows, columns = (_interpolation(x.shape[axis + 1], size[axis], x) for axis in (0, 1))
    return torch.einsum("ih,jw,bhwc->bijc", rows, columns, x)


def attention_heads(dim: int) -> int:
    """The most heads of at least 64 channels that divide a width; one if it is narrower."""
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)


def _interpolation(before: int, after: int, like: Tensor) -> Tensor:
    """(after, before), rows that add up to 1."""
    unit = torch.eye(before, device=like.device)
    return F.interpolate(unit[None], size=after, mode="linear")[0].T.to(like.dtype)


def _regions(side: int, padded: int, shift: int, device: torch.device) -> Tensor:
    """Of each row of a rolled grid: 0, 1 where it came round from the other edge, 2 where it is padding."""
    before = (torch.arange(padded, device=device) + shift) % padded
    region = (before < shift).long()
    return region.masked_fill(before >= side, 2)
