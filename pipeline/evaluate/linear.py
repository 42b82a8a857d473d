"""Linear probe: logistic regression on frozen, standardised features, solved to convergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluate.features import features_key, features_of
from pipeline.evaluate.losses import class_weights, make_loss
from pipeline.evaluate.problem import Prediction, Problem, Split, Tick, reproducible
from pipeline.evaluate.select import classified, validation_score
from pipeline.evaluate.standardise import PrincipalAxes

# strongest first: the start of each fit is the solution of the one before, and a tie goes to the stronger
WEIGHT_DECAYS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PATIENCE = (
    2  # weaker decays are left out after so many without a better score: they fit, slowly, what is noise
)
ITERATIONS = 500
TOLERANCE = 1e-6
COMPARED = (
    1e-4  # tolerance of the solutions that validation compares, scikit-learn's; the best one is solved on
)


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    weight_decay: float,
    weights: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Minimise mean cross-entropy + weight_decay / 2 · |W|² with L-BFGS; the intercept is not penalised.

    Each feature's weights are scaled by about the root of the curvature along it, ¼·E[x²] + weight_decay.
    Along the principal axes (:class:`PrincipalAxes`) that makes the problem rounder and the fit faster, as
    measured on 3,000 images: 16 s in place of 26 s for all decays. The minimum is the same.

    Args:
        features: float64 or float32 (N, D), best along their principal axes; products with them are of their
            precision, all else is float64.
        targets: int64 (N,), or float (N, K) for multi-label (a binary cross-entropy a class).
        weights: class weights of :func:`pipeline.evaluate.losses.class_weights`.
        start: (D + 1, K), where to begin; zeros by default.
        tolerance: where to end: the largest entry of the gradient, in the scaled problem.

    Returns:
        float64 (D + 1, K): the weights and, last, the intercepts.
    """
    curvature = features.square().mean(dim=0).double() / 4 + weight_decay
    scale = torch.cat([curvature.rsqrt(), curvature.new_full((1,), 2.0)])  # the intercept's is at most ¼
    # A class a row: products with a few columns are several times as slow (benchmarks/NOTES.md).
    solution = scale.new_zeros(num_classes, len(scale)) if start is None else start.T / scale
    solution.requires_grad_(True)
    loss_of = make_loss("cross_entropy", weights=None if weights is None else weights.to(scale))
    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        unscaled = scale * solution
        loss = loss_of(predict_logits(features, unscaled.T), targets)
        loss = loss + weight_decay / 2 * unscaled[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (scale * solution.detach()).T


def predict_logits(features: Tensor, solution: Tensor) -> Tensor:
    """(N, D), (D + 1, K) → float64 (N, K)"""
    weights, intercepts = solution.T.split([features.shape[1], 1], dim=1)
    return ((weights.to(features.dtype) @ features.T).double() + intercepts).T


def run(problem: Problem) -> Prediction:
    """The ``linear`` protocol: validation picks the weight decay."""
    with reproducible(problem.seed, problem.device):
        return _run(problem)


def _run(problem: Problem) -> Prediction:
    fit = _remembered_fit(problem)
    return classified(
        problem,
        val=fit.probabilities(problem, problem.val),
        test=fit.probabilities(problem, problem.test),
        chosen={"weight_decay": fit.weight_decay},
        log=fit.log,
    )


@dataclass(frozen=True)
class Fit:
    """A classifier, the weight decay that validation picked for it, and what it saw on the way."""

    standardise: PrincipalAxes
    solution: Tensor
    weight_decay: float
    log: list[dict[str, Any]]

    def probabilities(self, problem: Problem, split: Split) -> np.ndarray:
        features = self.standardise(features_of(problem, split).to(problem.device))
        return problem.probabilities(predict_logits(features, self.solution))


_newest: tuple[tuple, Fit] | None = None


def _remembered_fit(problem: Problem) -> Fit:
    """The fit, or the last one again if it was of the same images: with all labels every seed draws them."""
    global _newest
    key = (
        features_key(problem, problem.train),
        features_key(problem, problem.val),
        problem.settings.model_dump_json(),
    )
    if _newest is None or _newest[0] != key:
        _newest = key, _fit(problem)
    return _newest[1]


def _fit(problem: Problem) -> Fit:
    settings, device = problem.settings, problem.device
    raw = features_of(problem, problem.train).to(device)
    standardise = PrincipalAxes(raw)
    train, targets = standardise(raw), problem.train.targets.to(device)
    weights = class_weights(targets, problem.num_classes) if settings.class_weights == "balanced" else None
    val = standardise(features_of(problem, problem.val).to(device))
    solution, decay, log = pick_weight_decay(
        train,
        targets,
        num_classes=problem.num_classes,
        weights=weights,
        score=lambda found: validation_score(problem, problem.probabilities(predict_logits(val, found))),
        tick=problem.tick,
    )
    return Fit(standardise, solution, decay, log)


def pick_weight_decay(
    features: Tensor,
    targets: Tensor,
    *,
    num_classes: int,
    weights: Tensor | None,
    score: Callable[[Tensor], tuple[dict[str, float], float]],
    tick: Tick,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, float, list[dict[str, Any]]]:
    """Solve for one weight decay after another, take the one that validation likes best, and solve that on.

    What is compared is solved up to a tolerance of :data:`COMPARED`, for which products in float32 do.

    Args:
        features: float32 (N, D).
        targets, num_classes, weights, tolerance: of :func:`fit_logistic`.
        score: the validation metrics of a solution, and the one that picks.
        tick: reports progress, as a problem's does.

    Returns:
        The solution (D + 1, K), its weight decay, and the log of all that were tried.
    """
    fit = partial(fit_logistic, targets=targets, num_classes=num_classes, weights=weights)
    best: tuple[Tensor, float] | None = None
    best_score = float("-inf")
    solution: Tensor | None = None
    worse = 0
    log: list[dict[str, Any]] = []
    for tried, decay in enumerate(WEIGHT_DECAYS):
        solution = fit(features, weight_decay=decay, start=solution, tolerance=max(tolerance, COMPARED))
        metrics, found = score(solution)
        log.append({"weight_decay": decay, "val": metrics})
        if found > best_score:
            best, best_score, worse = (solution, decay), found, 0
        elif (worse := worse + 1) == PATIENCE:
            break
        tick(tried + 1, len(WEIGHT_DECAYS), "weight decay")
    assert best is not None  # a score is a number: validation sees to it
    compared, decay = best
    if tolerance < COMPARED:
        compared = fit(features.double(), weight_decay=decay, start=compared, tolerance=tolerance)
    return compared, decay, log
