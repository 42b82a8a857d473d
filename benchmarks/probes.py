"""Linear probe and nearest neighbours beside scikit-learn's, on the same features.

    python -m benchmarks probes [--samples N] [--width D] [--queries M] [--rounds N] [--small]

Features are made up: 10 classes whose means lie in directions of which few matter, variances that fall off
as features of trained nets do, a tenth of the labels wrong. Both sides standardise and solve for the same
weight decays, from the strongest to the weakest, until two in a row are no better on 2,000 validation
samples: ours by :func:`pipeline.evaluate.linear.pick_weight_decay`, theirs by ``LogisticRegression`` with its
own solver, L-BFGS, its own tolerance, and each fit from where the one before ended. Scores are the accuracy
on 5,000 test samples.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio
from pipeline.evaluate.knn import TEMPERATURE, knn_predict
from pipeline.evaluate.linear import WEIGHT_DECAYS, pick_weight_decay
from pipeline.evaluate.logistic import predict_logits
from pipeline.evaluate.standardise import SampleSpan, Standardise

CLASSES = 10
NEIGHBOURS = 20
WRONG = 0.1
TIMES_AS_FAST = 5.0


@dataclass(frozen=True)
class Features:
    """Of train, val and test: float32 (N, D) and int64 (N,)."""

    parts: dict[str, tuple[np.ndarray, np.ndarray]]

    def __getitem__(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        return self.parts[split]


def make(samples: int, width: int, queries: int, *, val: int = 2000, seed: int = 0) -> Features:
    draws = np.random.default_rng(seed)
    spread = (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    means = draws.standard_normal((CLASSES, width), dtype=np.float32) * spread**2
    mixing = draws.standard_normal((width, width), dtype=np.float32) / np.float32(np.sqrt(width))
    parts = {}
    for split, count in (("train", samples), ("val", val), ("test", queries)):
        labels = draws.integers(CLASSES, size=count)
        hidden = draws.standard_normal((count, width), dtype=np.float32) * spread + means[labels]
        wrong = draws.random(count) < WRONG
        labels[wrong] = draws.integers(CLASSES, size=wrong.sum())
        parts[split] = (np.maximum(hidden @ mixing, 0), labels)
    return Features(parts)


def linear_ours(features: Features, *, num_classes: int = CLASSES) -> float:
    train, targets = (torch.from_numpy(part) for part in features["train"])
    standardise = SampleSpan(train)
    val, truth = standardise(torch.from_numpy(features["val"][0])), features["val"][1]

    def score(solution: torch.Tensor) -> tuple[dict[str, float], float]:
        right = float((predict_logits(val, solution).argmax(1).numpy() == truth).mean())
        return {"accuracy": right}, right

    solution, _, _ = pick_weight_decay(
        standardise(train),
        targets,
        num_classes=num_classes,
        weights=None,
        score=score,
        tick=lambda *_: None,
    )
    asked = standardise(torch.from_numpy(features["test"][0]))
    return float((predict_logits(asked, solution).argmax(1).numpy() == features["test"][1]).mean())


def linear_theirs(features: Features) -> float:
    scaler = StandardScaler().fit(features["train"][0])
    train, val, test = (scaler.transform(features[split][0]) for split in ("train", "val", "test"))
    model = LogisticRegression(max_iter=500, warm_start=True)
    found, best_score = 0.0, -1.0
    for decay in WEIGHT_DECAYS:
        model.C = 1 / (decay * len(train))
        model.fit(train, features["train"][1])
        if (score := model.score(val, features["val"][1])) > best_score:
            best_score, found = score, model.score(test, features["test"][1])
    return found


def knn_ours(features: Features) -> float:
    train, targets = (torch.from_numpy(part) for part in features["train"])
    standardise = Standardise(train)
    shares = knn_predict(
        standardise(train),
        targets,
        standardise(torch.from_numpy(features["test"][0])),
        k=NEIGHBOURS,
        num_classes=CLASSES,
    )
    return float((shares.argmax(1).numpy() == features["test"][1]).mean())


def knn_theirs(features: Features) -> float:
    scaler = StandardScaler().fit(features["train"][0])
    model = KNeighborsClassifier(
        NEIGHBOURS,
        metric="cosine",
        algorithm="brute",
        weights=lambda distances: np.exp((1 - distances) / TEMPERATURE),
    )
    model.fit(scaler.transform(features["train"][0]), features["train"][1])
    return model.score(scaler.transform(features["test"][0]), features["test"][1])


PROBES: dict[str, tuple[Callable[[Features], float], Callable[[Features], float]]] = {
    "linear probe": (linear_ours, linear_theirs),
    "nearest neighbours": (knn_ours, knn_theirs),
}


def _score(scores: dict[str, float], who: str, run: Callable[[Features], float], features: Features) -> None:
    scores[who] = run(features)


def measure(features: Features, rounds: int) -> list[Figure]:
    figures = []
    for name, (ours, theirs) in PROBES.items():
        scores: dict[str, float] = {}
        alternatives = {
            who: partial(_score, scores, who, run, features)
            for who, run in (("ours", ours), ("theirs", theirs))
        }
        seconds = in_turn(alternatives, rounds)
        figures += [
            Figure(name, statistics.median(seconds["ours"]), "s"),
            Figure(f"{name}: scikit-learn", statistics.median(seconds["theirs"]), "s"),
            Figure(
                f"{name}: times as fast",
                ratio(seconds["theirs"], seconds["ours"]),
                "x",
                at_least=TIMES_AS_FAST,
            ),
            Figure(f"{name}: accuracy", 100 * scores["ours"], "%"),
            Figure(f"{name}: accuracy of scikit-learn", 100 * scores["theirs"], "%"),
        ]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="2,000 samples of 64 features, to try it")
    given = parser.parse_args()
    if given.small:
        figures = measure(make(2000, 64, 500, val=500), 1)
    else:
        figures = measure(make(given.samples, given.width, given.queries), given.rounds)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
