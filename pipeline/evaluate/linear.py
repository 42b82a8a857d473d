"""Linear probe: logistic regression on frozen, standardised features, solved to convergence.

Mean and variance are those of every train image, labelled or not. The weight decay is picked on validation;
where that has few images, as many as there are labels, by cross-validation over these and the labelled train
images, so that a choice among seven does not hang on a handful of images. The classifier itself is always
learned from the labelled train images alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.evaluate.features import every_train_image, features_key, features_of
from pipeline.evaluate.logistic import TOLERANCE, fit_logistic, predict_logits, second_moments
from pipeline.evaluate.losses import class_weights
from pipeline.evaluate.problem import Classify, Prediction, Problem, Split, Tick, reproducible
from pipeline.evaluate.select import classified, score_of, validation_score
from pipeline.evaluate.standardise import SampleSpan, Standardise
from pipeline.files import write_atomically
from pipeline.nets.export import Classifier, export, load_exported

HEAD = "head.safetensors"  # beside timm's files
ROWS = 32  # features that are classified at a time

FOLDS = 5  # of the cross-validation
ENOUGH = 200  # validation images, above which they choose alone
# strongest first: the start of each fit is the solution of the one before, and a tie goes to the stronger
WEIGHT_DECAYS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
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


def probe(problem: Problem) -> tuple[Tensor, Tensor]:
    """The linear probe as weights (K, D) and intercepts (K,) for features as the net gives them."""
    fit = _remembered_fit(problem)
    weight, bias = fit.standardise.unscaled(fit.solution)
    return weight.T.cpu(), bias.cpu()


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
    content = save({name: value.cpu().contiguous() for name, value in stored.items()})
    write_atomically(folder / HEAD, content)  # which obeys the umask


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
    every = features_of(problem, every_train_image(problem)).to(device)  # the labelled ones are among them
    if not every.isfinite().all():
        raise ValueError("a feature is not a number: the pretraining has diverged")
    raw = features_of(problem, problem.train).to(device)
    standardise = SampleSpan(raw, every)
    train, targets = standardise(raw), problem.train.targets.to(device)
    val = standardise(features_of(problem, problem.val).to(device))

    def weights_of(some: Tensor) -> Tensor | None:
        return class_weights(some, problem.num_classes) if settings.class_weights == "balanced" else None

    if len(val) < ENOUGH and settings.validation == "fraction":
        both = torch.cat([raw, features_of(problem, problem.val).to(device)])
        plain = Standardise.__call__(standardise, both)
        known = torch.cat([targets, problem.val.targets.to(device)])
        decay, log = _cross_validated(problem, plain, known, weights_of)
        solution = fit_logistic(
            train,
            targets,
            num_classes=problem.num_classes,
            weights=weights_of(targets),
            weight_decay=decay,
        )
        return Fit(standardise, solution, decay, log)
    solution, decay, log = pick_weight_decay(
        train,
        targets,
        num_classes=problem.num_classes,
        weights=weights_of(targets),
        score=lambda found: validation_score(problem, problem.probabilities(predict_logits(val, found))),
        tick=problem.tick,
    )
    return Fit(standardise, solution, decay, log)


def _cross_validated(
    problem: Problem, features: Tensor, targets: Tensor, weights_of: Callable[[Tensor], Tensor | None]
) -> tuple[float, list[dict[str, Any]]]:
    """The weight decay with the best score of all images, each predicted by a fit without its fold.

    Args:
        features: (N, D), standardised, of the labelled train images and then the validation images.
        targets: of them.
    """
    rows = np.concatenate([problem.train.rows, problem.val.rows])
    folds = folds_of(targets.cpu().numpy(), problem.index.samples["group"].to_numpy()[rows])
    found = np.zeros((len(WEIGHT_DECAYS), len(targets), problem.num_classes), np.float32)
    for fold in range(int(folds.max()) + 1):
        inside = torch.from_numpy(folds != fold).to(features.device)
        moments, solution = second_moments(features[inside]), None
        for place, decay in enumerate(WEIGHT_DECAYS):
            solution = fit_logistic(
                features[inside],
                targets[inside],
                num_classes=problem.num_classes,
                weights=weights_of(targets[inside]),
                weight_decay=decay,
                start=solution,
                tolerance=COMPARED,
                moments=moments,
                precision=torch.float32,
            )
            logits = predict_logits(features[~inside], solution)
            found[place, folds == fold] = problem.probabilities(logits)
            problem.tick(
                fold * len(WEIGHT_DECAYS) + place + 1, FOLDS * len(WEIGHT_DECAYS), "cross-validation"
            )
    log, scores = [], []
    for decay, probabilities in zip(WEIGHT_DECAYS, found):
        metrics, score = score_of(problem, probabilities, targets.cpu().numpy())
        log.append({"weight_decay": decay, "cross_validation": metrics})
        scores.append(score)
    return WEIGHT_DECAYS[int(np.argmax(scores))], log


def folds_of(targets: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """A fold for each image, int64 (N,): whole groups, and classes spread over the folds as evenly as can be.

    A function of the images alone: tasks of the same images, whatever their seed and protocol, then have the
    same fit, and one that is remembered is the one that they would find. The largest groups go first, each to
    the fold that still has least of its classes.

    Args:
        targets: int (N,), or 0 and 1 (N, K).
        groups: str (N,), "" for an image that is a group of its own. Where all are of one group, each image
            counts as its own.
    """
    names = [f"group {group}" if group else str(place) for place, group in enumerate(groups.tolist())]
    if len(set(names)) == 1:
        names = [str(place) for place in range(len(names))]
    unit = np.unique(names, return_inverse=True)[1]
    known = targets > 0.5 if targets.ndim == 2 else targets[:, None] == np.unique(targets)
    member = np.column_stack([known, ~known.any(axis=1)]).astype(float)
    counts = np.zeros((unit.max() + 1, member.shape[1]))
    np.add.at(counts, unit, member)
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    have = np.zeros((min(FOLDS, len(counts)), counts.shape[1]))
    size = np.zeros(len(have))
    fold_of = np.empty(len(counts), np.int64)
    order = np.random.default_rng(0).permutation(len(counts))
    for one in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
        after = (have * shares[one]).sum(axis=1)
        fold = int(np.lexsort((size, np.round(after, 12)))[0])
        have[fold] += shares[one]
        size[fold] += counts[one].sum()
        fold_of[one] = fold
    return fold_of[unit]


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
    """Solve for every weight decay, take the one that validation likes best, and solve that on.

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
            best, best_score = (solution, decay), found
        tick(tried + 1, len(WEIGHT_DECAYS), "weight decay")
    assert best is not None  # a score is a number: validation sees to it
    compared, decay = best
    if tolerance < COMPARED:
        compared = fit(weight_decay=decay, start=compared, tolerance=tolerance, precision=torch.float64)
    return compared, decay, log
