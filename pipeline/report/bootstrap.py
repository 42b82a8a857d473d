"""Variances from resamples of each test split, the same for every task of a data set. Imports no torch.

Predictions are read once, and checked as they are read; their values on the resamples are kept only until
their row of the tables is done. So memory grows with the size of a test split, not with the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.manifest import Damaged
from pipeline.report.load import PLACE, Collected, cells, pairs
from pipeline.report.parallel import in_parallel, workers
from pipeline.report.predictions import Classified, Detected, Prediction, Segmented, read_prediction
from pipeline.report.statistics import number_of_groups, resample_weights
from pipeline.report.weighted import Resamples
from pipeline.report.weighted_detection import DetectionResamples
from pipeline.report.weighted_segmentation import SegmentationResamples
from pipeline.specs import ReportSettings

SEED = 0  # of the resamples: the tables of one experiment never differ between two runs
WEIGHTS = 20_000_000  # made at a time: draws are dealt out in parts on large test splits
TASKS_A_PROCESS = 1000  # below, a process costs more than it saves
VALUES = 2_000_000  # tasks × classes × draws (or a task's predictions) that are computed at a time
_RESAMPLES: dict[type, Any] = {
    Classified: Resamples,
    Segmented: SegmentationResamples,
    Detected: DetectionResamples,
}


@dataclass(frozen=True)
class Bootstrap:
    """How much means over seeds vary with the test samples, NaN where there is nothing.

    Attributes:
        metrics: metric → (cells,) variances, one for each of :func:`pipeline.report.load.cells`.
        gains: (cells,) variances of the compared metric's gain over the baseline's.
        each_gain: (cells,) the mean over seeds of the variance of each one's gain.
        units: data set → the groups of its test split, or images where there are none; of repeated splits,
            those in the test split of any.
        damaged: task key → what is wrong with its predictions, which are in no interval.
    """

    metrics: dict[str, np.ndarray]
    gains: np.ndarray
    each_gain: np.ndarray
    units: dict[str, int]
    damaged: dict[str, str]


def bootstrap(collected: Collected, settings: ReportSettings) -> Bootstrap:
    """Resample each data set's test split, the same way for every task, so that differences are paired."""
    run = _Run(collected, settings)
    datasets = collected.results["dataset"].to_numpy()
    parts: list[tuple[str, list[list[int]]]] = []  # data set, some of its places
    for dataset in dict.fromkeys(datasets):
        if dataset in collected.repeats:  # whose splits are compared with each other instead
            run.check(np.flatnonzero(datasets == dataset))
            run.found.units[dataset] = collected.repeats[dataset].test_units
            continue
        places = run.places(datasets == dataset)
        number = max(1, min(workers(), int((datasets == dataset).sum()) // TASKS_A_PROCESS))
        parts += [(dataset, places[start::number]) for start in range(number)]

    def fill(part: tuple[str, list[list[int]]]) -> Bootstrap:
        dataset, places = part
        split = _Split(collected.groups.get(dataset), settings.bootstrap)
        for place in places:
            run.fill(dataset, place, split)
        return run.found

    worth_it = len(parts) > len(set(datasets))
    several = in_parallel(fill, parts) if worth_it else map(fill, parts)
    for (_, places), found in zip(parts, several, strict=True):
        run.take(places, found)
    return run.found


class _Run:
    def __init__(self, collected: Collected, settings: ReportSettings) -> None:
        results = collected.results
        self._compared = collected.compared
        self._cells = cells(results)
        self._entries = [collected.finished.get(key) for key in results["task_key"]]
        self._places = results.groupby(PLACE, sort=False).ngroup().to_numpy()
        self._is_base = (results["method"] == settings.baseline).to_numpy()
        self._base_of = dict(pairs(collected, settings).tolist())
        empty = {name: np.full(len(self._cells), np.nan) for name in (*collected.metrics, "gain", "each")}
        gains, each = empty.pop("gain"), empty.pop("each")
        self.found = Bootstrap(metrics=empty, gains=gains, each_gain=each, units={}, damaged={})

    def places(self, chosen: np.ndarray) -> list[list[int]]:
        """The cells among the chosen rows that are compared with each other, that of the baseline first."""
        places: dict[int, list[int]] = {}
        for cell, rows in enumerate(self._cells):
            if chosen[rows[0]]:
                places.setdefault(self._places[rows[0]], []).append(cell)
        first = {cell: not self._is_base[self._cells[cell][0]] for place in places.values() for cell in place}
        return [sorted(place, key=first.__getitem__) for place in places.values()]

    def fill(self, dataset: str, place: list[int], split: _Split) -> None:
        """Compute the intervals of a place's cells, some cells at a time."""
        metric = self._compared[dataset]
        of_base: dict[int, np.ndarray] = {}  # row → (B,) that metric of the baseline
        while place:
            sizes = np.cumsum([len(self._cells[cell]) for cell in place])
            number = max(1, int((sizes <= split.tasks_at_once).sum()))
            some, place = place[:number], place[number:]
            rows = np.concatenate([self._cells[cell] for cell in some]).tolist()
            read, predictions = self._read(rows)
            drawn = split.metrics(predictions)
            at = {row: position for position, row in enumerate(read)}
            for cell in some:
                mine = [row for row in self._cells[cell].tolist() if row in at]
                for name in drawn.keys() & self.found.metrics.keys() if mine else ():
                    average = drawn[name][[at[row] for row in mine]].mean(axis=0)
                    self.found.metrics[name][cell] = _variance(average)
                if self._is_base[self._cells[cell][0]] and metric in drawn:
                    of_base |= {row: drawn[metric][at[row]] for row in mine}
                paired = [row for row in mine if self._base_of.get(row) in of_base]
                if paired:
                    base = np.stack([of_base[self._base_of[row]] for row in paired])
                    gains = drawn[metric][[at[row] for row in paired]] - base
                    self.found.gains[cell] = _variance(gains.mean(axis=0))
                    self.found.each_gain[cell] = np.mean([_variance(one) for one in gains])
            if split.units:
                self.found.units[dataset] = split.units

    def check(self, rows: np.ndarray) -> None:
        """Note which of these rows' predictions are damaged."""
        for row in rows.tolist():
            self._read([row])

    def take(self, places: Sequence[Sequence[int]], found: Bootstrap) -> None:
        """Take over what another process has found for these places."""
        theirs = [cell for place in places for cell in place]
        for name, variances in self.found.metrics.items():
            variances[theirs] = found.metrics[name][theirs]
        self.found.gains[theirs] = found.gains[theirs]
        self.found.each_gain[theirs] = found.each_gain[theirs]
        self.found.units.update(found.units)
        self.found.damaged.update(found.damaged)

    def _read(self, rows: Sequence[int]) -> tuple[list[int], list[Prediction]]:
        """Of the rows those with sound predictions, and these; the others' damage is noted."""
        read, predictions = [], []
        for row in rows:
            entry = self._entries[row]
            if entry is None:
                continue
            try:
                predictions.append(read_prediction(entry))
                read.append(row)
            except Damaged as error:
                self.found.damaged[entry.task.key] = str(error)
        return read, predictions


def _variance(values: np.ndarray) -> float:
    """Of bootstrap values; NaN where fewer than two resamples have one."""
    values = values[~np.isnan(values)]
    return float(values.var(ddof=1)) if len(values) > 1 else float("nan")


class _Split:
    """A data set's test split under every resample; made of the first predictions that are read."""

    def __init__(self, groups: np.ndarray | None, draws: int) -> None:
        self._groups, self._draws = groups, draws
        self._samples = self._truth = np.empty(0)
        self._parts: list[Resamples | SegmentationResamples | DetectionResamples] = []
        self.tasks_at_once = 1
        self.units = 0  # groups, once the first predictions have been read

    def metrics(self, predictions: Sequence[Any]) -> dict[str, np.ndarray]:
        """Metric → float64 (T, B) of T predictions of one kind; nothing of none."""
        if not predictions:
            return {}
        if not self._parts:
            self._resample(predictions[0])
        for prediction in predictions:  # one data set, one test split
            assert np.array_equal(prediction.rows, self._samples)
            assert np.array_equal(prediction.truth, self._truth)
        names = predictions[0].metrics
        parts = [part.metrics(names, predictions) for part in self._parts]
        return {name: np.concatenate([part[name] for part in parts], axis=1) for name in names}

    def _resample(self, first: Prediction) -> None:
        self._samples, self._truth = first.rows, first.truth
        named = None if self._groups is None else list(self._groups[first.rows])
        count = len(first.rows)
        self.units = number_of_groups(named, count)
        at_once = max(1, WEIGHTS // count)
        for number, start in enumerate(range(0, self._draws, at_once)):
            size = min(at_once, self._draws - start)
            weights = resample_weights(named, count=count, draws=size, seed=SEED + number)
            self._parts.append(_RESAMPLES[type(first)](first, weights))
        self.tasks_at_once = max(1, VALUES // max(first.values, first.classes * self._draws))
