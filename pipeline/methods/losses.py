"""Losses between two batches of embeddings; all in float32, outside autocast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the batch of 2 − 2·cos(a, b): the squared distance of unit vectors. (B, D) each → scalar."""
    with torch.autocast(a.device.type, enabled=False):
        return (2 - 2 * F.cosine_similarity(a.float(), b.float(), dim=1)).mean()


def info_nce(a: Tensor, b: Tensor, *, temperature: float) -> Tensor:
    """Symmetric InfoNCE: row i of a belongs to row i of b, b's other rows are negatives; and the reverse.

    (N, D) each → scalar; van den Oord et al. 2018, in the two-sided form of Radford et al. 2021.
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T / temperature
        own = torch.arange(len(a), device=a.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def nt_xent(a: Tensor, b: Tensor, *, temperature: float) -> Tensor:
    """SimCLR's loss: of the 2N − 1 other embeddings, each must find the one of the same image.

    (N, D) each → scalar, the mean over all 2N anchors; Chen et al. 2020, equation 1.
    """
    with torch.autocast(a.device.type, enabled=False):
        z = F.normalize(torch.cat([a, b]).float(), dim=1)
        logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
        partner = torch.arange(len(z), device=z.device).roll(len(a))
        return F.cross_entropy(logits, partner)


def variance_term(z: Tensor) -> Tensor:
    """Mean over dimensions of max(0, 1 − standard deviation over the batch). (N, D) → scalar; VICReg."""
    with torch.autocast(z.device.type, enabled=False):
        return F.relu(1 - torch.sqrt(z.float().var(dim=0) + 1e-4)).mean()


def covariance_term(z: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances, divided by D. (N, D) → scalar; VICReg."""
    with torch.autocast(z.device.type, enabled=False):
        centred = z.float() - z.float().mean(dim=0)
        cov = centred.T @ centred / (len(z) - 1)
        return (cov.pow(2).sum() - cov.diagonal().pow(2).sum()) / z.shape[1]


def variance_covariance(
    a: Tensor, b: Tensor, *, invariance: float, variance: float, covariance: float
) -> Tensor:
    """VICReg's loss with its three weights. (N, D) float32 each → scalar; Bardes et al. 2022, 2105.04906."""
    distance = (a - b).pow(2).mean()
    spread = (variance_term(a) + variance_term(b)) / 2
    correlation = covariance_term(a) + covariance_term(b)
    return invariance * distance + variance * spread + covariance * correlation


def agreement(name: str, a: Tensor, b: Tensor, options: Mapping[str, Any]) -> Tensor:
    """The loss by which two nets' vectors of the same images are brought together. (N, D) each → scalar.

    Args:
        name: ``cosine``, ``infonce``, ``nt_xent`` or ``variance_covariance``.
        options: of the method: ``temperature``, or ``invariance``, ``variance`` and ``covariance``.
    """
    match name:
        case "cosine":
            return cosine_distance(a, b)
        case "infonce":
            return info_nce(a, b, temperature=options["temperature"])
        case "nt_xent":
            return nt_xent(a, b, temperature=options["temperature"])
        case "variance_covariance":
            weights = {term: options[term] for term in ("invariance", "variance", "covariance")}
            return variance_covariance(a, b, **weights)
    raise ValueError(f"no loss is called {name!r}")
