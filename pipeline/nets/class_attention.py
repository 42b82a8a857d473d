"""Attention of one learnt token to patch tokens: a set of patches becomes one vector.

The last layers of CaiT (Touvron et al. 2021, arXiv 2103.17239), without LayerScale, as SelfPatch uses them
(arXiv 2206.07990): only the learnt token asks, and only it is changed, so a layer costs a set of N patches
N keys and values instead of N² attention weights.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn


class ClassAttentionBlock(nn.Module):
    """Attention of the token to itself and to the patches, then an MLP, each with a norm and a shortcut."""

    def __init__(self, dim: int, *, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, token: Tensor, patches: Tensor, exists: Tensor | None = None) -> Tensor:
        """(B, 1, C), (B, N, C) and, where some of the patches are not there, (B, N) bool → (B, 1, C)"""
        keys = self.norm1(torch.cat([token, patches], dim=1))
        query = self.query(keys[:, 0]).unflatten(1, (self.heads, -1))
        key, value = (part(keys).unflatten(2, (self.heads, -1)) for part in (self.key, self.value))
        scores = torch.einsum("bhd,bnhd->bhn", query * query.shape[-1] ** -0.5, key)
        if exists is not None:
            absent = ~torch.cat([exists.new_ones(len(exists), 1), exists], dim=1)
            scores = scores.masked_fill(absent[:, None], float("-inf"))
        found = torch.einsum("bhn,bnhd->bhd", scores.softmax(dim=-1).to(value.dtype), value)
        token = token + self.proj(found.flatten(1))[:, None]
        return token + self.mlp(self.norm2(token))


class ClassAttention(nn.Module):
    """A learnt token, blocks in which it attends to the patches, and a norm.

    Args:
        dim: length C of a patch token.
        heads: attention heads; they divide ``dim``.
        depth: blocks.
    """

    def __init__(self, dim: int, *, heads: int, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList(ClassAttentionBlock(dim, heads=heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.token, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, patches: Tensor, exists: Tensor | None = None) -> Tensor:
        """One vector for each set of patches.

        Args:
            patches: (B, N, C): all of an image, or a few neighbours of each of very many patches.
            exists: (B, N) bool, which of them are there; None: all.

        Returns:
            (B, C)
        """
        token = self.token.expand(len(patches), -1, -1)
        for block in self.blocks:
            token = block(token, patches, exists)
        return self.norm(token[:, 0])
