"""Metrics of a kept model on a test set, with intervals: those of the tables, and at validation's thresholds.

Nothing is computed here that the tables compute: values come from :mod:`pipeline.evaluate.metrics`, resamples
from :mod:`pipeline.report.weighted`, intervals from :mod:`pipeline.report.statistics`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluate.metrics import evaluate
from pipeline.evaluate.protocols import METRICS_OF
from pipeline.report.bootstrap import SEED, WEIGHTS
from pipeline.report.predictions import Classified
from pipeline.report.statistics import interval_of_mean, number_of_groups, resample_weights
from pipeline.report.weighted import Resamples
from pipeline.specs import ReportSettings


@dataclass(frozen=True)
class Score:
    """One number with its interval.

    Attributes:
        of: the class that it is of; "" for all.
        threshold: of that class's score; None where none is used.
        low, high: NaN where there are too few groups, or it does not exist.
        groups, images: that it rests on: of sensitivity those with the class, of specificity those without.
    """

    metric: str
    of: str
    threshold: float | None
    value: float
    low: float
    high: float
    groups: int
    images: int


class Scorer:
    """A test set under the resamples that the tables' intervals are made with.

    Args:
        targets: int (N,), or 0 and 1 (N, K).
        groups: a name an image, "" for one that is a group of its own; None: all are.
        classes: K names.
        settings: of the experiment's report: resamples and confidence.
    """

    def __init__(
        self,
        targets: np.ndarray,
        groups: Sequence[str] | None,
        *,
        classes: Sequence[str],
        settings: ReportSettings,
    ) -> None:
        self.targets, self.classes, self._confidence = targets, list(classes), settings.confidence
        self._groups, self._draws = groups, settings.bootstrap
        self.units = number_of_groups(groups, len(targets))
        self._parts: list[Resamples] = []

    def scores(self, probabilities: np.ndarray, thresholds: Sequence[float] = ()) -> Iterator[Score]:
        """Every metric of the tables, and for each threshold its class's sensitivity and specificity.

        Args:
            probabilities: (N, K).
            thresholds: K of them, or none.
        """
        whole = Classified(probabilities, self.targets, np.arange(len(self.targets)))
        values = evaluate(probabilities, self.targets)
        names = METRICS_OF["multilabel" if self.targets.ndim == 2 else "multiclass"]
        if not self._parts:
            self._parts = [Resamples(whole, weights) for weights in self._weights()]
        every = np.ones(len(self.targets), bool)
        drawn = [part.metrics(names, [whole]) for part in self._parts]
        for name in names:
            resampled = np.concatenate([part[name][0] for part in drawn])
            yield self._score(name, "", None, values[name], resampled, every)
        for k, threshold in enumerate(thresholds):
            positive = self.targets[:, k] > 0 if self.targets.ndim == 2 else self.targets == k
            above = probabilities[:, k] > threshold
            for name, right, of in (
                ("sensitivity", above & positive, positive),
                ("specificity", ~above & ~positive, ~positive),
            ):
                whole_share = _share(np.ones((1, len(of)), np.float32), right, of)[0]
                resampled = np.concatenate([_share(weights, right, of) for weights in self._weights()])
                yield self._score(name, self.classes[k], threshold, whole_share, resampled, of)

    def _weights(self) -> Iterator[np.ndarray]:
        """The resamples (B, N), some at a time, as :mod:`pipeline.report.bootstrap` draws them."""
        count = len(self.targets)
        at_once = max(1, WEIGHTS // count)
        for number, start in enumerate(range(0, self._draws, at_once)):
            size = min(at_once, self._draws - start)
            yield resample_weights(self._groups, count=count, draws=size, seed=SEED + number)

    def _score(
        self,
        name: str,
        of: str,
        threshold: float | None,
        value: float,
        resampled: np.ndarray,
        counted: np.ndarray,
    ) -> Score:
        """A score with its interval, whose width goes by the groups of the images that are counted, (N,)."""
        existing = resampled[~np.isnan(resampled)]
        variance = float(existing.var(ddof=1)) if len(existing) > 1 else float("nan")
        images = int(counted.sum())
        named = None if self._groups is None else [g for g, there in zip(self._groups, counted) if there]
        units = number_of_groups(named, images)
        low, high = interval_of_mean(float(value), variance, units=units, confidence=self._confidence)
        return Score(name, of, threshold, float(value), low, high, units, images)


def _share(weights: np.ndarray, right: np.ndarray, of: np.ndarray) -> np.ndarray:
    """(B,) the share of some samples that is right under each row of weights (B, N); NaN of none."""
    hits, total = (weights @ part.astype(np.float32) for part in (right, of))
    return np.divide(hits, total, out=np.full(len(weights), np.nan), where=total > 0, dtype=np.float64)
