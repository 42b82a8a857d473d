"""Logistic regression with a penalty, solved to convergence in coordinates in which it is nearly round."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.evaluate.losses import Loss, make_loss

ITERATIONS = 500
TOLERANCE = 1e-6
IN_CACHE = 2**21  # features, each of 4 or 8 bytes, of the rows that one pass over the samples takes at a time
BLOCK = 512  # columns of the second moments computed at a time
SINGULAR = 1e-6  # of the norm: what rounding can leave of an eigenvalue that is 0


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    weight_decay: float,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
    moments: Tensor | None = None,
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """Minimise mean cross-entropy + weight_decay / 2 · |W|² with L-BFGS; the intercept is not penalised.

    It runs in coordinates in which ¼·E[xxᵀ] + weight_decay, which is about the curvature, is the identity.

    Args:
        features: (N, D), centred.
        targets: int64 (N,), or float (N, K) for multi-label (a binary cross-entropy a class).
        weights: class weights of :func:`pipeline.evaluate.losses.class_weights`, with a mean of about 1.
        start: (D + 1, K), where to begin; zeros by default.
        tolerance: where to end: the largest entry of the gradient, in those coordinates.
        moments: of :func:`second_moments` of the features; computed where not given.
        precision: of products with the features; all else is float64.

    Returns:
        float64 (D + 1, K): the weights and, last, the intercepts.
    """
    moments = second_moments(features) if moments is None else moments
    curvature = 1 / 4 if targets.ndim == 1 else 1 / (4 * num_classes)  # multi-label: a mean over classes too
    rounded = Rounded(moments, curvature=curvature, weight_decay=weight_decay, precision=precision)
    # A class a row: products with a few columns are several times as slow (benchmarks/NOTES.md).
    begin = moments.new_zeros(num_classes, len(moments) + 1) if start is None else start.T
    loss_of = make_loss("cross_entropy", weights=None if weights is None else weights.to(moments))
    if features.device.type != "cpu":
        features = features.to(precision)  # once; on a CPU rows are, while they are in the cache
    coordinates = rounded.coordinates(begin)
    optimizer = torch.optim.LBFGS(
        [coordinates],
        max_iter=ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solution = rounded.solution(coordinates)
        loss, gradient = loss_and_gradient(solution, features, targets, loss_of=loss_of, precision=precision)
        penalised = solution[:, :-1]
        gradient[:, :-1] += weight_decay * penalised
        coordinates.grad = rounded.gradient(gradient)
        return loss + weight_decay / 2 * penalised.square().sum()

    optimizer.step(closure)
    return rounded.solution(coordinates).T


def predict_logits(features: Tensor, solution: Tensor) -> Tensor:
    """(N, D), (D + 1, K) → float64 (N, K)"""
    weights, intercepts = solution.T.split([features.shape[1], 1], dim=1)
    return ((weights.to(features.dtype) @ features.T).double() + intercepts).T


def second_moments(features: Tensor) -> Tensor:
    """E[xxᵀ], float64 (D, D): products in the features' precision, sums of those of many rows in float64.

    It is symmetric, so that about half of it is computed.
    """
    width = features.shape[1]
    moments = torch.zeros(width, width, dtype=torch.float64, device=features.device)
    for rows in features.split(4 * IN_CACHE // width + 1):
        for first in range(0, width, BLOCK):
            moments[first : first + BLOCK, first:] += rows[:, first : first + BLOCK].T @ rows[:, first:]
    return (moments.triu() + moments.triu(1).T) / len(features)


def loss_and_gradient(
    solution: Tensor, features: Tensor, targets: Tensor, *, loss_of: Loss, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient, read off the features in one pass.

    On a CPU so many rows at a time that they are still in the cache when the gradient needs them again.

    Args:
        solution: float64 (K, D + 1).
        features, targets, precision: of :func:`fit_logistic`.
        loss_of: of :func:`pipeline.evaluate.losses.make_loss`.

    Returns:
        float64, a scalar and (K, D + 1).
    """
    samples, width = features.shape
    weights, intercepts = solution.split([width, 1], dim=1)
    weights = weights.to(precision)
    at_a_time = IN_CACHE // width + 1 if features.device.type == "cpu" else samples
    loss, gradient = solution.new_zeros(()), torch.zeros_like(solution)
    for rows, answers in zip(features.split(at_a_time), targets.split(at_a_time), strict=True):
        rows = rows.to(precision)
        logits = ((weights @ rows.T).double() + intercepts).requires_grad_(True)
        with torch.enable_grad():
            part = loss_of(logits.T, answers) * (len(rows) / samples)
        (slopes,) = torch.autograd.grad(part, logits)
        loss += part.detach()
        gradient[:, :-1] += slopes.to(precision) @ rows
        gradient[:, -1] += slopes.sum(dim=1)
    return loss, gradient


class Rounded:
    """Coordinates z of a solution in which ``curvature · moments + weight_decay`` is the identity.

    With that matrix as LLᵀ, the weights of a class are L⁻ᵀz, and a gradient with respect to them becomes L⁻¹
    of it. Intercepts are z / √curvature.
    """

    def __init__(
        self, moments: Tensor, *, curvature: float, weight_decay: float, precision: torch.dtype
    ) -> None:
        bound = curvature * moments
        bound.diagonal().add_(weight_decay + SINGULAR * torch.linalg.matrix_norm(bound))
        self.factor = torch.linalg.cholesky(bound).to(precision)
        self.scale = curvature**-0.5

    def coordinates(self, solution: Tensor) -> Tensor:
        """(K, D + 1) → (K, D + 1), float64"""
        weights = (solution[:, :-1].to(self.factor) @ self.factor).double()
        return torch.cat([weights, solution[:, -1:] / self.scale], dim=1)

    def solution(self, coordinates: Tensor) -> Tensor:
        """(K, D + 1) → (K, D + 1), float64"""
        return self._solved(self.factor.T, coordinates, upper=True)

    def gradient(self, gradient: Tensor) -> Tensor:
        """With respect to a solution → with respect to its coordinates, float64 (K, D + 1)"""
        return self._solved(self.factor, gradient, upper=False)

    def _solved(self, factor: Tensor, vectors: Tensor, *, upper: bool) -> Tensor:
        weights = torch.linalg.solve_triangular(factor, vectors[:, :-1].T.to(factor), upper=upper).T.double()
        return torch.cat([weights, vectors[:, -1:] * self.scale], dim=1)
