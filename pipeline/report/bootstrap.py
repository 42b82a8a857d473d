"""Every finished task's metrics under the same resamples of its test split. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.evaluate.protocols import METRICS, MULTILABEL_METRICS
from pipeline.report.load import Collected
from pipeline.report.statistics import resample_weights
from pipeline.report.weighted import weighted_metrics

SEED = 0  # of the resamples: the tables of one experiment never differ between two runs
CELLS = 20_000_000  # weights in memory at a time: draws are dealt out in parts on large test splits

Draws = dict[str, dict[str, np.ndarray]]  # task key → metric → (B,) values


def bootstrap(collected: Collected, *, draws: int) -> Draws:
    """Resample the test split of each data set, the same way for every task, so that differences are paired.

    Args:
        draws: number of resamples.

    Returns:
        Task key → metric → float64 (draws,).
    """
    found: Draws = {}
    done = collected.results[collected.results["status"] == "done"]
    for dataset, rows in done.groupby("dataset", sort=False):
        found |= _of_dataset(collected, rows, collected.groups.get(str(dataset)), draws)
    return found


def _of_dataset(collected: Collected, rows: pd.DataFrame, groups: np.ndarray | None, draws: int) -> Draws:
    keys = list(rows["task_key"])
    samples = read_predictions(collected.folders[keys[0]])[2]
    named = None if groups is None else list(groups[samples])
    parts: dict[str, list[dict[str, np.ndarray]]] = {key: [] for key in keys}
    at_once = max(1, CELLS // len(samples))
    for number, start in enumerate(range(0, draws, at_once)):
        size = min(at_once, draws - start)
        weights = resample_weights(named, count=len(samples), draws=size, seed=SEED + number)
        for key in keys:
            probabilities, targets, own = read_predictions(collected.folders[key])
            assert np.array_equal(own, samples)  # one data set, one test split
            names = MULTILABEL_METRICS if targets.ndim == 2 else METRICS
            parts[key].append(weighted_metrics(names, probabilities, targets, weights))
    return {
        key: {name: np.concatenate([part[name] for part in some]) for name in some[0]}
        for key, some in parts.items()
    }


def read_predictions(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (N, K), targets and rows of samples.csv of one fine-tune task."""
    with np.load(folder / "predictions.npz") as stored:
        return stored["probabilities"], stored["targets"], stored["rows"]
