"""Losses of supervised training: weighted cross-entropy and focal loss, for single and multiple labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def class_weights(targets: Tensor, num_classes: int) -> Tensor:
    """Weigh classes so that each has the same total weight in the loss: the rarer, the heavier.

    Args:
        targets: int64 (N,) of class numbers, or float (N, K) of 0 and 1.
        num_classes: K.

    Returns:
        Multi-class: (K,) of ``N / (C · n_k)``, C the classes that occur; the mean weight over the samples is
        1. Multi-label: (2, K), the weights of a 0 and of a 1: ``N / (2 · n)``. What never occurs weighs 1.
    """
    if targets.ndim == 2:
        ones = targets.sum(dim=0)
        counts = torch.stack([len(targets) - ones, ones])
        return balancing(counts)
    return balancing(torch.bincount(targets, minlength=num_classes))


def balancing(counts: Tensor) -> Tensor:
    """Weights under which every answer that occurs has the same total weight, and the mean weight is 1.

    Args:
        counts: (K,) how often each answer occurs, or (2, K) where each of K questions has two.

    Returns:
        float32, of the same shape: total / (different answers · count), 1 for what never occurs.
    """
    kinds = (counts > 0).sum(dim=0)  # 1 where a label is always 0 or always 1
    weights = counts.sum(dim=0) / (kinds * counts.clamp(min=1))
    return torch.where(counts > 0, weights, torch.ones_like(weights)).to(torch.float32)


def make_loss(
    name: Literal["cross_entropy", "focal"],
    *,
    weights: Tensor | None = None,
    gamma: float = 2.0,
    ignore: int | None = None,
) -> Loss:
    """Build ``loss(logits (B, K), targets (B,) int64 or (B, K) float) → scalar``.

    The focal loss is the cross-entropy times (1 − p)^γ, p the probability of the true answer (Lin et al.,
    Focal Loss for Dense Object Detection, 2017); γ = 0 is the cross-entropy. Weights multiply each sample's
    (multi-label: each answer's) loss before a plain mean over the batch, so a batch of common classes weighs
    little.

    Args:
        name: which one.
        weights: of :func:`class_weights`; None: all 1.
        gamma: γ of the focal loss.
        ignore: class number of samples that do not count; the mean is over the others, 0 where there is none.
    """
    power = gamma if name == "focal" else 0.0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if targets.ndim == 2:
            targets = targets.to(logits.dtype)
            entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            weight = None if weights is None else torch.where(targets > 0.5, weights[1], weights[0])
        else:
            skipped = -1 if ignore is None else ignore
            entropy = F.cross_entropy(logits, targets, reduction="none", ignore_index=skipped)
            weight = None if weights is None else weights[targets.clamp(max=len(weights) - 1)]
        if power:
            entropy = (-torch.expm1(-entropy)).clamp(min=1e-12) ** power * entropy
        lost = entropy if weight is None else weight * entropy
        return lost.mean() if ignore is None else lost.sum() / (targets != ignore).sum().clamp(min=1)

    return loss
