"""Features made comparable: zero mean and unit variance by the training features."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # at a time in float64: they stay in a core's cache


class Standardise:
    """Zero mean and unit variance by some features, in float64; a constant one keeps its scale.

    Args:
        features: (N, D) whose mean and variance are taken: those of every train image, labelled or not, since
            a few labelled ones say little of them.
    """

    def __init__(self, features: Tensor) -> None:
        parts = features.split(ROWS)
        self.mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(features)
        squares = torch.stack([(part.double() - self.mean).square().sum(dim=0) for part in parts])
        std = (squares.sum(dim=0) / len(features)).sqrt()
        self.std = torch.where(std > 1e-8 * std.max().clamp(min=1e-30), std, torch.ones_like(std))

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) → (N, D) float32, rounded once"""
        scaled = torch.empty_like(features, dtype=torch.float32)
        for part, out in zip(features.split(ROWS), scaled.split(ROWS), strict=True):
            out.copy_((part.double() - self.mean) / self.std)
        return scaled


class SampleSpan(Standardise):
    """Standardised, and with fewer samples than features in coordinates of the samples' own span.

    A penalised linear classifier can use nothing outside that span, and an orthonormal basis of it leaves its
    solution the same.

    Args:
        features: (N, D) of the labelled samples.
        every: (M, D) whose mean and variance are taken; None: those of the labelled samples.
    """

    def __init__(self, features: Tensor, every: Tensor | None = None) -> None:
        super().__init__(features if every is None else every)
        self.basis: Tensor | None = None
        if len(features) < features.shape[1]:
            self.basis = torch.linalg.qr(super().__call__(features).double().T).Q

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) → (N, D') float32, D' at most the number of training samples"""
        scaled = super().__call__(features)
        return scaled if self.basis is None else scaled @ self.basis.float()

    def unscaled(self, solution: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (D, K) and intercepts (K,) that do to features as they are what ``solution`` does to scaled
        ones."""
        weight = solution[:-1] if self.basis is None else self.basis @ solution[:-1]
        weight = weight / self.std[:, None]
        return weight, solution[-1] - self.mean @ weight
