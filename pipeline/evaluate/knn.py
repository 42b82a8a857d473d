"""Nearest neighbours on frozen, standardised features: nothing is trained, nothing is tuned.

Without standardising, a constant part of the features, which no loss asks to be removed, makes all images
alike: on 5,600 blood cells, pretrained for four epochs, macro-F1 at 1 % of the labels rises by .06 to .17.
Mean and variance are those of every train image, labelled or not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.features import every_train_image, features_of
from pipeline.evaluate.neighbours import nearest
from pipeline.evaluate.problem import Classify, Prediction, Problem, Split, reproducible
from pipeline.evaluate.select import classified
from pipeline.evaluate.standardise import Standardise

TEMPERATURE = 0.07
SPARE = 8  # candidates beyond the k nearest, since which is the last of those is a matter of rounding
BATCH = 64  # queries whose candidates are compared at a time, or fewer, so that their features are
ROOM = 1 << 23  # at most so many numbers


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_targets: Tensor,
    features: Tensor,
    *,
    k: int,
    num_classes: int,
    temperature: float = TEMPERATURE,
    chunk: int = 1024,
) -> Tensor:
    """Weighted vote of the k nearest training samples by cosine similarity (Wu et al. 2018; DINO's protocol).

    Args:
        train_features: (N, D).
        train_targets: int64 (N,), or (N, K) of 0 and 1 for multi-label.
        features: (M, D), on the same device.
        k: neighbours that vote; all N where there are fewer.
        num_classes: K.
        temperature: τ; a neighbour of similarity s votes with weight exp(s / τ).
        chunk: queries at a time, which bounds the memory at chunk × N.

    Returns:
        float32 (M, K): the share of each class in the vote; multi-label: the share of neighbours with the
        label.
    """
    bank = F.normalize(train_features.float(), dim=1)
    votes = (
        train_targets.float() if train_targets.ndim == 2 else F.one_hot(train_targets, num_classes).float()
    )
    k = min(k, len(bank))
    queries = F.normalize(features.float(), dim=1)
    candidates = min(k + SPARE, len(bank))
    _, places = nearest(bank, queries, k=candidates, chunk=chunk)
    at_once = max(1, min(BATCH, ROOM // (candidates * bank.shape[1])))
    padding = -len(queries) % at_once  # all batches are of one size: so are the bits, in whatever company
    queries = torch.cat([queries, queries.new_zeros(padding, queries.shape[1])])
    places = torch.cat([places, places.new_zeros(padding, candidates)])
    shares = [
        _vote(bank, votes, some, where, k=k, temperature=temperature)
        for some, where in zip(queries.split(at_once), places.split(at_once), strict=True)
    ]
    return torch.cat([votes.new_zeros(0, votes.shape[1]), *shares])[: len(features)]


def _vote(
    bank: Tensor, votes: Tensor, queries: Tensor, places: Tensor, *, k: int, temperature: float
) -> Tensor:
    """The vote of the k nearest among candidates, by products in float64.

    Products of float32 depend, in their last bits, on how many queries are asked at once. Where two are the
    same but for those, the vector that comes first is the nearer one.

    Args:
        bank: (N, D).
        votes: (N, K).
        queries: (M, D).
        places: int64 (M, C), candidates in the bank.

    Returns:
        float32 (M, K).
    """
    places = places.sort(dim=1).values
    products = (bank[places].double() @ queries.double()[:, :, None])[:, :, 0]
    order = products.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
    weights = (products.gather(1, order) / temperature).softmax(dim=1)  # already divided by their sum
    chosen = votes[places.gather(1, order)].double()
    return (weights[:, :, None] * chosen).sum(dim=1).float()


def run(problem: Problem) -> Prediction:
    """The ``knn`` protocol."""
    classify = restore(problem)
    with reproducible(problem.seed, problem.device):
        val, test = (classify(problem, split) for split in (problem.val, problem.test))
        return classified(problem, val=val, test=test, chosen={"k": _k(problem)})


def restore(problem: Problem, folder: Path | None = None) -> Classify:
    """The vote of the labelled training images, for images of any index; nothing of it is stored."""
    standardise = Standardise(features_of(problem, every_train_image(problem)).to(problem.device))
    known = standardise(features_of(problem, problem.train).to(problem.device))
    targets = problem.train.targets.to(problem.device)

    def classify(asked: Problem, split: Split) -> np.ndarray:
        features = standardise(features_of(asked, split).to(problem.device))
        votes = knn_predict(known, targets, features, k=_k(problem), num_classes=problem.num_classes)
        return votes.cpu().numpy()

    return classify


def _k(problem: Problem) -> int:
    return min(problem.settings.knn_k, len(problem.train))
