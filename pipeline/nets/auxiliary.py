"""Auxiliary heads: a few blocks of one architecture on the last tokens of another (HSSL, arXiv 2310.05108).

A head takes the tokens of any grid, so that local crops pass through it too, and is dropped after
pretraining. It has no stochastic depth, and every parameter gets a gradient.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import GroupNorm1, LayerNorm
from timm.models.convnext import ConvNeXtBlock
from timm.models.metaformer import MetaFormerBlock, Pooling
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from pipeline.nets.mixers import GridAttention, GridMlp, ShiftedWindows

WINDOW = 7  # Swin's


class AuxiliaryHead(nn.Module):
    """Tokens → blocks of one kind → layer normalisation → spatial mean.

    Args:
        kind: one of :data:`KINDS`.
        in_dim: channels of the tokens.
        grid: height and width of the full image's grid.
        depth: blocks.
        width: channels of the blocks; None: ``in_dim``. Where they differ a linear layer comes first.
        first_shortcut: whether the first block has its residual shortcuts. Without them the head cannot hand
            on what it was given.
    """

    def __init__(
        self,
        kind: str,
        in_dim: int,
        *,
        grid: tuple[int, int],
        depth: int = 3,
        width: int | None = None,
        first_shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.out_dim = width or in_dim
        self.stem = nn.Identity() if self.out_dim == in_dim else nn.Linear(in_dim, self.out_dim)
        make = KINDS[kind]
        self.blocks = nn.ModuleList(make(self.out_dim, grid, number) for number in range(depth))
        self.norm = LayerNorm(self.out_dim)
        self.apply(_initialise)
        if not first_shortcut:
            _without_shortcut(self.blocks[0])

    def forward(self, tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The head's own tokens and their mean.

        tokens: (B, height · width, in_dim), row by row → (B, height · width, out_dim) and (B, out_dim)
        """
        x = self.stem(tokens).unflatten(1, (height, width))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x).flatten(1, 2)
        return x, x.mean(dim=1)


class ChannelsFirst(nn.Module):
    """A block of feature maps (B, C, H, W), where others take (B, H, W, C)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) → the same."""
        return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Nothing(nn.Module):
    """What stands where a shortcut was: zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same."""
        return torch.zeros_like(x)


def _convnext(dim: int, grid: tuple[int, int], number: int) -> nn.Module:
    """Depth-wise 7×7 convolution, layer normalisation, MLP; no LayerScale."""
    return ChannelsFirst(ConvNeXtBlock(dim, ls_init_value=None))


def _resnet(dim: int, grid: tuple[int, int], number: int) -> nn.Module:
    """1×1, 3×3, 1×1 convolutions, the inner ones a quarter as wide."""
    return ChannelsFirst(Bottleneck(dim, dim // Bottleneck.expansion))


def _resnet_basic(dim: int, grid: tuple[int, int], number: int) -> nn.Module:
    """Two 3×3 convolutions."""
    return ChannelsFirst(BasicBlock(dim, dim))


def _pool(dim: int, grid: tuple[int, int], number: int) -> nn.Module:
    """PoolFormer (Yu et al. 2021, arXiv 2111.11418): the mean of 3×3 neighbours, MLP."""
    return ChannelsFirst(
        MetaFormerBlock(dim, token_mixer=Pooling, mlp_act=nn.GELU, mlp_bias=True, norm_layer=GroupNorm1)
    )


_transformer = partial(
    MetaFormerBlock, mlp_act=nn.GELU, mlp_bias=True, norm_layer=LayerNorm, use_nchw=False
)  # normalisation, token mixer, shortcut; normalisation, MLP, shortcut


def _vit(dim: int, grid: tuple[int, int], number: int) -> nn.Module:
    return _transformer(dim, token_mixer=GridAttention)


def _swin(dim: int, grid: tuple[int, int], number: int) -> nn.Module:
    window = min(WINDOW, max(grid))
    return _transformer(dim, token_mixer=ShiftedWindows, window=window, shift=number % 2 * (window // 2))


def _mixer(dim: int, grid: tuple[int, int], number: int) -> nn.Module:
    return _transformer(dim, token_mixer=GridMlp, grid=grid)


KINDS = {
    "convnext": _convnext,
    "resnet": _resnet,
    "resnet_basic": _resnet_basic,
    "swin": _swin,
    "vit": _vit,
    "mixer": _mixer,
    "pool": _pool,
}


def _without_shortcut(block: nn.Module) -> None:
    inner = block.block if isinstance(block, ChannelsFirst) else block
    assert isinstance(inner, nn.Module)
    if isinstance(inner, MetaFormerBlock):
        shortcuts = ["res_scale1", "res_scale2"]
        if isinstance(inner.token_mixer, Pooling):
            inner.token_mixer = inner.token_mixer.pool  # it takes away what the shortcut would bring back
    else:
        shortcuts = ["shortcut" if isinstance(inner, ConvNeXtBlock) else "downsample"]
    for name in shortcuts:  # what timm's blocks put their shortcuts through
        setattr(inner, name, Nothing())


def _initialise(module: nn.Module) -> None:
    """Normal, 0.02, as transformers and ConvNeXts are; 3×3 convolutions as in ResNets."""
    if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
