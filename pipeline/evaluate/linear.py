"""Linear probe: logistic regression on frozen, standardised features, solved to convergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.evaluate.features import features_key, features_of
from pipeline.evaluate.logistic import TOLERANCE, fit_logistic, predict_logits, second_moments
from pipeline.evaluate.losses import class_weights
from pipeline.evaluate.problem import Classify, Prediction, Problem, Split, Tick, reproducible
from pipeline.evaluate.select import classified, validation_score
from pipeline.evaluate.standardise import SampleSpan
from pipeline.nets.export import Classifier, export, load_exported

HEAD = "head.safetensors"  # beside timm's files
ROWS = 32  # features that are classified at a time

# strongest first: the start of each fit is the solution of the one before, and a tie goes to the stronger
WEIGHT_DECAYS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
PATIENCE = (
    2  # weaker decays are left out after so many without a better score: they fit, slowly, what is noise
)
COMPARED = (
    1e-4  # tolerance of the solutions that validation compares, scikit-learn's; the best one is solved on
)


def run(problem: Problem) -> Prediction:
    """The ``linear`` protocol: validation picks the weight decay."""
    with reproducible(problem.seed, problem.device):
        return _run(problem)


def _run(problem: Problem) -> Prediction:
    fit = _remembered_fit(problem)
    head = Head.of(*fit.standardise.unscaled(fit.solution))
    return classified(
        problem,
        val=head.probabilities(problem, problem.val),
        test=head.probabilities(problem, problem.test),
        chosen={"weight_decay": fit.weight_decay},
        log=fit.log,
        save=partial(_save, problem, head),
    )


@dataclass(frozen=True)
class Head:
    """A linear classifier of features as a net gives them.

    Attributes:
        weight: float64 (D, K).
        bias: float64 (K,).
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Head:
        return cls(weight.double(), bias.double())

    def probabilities(self, problem: Problem, split: Split) -> np.ndarray:
        """float32 (N, K), in batches of one size: an image's have the same bits in whatever company."""
        features = features_of(problem, split).to(problem.device).double()
        padded = torch.cat([features, features.new_zeros(-len(features) % ROWS, features.shape[1])])
        logits = torch.cat([rows @ self.weight + self.bias for rows in padded.split(ROWS)])
        return problem.probabilities(logits[: len(features)])


def _save(
    problem: Problem, head: Head, folder: Path, classifier: Classifier, trained: dict[str, Any]
) -> None:
    """The backbone with the head as its classifier, in timm's float32, and the head in float64 beside it."""
    net = load_exported(
        problem.backbone, num_classes=problem.num_classes, image_size=problem.settings.image_size
    )
    if net.set_linear_classifier(head.weight.T, head.bias):
        export(net, folder, fit=problem.settings.fit, classifier=classifier, trained=trained)
    else:  # not a linear layer of the pooled features: timm gets the backbone alone
        export(
            net, folder, fit=problem.settings.fit, trained=trained | {"label_names": list(classifier.classes)}
        )
    stored = {"weight": head.weight, "bias": head.bias}
    save_file({name: value.cpu().contiguous() for name, value in stored.items()}, folder / HEAD)


def restore(problem: Problem, folder: Path) -> Classify:
    """The classifier that this protocol saved, for images of any index."""
    stored = load_file(folder / HEAD)
    head = Head(stored["weight"].to(problem.device), stored["bias"].to(problem.device))
    return head.probabilities


@dataclass(frozen=True)
class Fit:
    """A classifier, the weight decay that validation picked for it, and what it saw on the way."""

    standardise: SampleSpan
    solution: Tensor
    weight_decay: float
    log: list[dict[str, Any]]


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
    if not raw.isfinite().all():
        raise ValueError("a feature is not a number: the pretraining has diverged")
    standardise = SampleSpan(raw)
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
    fit = partial(
        fit_logistic,
        features,
        targets,
        num_classes=num_classes,
        weights=weights,
        moments=second_moments(features),
    )
    best: tuple[Tensor, float] | None = None
    best_score = float("-inf")
    solution: Tensor | None = None
    worse = 0
    log: list[dict[str, Any]] = []
    for tried, decay in enumerate(WEIGHT_DECAYS):
        solution = fit(
            weight_decay=decay,
            start=solution,
            tolerance=max(tolerance, COMPARED),
            precision=torch.float32,
        )
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
        compared = fit(weight_decay=decay, start=compared, tolerance=tolerance, precision=torch.float64)
    return compared, decay, log
