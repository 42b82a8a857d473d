"""Features made comparable: zero mean and unit variance by the training features."""

from __future__ import annotations

import torch
from torch import Tensor


class Standardise:
    """Zero mean and unit variance by the training features, in float64; a constant one keeps its scale."""

    def __init__(self, features: Tensor) -> None:
        features = features.double()
        self.mean = features.mean(dim=0)
        std = features.std(dim=0, correction=0)
        self.std = torch.where(std > 1e-8 * std.max().clamp(min=1e-30), std, torch.ones_like(std))

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) → (N, D) float64"""
        return (features.double() - self.mean) / self.std


class PrincipalAxes(Standardise):
    """Standardised, then along the training features' principal axes.

    The rotation leaves a penalised linear classifier's solution the same and its problem far easier. With
    fewer samples than features only the samples' own span is kept: nothing outside it can be used. Products
    of all features are in float32, as the features are: axes that are off by its rounding are as good.
    """

    def __init__(self, features: Tensor) -> None:
        super().__init__(features)
        scaled = super().__call__(features)
        if len(features) < features.shape[1]:
            self.basis = torch.linalg.svd(scaled, full_matrices=False).Vh.T
        else:
            rounded = scaled.float()
            self.basis = torch.linalg.eigh((rounded.T @ rounded).double()).eigenvectors

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) → (N, D') float32, D' at most the number of training samples"""
        return super().__call__(features).float() @ self.basis.float()

    def unscaled(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (D, K) and intercepts (K,) that do to features as they are what ``solution`` does to scaled
        ones."""
        weight = (self.basis @ solution[:-1]) / self.std[:, None]
        return weight, solution[-1] - self.mean @ weight
