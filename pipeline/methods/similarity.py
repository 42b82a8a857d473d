"""How alike two nets see a set of images: linear CKA, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class LinearCka:
    """Centred kernel alignment with a linear kernel: ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of centred features X and Y.

    1 for features that are equal up to rotation and scale, 0 for unrelated ones; Kornblith et al. 2019, arXiv
    1905.00414. What is kept are sums in float64 on the CPU, so that the batches' sizes do not matter.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []  # of x, y, xᵀx, yᵀy and yᵀx

    def add(self, x: Tensor, y: Tensor) -> None:
        """x: (B, D) and y: (B, E), of the same images."""
        x, y = x.detach().cpu().double(), y.detach().cpu().double()
        found = [x.sum(dim=0), y.sum(dim=0), x.T @ x, y.T @ y, y.T @ x]
        self.count += len(x)
        self.sums = [old + new for old, new in zip(self.sums, found)] if self.sums else found

    def value(self) -> float:
        """CKA of all that was added; 0 where one side is the same for all images."""
        x, y, xx, yy, yx = self.sums
        energies = [
            (product - torch.outer(one, other) / self.count).square().sum()
            for product, one, other in ((yx, y, x), (xx, x, x), (yy, y, y))
        ]
        scale = (energies[1] * energies[2]).sqrt()
        return float(energies[0] / scale) if scale > 0 else 0.0
