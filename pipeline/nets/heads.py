"""What methods put on top of a backbone's features: projectors, predictors, DINO's prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(
    in_dim: int,
    hidden: int,
    out_dim: int,
    *,
    layers: int = 2,
    bn: bool = True,
    final_bn: bool = False,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """A projector or predictor: (B, in_dim) → (B, out_dim).

    Args:
        layers: linear layers; 1 is a single linear map.
        bn: batch normalisation after every hidden layer (whose own bias it replaces).
        final_bn: batch normalisation, without scale and shift, of the output.
        activation: after every hidden layer.
    """
    modules: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        width = out_dim if last else hidden
        modules.append(nn.Linear(in_dim, width, bias=not (final_bn if last else bn)))
        if not last:
            modules += [nn.BatchNorm1d(width)] if bn else []
            modules.append(activation())
        elif final_bn:
            modules.append(nn.BatchNorm1d(width, affine=False))
        in_dim = width
    return nn.Sequential(*modules)


class Prototypes(nn.Module):
    """A linear layer whose rows are unit vectors times a gain: weight normalisation.

    Args:
        in_dim: length of the input.
        count: number of prototypes K.
        fixed_norm: gain 1 for all; else a learnt gain for each.
    """

    def __init__(self, in_dim: int, count: int, *, fixed_norm: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, in_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.gain = None if fixed_norm else nn.Parameter(torch.ones(count))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_dim) → (B, K)"""
        out = F.linear(x, F.normalize(self.weight, dim=1).to(x.dtype))
        return out if self.gain is None else out * self.gain.to(x.dtype)


def dino_mlp(in_dim: int, hidden: int, out_dim: int, *, layers: int, bn: bool) -> nn.Sequential:
    """A projector with GELU, its weights drawn as transformers' are: (B, in_dim) → (B, out_dim)."""
    modules = mlp(in_dim, hidden, out_dim, layers=layers, bn=bn, activation=nn.GELU)
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return modules


class DinoHead(nn.Module):
    """Caron et al. 2021: an MLP to a bottleneck, unit length, then K prototypes.

    Args:
        in_dim: length of the backbone's features.
        hidden, bottleneck, out_dim: widths of the MLP's layers, of its output, and K.
        layers: linear layers of the MLP.
        bn: batch normalisation in the MLP.
        norm_last_layer: prototypes of length 1.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        hidden: int,
        bottleneck: int,
        out_dim: int,
        layers: int = 3,
        bn: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = dino_mlp(in_dim, hidden, bottleneck, layers=layers, bn=bn)
        self.last_layer = Prototypes(bottleneck, out_dim, fixed_norm=norm_last_layer)

    def embed(self, features: Tensor) -> Tensor:
        """(B, in_dim) → unit vectors (B, bottleneck), in float32."""
        return F.normalize(self.mlp(features).float(), dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_dim) → (B, K)"""
        return self.last_layer(self.embed(features))
