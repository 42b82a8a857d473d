"""The validation score that picks an epoch or a weight decay, and the metrics of what was picked."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluate.metrics import evaluate
from pipeline.evaluate.problem import Prediction, Problem
from pipeline.evaluate.protocols import check_metric
from pipeline.evaluate.thresholds import thresholds

RESAMPLES = 100  # of the validation images
FEWEST_GROUPS = 8  # as for intervals: of two groups with no true gain one in six studies would find one
BEYOND_CHANCE = 1.64  # standard errors


def validation_score(problem: Problem, probabilities: np.ndarray) -> tuple[dict[str, float], float]:
    """Every metric of the validation split, and the one that ``select_by`` names.

    Args:
        probabilities: (N, K) for the validation split.

    Raises:
        UserError: there is no such metric, or it does not exist on this validation split.
    """
    return score_of(problem, probabilities, problem.val.targets.numpy())


def score_of(
    problem: Problem, probabilities: np.ndarray, targets: np.ndarray
) -> tuple[dict[str, float], float]:
    """Every metric of some labelled images, and the one that ``select_by`` names.

    Args:
        probabilities: (N, K).
        targets: int (N,), or 0 and 1 (N, K).

    Raises:
        UserError: there is no such metric, or it does not exist for these images.
    """
    metrics = evaluate(probabilities, targets)
    return picked(problem, metrics, lacking="either positives or negatives of every class")


def gains_beyond_chance(problem: Problem, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether predictions for the validation split are better than others beyond chance.

    The gain in the metric that ``select_by`` names must exceed 1.64 standard errors (one-sided, 5 %), which a
    paired bootstrap over the validation groups gives: images of one group are drawn together. Fewer than
    eight groups cannot tell.

    Args:
        before, after: (N, K) probabilities.
    """
    targets = problem.val.targets.numpy()
    groups = problem.index.samples["group"].to_numpy()[problem.val.rows]
    units = np.unique(
        [f"group {group}" if group else str(place) for place, group in enumerate(groups)], return_inverse=True
    )[1]
    if units.max() + 1 < FEWEST_GROUPS:
        return False
    members = [np.flatnonzero(units == unit) for unit in range(units.max() + 1)]
    name = check_metric(problem.settings.select_by, task=problem.index.task, key="select_by")

    def gain(chosen: np.ndarray) -> float:
        old, new = (evaluate(found[chosen], targets[chosen])[name] for found in (before, after))
        return new - old

    rng = np.random.default_rng(problem.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, where a draw lacks a class
        drawn = [
            gain(np.concatenate([members[unit] for unit in rng.integers(0, len(members), len(members))]))
            for _ in range(RESAMPLES)
        ]
    known = [value for value in drawn if not math.isnan(value)]
    error = float(np.std(known, ddof=1)) if len(known) > 1 else math.inf
    return gain(np.arange(len(targets))) > BEYOND_CHANCE * error


def picked(problem: Problem, metrics: dict[str, float], *, lacking: str) -> tuple[dict[str, float], float]:
    """The metrics of the validation split that exist, and the one that ``select_by`` names.

    Args:
        metrics: of the validation split; where they are of boxes only, those stand in for the masks'.
        lacking: what a validation split lacks on which that metric does not exist.

    Raises:
        UserError: there is no such metric, or it does not exist on this validation split.
    """
    name = check_metric(problem.settings.select_by, task=problem.index.task, key="select_by")
    if name not in metrics:
        name = name.replace("mask_", "box_")
    if math.isnan(metrics[name]):
        ways = [f"another metric, such as {other}" for other in existing(metrics)][:1]
        ways += ["validation: full"] if problem.settings.validation != "full" else []
        advice = f"choose {' or '.join(ways)}" if ways else "the validation split needs some"
        raise UserError(
            f"select_by: {name} does not exist on the {len(problem.val)} validation images, which lack"
            f" {lacking}; {advice}"
        )
    return existing(metrics), metrics[name]


def classified(problem: Problem, *, val: np.ndarray, test: np.ndarray, **more: Any) -> Prediction:
    """The prediction of a classifier.

    Args:
        val, test: (N, K) probabilities, in the order of the splits' rows.
        more: other fields of the prediction.
    """
    targets = problem.test.targets.numpy()
    return Prediction(
        val=evaluate(val, problem.val.targets.numpy()),
        thresholds=thresholds(val, problem.val.targets.numpy()),
        test=evaluate(test, targets),
        arrays={
            "probabilities": test.astype(np.float32),
            "targets": targets.astype(np.uint8 if problem.multilabel else np.int64),
        },
        **more,
    )


def existing(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics without those that do not exist (NaN has no place in JSON)."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}
