"""From the manifest's tasks to rows: what was learned, what was trained, and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from pipeline.evaluate.protocols import ALL_METRICS, METRICS_OF, check_metric
from pipeline.methods.registry import METHODS
from pipeline.progress import warnings_of
from pipeline.report.unfinished import Unfinished, state_of, unfinished
from pipeline.specs import (
    Backbone,
    Dataset,
    FinetuneSpec,
    PretrainSpec,
    ReportSettings,
    SearchSpec,
    ShardSpec,
)
from pipeline.stages.work import Entry
from shards import Index

IDENTITY = ["dataset", "method", "backbone", "arch", "protocol", "fraction"]  # a row of summary.csv
RUN = ["repeat", "seed"]  # which of a cell's tasks a row of results.csv is
DRAWN = ["num_labels", "num_groups", "fraction_drawn"]  # what a fraction came to
PLACE = ["dataset", "arch", "protocol", "fraction"]  # where methods are compared, each with its own backbone


AnySpec = TypeVar("AnySpec", PretrainSpec, SearchSpec, FinetuneSpec)


@dataclass(frozen=True)
class Pretraining:
    """A finished pretraining, or a search before one: what it was, and where its log is."""

    spec: PretrainSpec
    folder: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TrainedNet:
    """A backbone as it is pretrained.

    Attributes:
        image_size: side of the images in pixels.
        params, gmac: what it costs (:mod:`pipeline.nets.cost`); None until a pretraining has said so.
    """

    backbone: Backbone
    image_size: int
    params: int | None
    gmac: float | None

    def is_same_net(self, other: TrainedNet) -> bool:
        """Whether it is built alike, whatever weights it starts from."""
        mine, theirs = self.backbone, other.backbone
        return (mine.name, mine.args) == (theirs.name, theirs.args)


@dataclass(frozen=True)
class Repeats:
    """The repeated splits of one data set that are there.

    Attributes:
        ratio: labelled groups (or images without one) in test over those in train, mean over the splits.
        units: all labelled groups of the data set.
        test_units: those that are in the test split of some repeat.
    """

    ratio: float
    units: int
    test_units: int


@dataclass(frozen=True)
class Collected:
    """Everything the tables are made of.

    Attributes:
        results: one row a fine-tune task, finished or not, in a fixed order.
        finished: task key → the finished fine-tune task.
        groups: data set → the group of every sample, in the order of samples.csv; None where it has no
            groups.
        repeats: data set → its splits, where it is split several times; its name is what they are pooled as.
        costs: one row a finished training or fine-tuning: stage, dataset, method, seed, images_seen,
            seconds, device, device_seconds, world_size, peak_memory_bytes.
        planned: (stage, data set, method) → how many tasks the manifest has of it.
        searches: the finished ones.
        backbones: (data set, method, architecture) → the net.
        methods: in the experiment's order.
        trained_methods: those of them that take training steps, the controls left out.
        metrics: the metric columns of ``results``: of every kind of labels among the data sets.
        compared: data set → the metric by which methods are compared on it.
        warnings: what finished tasks warn of → which tasks.
    """

    results: pd.DataFrame
    finished: dict[str, Entry]
    groups: dict[str, np.ndarray | None]
    repeats: dict[str, Repeats]
    costs: pd.DataFrame
    planned: Counter[tuple[str, str, str]]
    pretrainings: list[Pretraining]
    unfinished: list[Unfinished]
    searches: list[Pretraining]
    backbones: dict[tuple[str, str, str], TrainedNet]
    methods: list[str]
    trained_methods: list[str]
    metrics: tuple[str, ...]
    compared: dict[str, str]
    warnings: dict[str, list[str]]


def collect(entries: Sequence[Entry], *, metric: str) -> Collected:
    """Read the receipts of every task of a manifest.

    Args:
        entries: in plan order, finished or not.
        metric: the report's; data sets of other kinds are compared by the one that stands in for it.

    Raises:
        UserError: there is no such metric for the labels of a data set.
    """
    by_id = {entry.task.id: entry for entry in entries}
    groups, tasks = {}, {}
    places: dict[str, tuple[str, int]] = {}  # data set of a task → what it is pooled as, which repeat
    splits: dict[str, list[Path]] = {}
    for entry in entries:
        if entry.task.stage == "shard":
            sharded = ShardSpec.model_validate(entry.task.spec)
            data = sharded.dataset
            name = sharded.pooled or data.name
            places[data.name] = name, sharded.repeat
            if name not in tasks or entry.receipt is not None:
                tasks[name] = _labels_of(data, entry)
            if sharded.pooled:
                splits.setdefault(name, []).extend([entry.folder] if entry.receipt is not None else [])
            if entry.receipt is not None:
                groups[name] = sample_groups(entry.folder)

    def pooled(spec: AnySpec) -> AnySpec:
        name, _ = places.get(spec.dataset, (spec.dataset, 1))
        return spec.model_copy(update={"dataset": name})

    pretrainings, searches, costs, methods = [], [], [], []
    trained = set()
    backbones: dict[tuple[str, str, str], TrainedNet] = {}
    planned: Counter[tuple[str, str, str]] = Counter()
    for entry in entries:
        if entry.task.stage == "pretrain":
            spec = pooled(PretrainSpec.model_validate(entry.task.spec))
            methods.append(spec.label)
            if METHODS[spec.method].steps == "train":
                trained.add(spec.label)
            planned["pretrain", spec.dataset, spec.label] += 1
            if entry.receipt is not None:
                pretrainings.append(Pretraining(spec, entry.folder, entry.receipt.metrics))
                costs.append(_cost_row(entry, spec.dataset, spec.label, spec.seed))
            for arch, net in _trained_nets(spec, entry).items():
                place = spec.dataset, spec.label, arch
                if place not in backbones or net.params is not None:
                    backbones[place] = net
        elif entry.task.stage == "search":
            spec = pooled(SearchSpec.model_validate(entry.task.spec))
            planned["search", spec.dataset, spec.label] += 1
            if entry.receipt is not None:
                searches.append(Pretraining(spec, entry.folder, entry.receipt.metrics))
                costs.append(_cost_row(entry, spec.dataset, spec.label, spec.seed))
    rows, finished = [], {}
    for entry in entries:
        if entry.task.stage == "finetune":
            spec_ = FinetuneSpec.model_validate(entry.task.spec)
            _, repeat = places.get(spec_.dataset, ("", 1))
            spec_ = pooled(spec_)
            rows.append(_result_row(entry, spec_, by_id) | {"repeat": repeat})
            planned["finetune", spec_.dataset, spec_.label] += 1
            if entry.receipt is not None:
                finished[entry.task.key] = entry
                costs.append(_cost_row(entry, spec_.dataset, spec_.label, spec_.seed))
    metrics = tuple(name for name in ALL_METRICS if any(name in METRICS_OF[task] for task in tasks.values()))
    order = list(dict.fromkeys(methods))
    return Collected(
        results=_ordered(rows, metrics, order),
        finished=finished,
        groups=groups,
        repeats={name: _repeats(folders) for name, folders in splits.items()},
        costs=pd.DataFrame(costs, columns=list(_COST_COLUMNS)),
        planned=planned,
        pretrainings=pretrainings,
        unfinished=[unfinished(entry, by_id) for entry in entries if entry.receipt is None],
        searches=searches,
        backbones=backbones,
        methods=order,
        trained_methods=[method for method in order if method in trained],
        metrics=metrics,
        compared={
            name: _compared(metric, task, [row for row in rows if row["dataset"] == name])
            for name, task in tasks.items()
        },
        warnings=warnings_of((entry.task, entry.receipt) for entry in entries),
    )


def cells(results: pd.DataFrame) -> list[np.ndarray]:
    """The rows of ``results`` that make one row of summary.csv each: their positions, in order."""
    number = results.groupby(IDENTITY, sort=False).ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(order) else []


def compared_values(collected: Collected) -> np.ndarray:
    """float64, one a row of ``results``: the metric by which methods are compared on its data set."""
    results = collected.results
    values = np.full(len(results), np.nan)
    for dataset, metric in collected.compared.items():
        mine = (results["dataset"] == dataset).to_numpy()
        values[mine] = results[metric].to_numpy()[mine]
    return values


def pairs(collected: Collected, settings: ReportSettings) -> np.ndarray:
    """Rows of ``results`` whose difference is a gain: those of a method beside those of the baseline.

    They share data set, architecture, protocol, fraction, repeat and seed, and have the metric to compare
    both.

    Returns:
        int (P, 2): positions of the method's rows, in order, and of the baseline's.
    """
    results, keys = collected.results, [*PLACE, *RUN]
    rows = results[keys].assign(at=np.arange(len(results)))
    is_base = (results["method"] == settings.baseline).to_numpy()
    exists = ~np.isnan(compared_values(collected))
    both = rows[~is_base & exists].merge(rows[is_base & exists], on=keys, suffixes=("", "_base"))
    return both[["at", "at_base"]].to_numpy()


def _repeats(folders: Sequence[Path]) -> Repeats:
    """What is said of the splits in these shard folders, all of one data set."""
    tested: set[str] = set()
    units, ratios = 0, []
    for folder in folders:
        samples = Index.open(folder).samples
        samples = samples[samples["labelled"]]
        of = samples["group"].fillna("").astype(str).where(lambda name: name != "", "\0" + samples["path"])
        test, train = (set(of[samples["split"] == split]) for split in ("test", "train"))
        tested |= test
        units = max(units, of.nunique())
        ratios.append(len(test) / max(1, len(train)))
    return Repeats(float(np.mean(ratios)) if ratios else float("nan"), units, len(tested))


def sample_groups(folder: Path) -> np.ndarray | None:
    """The group (patient, slide) of every sample of a shard folder, or None where it has no groups."""
    groups = Index.open(folder).samples["group"].fillna("").astype(str).to_numpy(object)
    return groups if (groups != "").any() else None


def _labels_of(dataset: Dataset, entry: Entry) -> str:
    """Which labels a data set has, a key of ``METRICS_OF``: its shards say it, else its description."""
    said = None if entry.receipt is None else entry.receipt.metrics.get("task")
    return said or dataset.labels


def _compared(metric: str, task: str, rows: Sequence[dict[str, Any]]) -> str:
    """The metric that stands in for the report's on one data set: that of boxes where there are no masks.

    Args:
        rows: of this data set.
    """
    name = check_metric(metric, task=task, key="report.metric")
    boxes = name.replace("mask_", "box_")
    boxes_only = any(boxes in row for row in rows) and not any(name in row for row in rows)
    return boxes if boxes_only else name


def _trained_nets(spec: PretrainSpec, entry: Entry) -> dict[str, TrainedNet]:
    """Architecture → net, of one pretraining, finished or not."""
    counted = {} if entry.receipt is None else entry.receipt.metrics.get("backbones", {})
    return {
        arch: TrainedNet(
            backbone,
            spec.train.image_size,
            counted.get(arch, {}).get("params"),
            counted.get(arch, {}).get("gmac"),
        )
        for arch, backbone in spec.backbones.items()
    }


def _result_row(entry: Entry, spec: FinetuneSpec, by_id: dict[str, Entry]) -> dict[str, Any]:
    pretrain = next((by_id[need] for need in entry.task.needs if by_id[need].task.stage == "pretrain"), None)
    trained = pretrain.receipt if pretrain is not None else None
    row: dict[str, Any] = {
        "dataset": spec.dataset,
        "method": spec.label,
        "backbone": spec.backbone.name,
        "arch": spec.arch,
        "protocol": spec.protocol,
        "fraction": spec.fraction,
        "seed": spec.seed,
        "status": state_of(entry),
        "collapsed": None if trained is None else trained.metrics.get("collapsed", {}).get(spec.arch),
        "task_key": entry.task.key,
        "pretrain_key": "" if pretrain is None else pretrain.task.key,
    }
    if entry.receipt is not None:
        row |= {name: entry.receipt.metrics[name] for name in ("num_labels", "num_val")}
        row |= {name: entry.receipt.metrics.get(name) for name in ("num_groups", "fraction_drawn")}
        row["steps_capped"] = entry.receipt.metrics.get("steps_capped")
        row |= entry.receipt.metrics["test"]
        row |= {f"val_{name}": value for name, value in entry.receipt.metrics["val"].items()}
    return row


def _ordered(rows: list[dict[str, Any]], metrics: tuple[str, ...], methods: list[str]) -> pd.DataFrame:
    """The rows as a frame whose order depends on the experiment alone."""
    validation = [f"val_{metric}" for metric in metrics]
    columns = [*IDENTITY, *DRAWN, "num_val", *RUN, "status", *metrics, *validation, "collapsed"]
    columns += ["steps_capped", "task_key", "pretrain_key"]
    frame = pd.DataFrame(rows, columns=columns)
    for count in ("num_labels", "num_groups", "num_val"):
        frame[count] = frame[count].astype("Int64")
    frame["fraction_drawn"] = frame["fraction_drawn"].astype("float64")
    for flag in ("collapsed", "steps_capped"):
        frame[flag] = frame[flag].astype("boolean")
    for metric in (*metrics, *validation):
        frame[metric] = frame[metric].astype("float64")
    place = {method: position for position, method in enumerate(methods)}
    return frame.sort_values(
        [*IDENTITY, *RUN],
        key=lambda column: (
            column.map(lambda name: place.get(name, len(place))) if column.name == "method" else column
        ),
        kind="stable",
        ignore_index=True,
    )


_COST_COLUMNS = (
    "stage",
    "dataset",
    "method",
    "seed",
    "images_seen",
    "seconds",
    "device",
    "device_seconds",
    "world_size",
    "peak_memory_bytes",
)


def _cost_row(entry: Entry, dataset: str, method: str, seed: int) -> dict[str, Any]:
    receipt = entry.receipt
    assert receipt is not None
    measured = {name: getattr(receipt, name) for name in _COST_COLUMNS[4:]}
    return {"stage": entry.task.stage, "dataset": dataset, "method": method, "seed": seed, **measured}
