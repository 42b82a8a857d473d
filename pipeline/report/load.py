"""From the manifest's tasks to rows: what was learned, what was trained, and what is not there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluate.protocols import METRICS, MULTILABEL_METRICS
from pipeline.specs import FinetuneSpec, PretrainSpec, ReportSettings, ShardSpec
from pipeline.stages.work import Entry
from shards import Index

IDENTITY = ["dataset", "method", "backbone", "arch", "protocol", "fraction"]  # a row of summary.csv
PLACE = [name for name in IDENTITY if name != "method"]  # where methods are compared


@dataclass(frozen=True)
class Unfinished:
    """A task without a result, and why.

    Attributes:
        state: ``failed``, or ``missing`` where it never ran to its end.
        reason: one line.
        log: the file its job wrote to, where it is known.
        last_line: of that file.
    """

    task: str
    state: str
    reason: str
    log: str | None = None
    last_line: str | None = None


@dataclass(frozen=True)
class Pretraining:
    """A finished pretraining: what it was, and where its log is."""

    spec: PretrainSpec
    folder: Path
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Collected:
    """Everything the tables are made of.

    Attributes:
        results: one row a fine-tune task, finished or not, in a fixed order.
        finished: task key → the finished fine-tune task.
        groups: data set → the group of every sample, in the order of samples.csv; None where it has no
            groups.
        costs: one row a finished pretrain or fine-tune task: stage, dataset, method, images_seen, seconds,
            device, device_seconds, world_size, peak_memory_bytes.
        planned: (stage, data set, method) → how many tasks the manifest has of it.
        methods: in the experiment's order.
        metrics: the metric columns of ``results``.
    """

    results: pd.DataFrame
    finished: dict[str, Entry]
    groups: dict[str, np.ndarray | None]
    costs: pd.DataFrame
    planned: Counter[tuple[str, str, str]]
    pretrainings: list[Pretraining]
    unfinished: list[Unfinished]
    methods: list[str]
    metrics: tuple[str, ...]


def collect(entries: Sequence[Entry]) -> Collected:
    """Read the receipts of every task of a manifest.

    Args:
        entries: in plan order, finished or not.
    """
    by_id = {entry.task.id: entry for entry in entries}
    groups = {
        ShardSpec.model_validate(entry.task.spec).dataset.name: sample_groups(entry.folder)
        for entry in entries
        if entry.task.stage == "shard" and entry.receipt is not None
    }
    pretrainings, costs, methods = [], [], []
    planned: Counter[tuple[str, str, str]] = Counter()
    for entry in entries:
        if entry.task.stage == "pretrain":
            spec = PretrainSpec.model_validate(entry.task.spec)
            methods.append(spec.label)
            planned["pretrain", spec.dataset, spec.label] += 1
            if entry.receipt is not None:
                pretrainings.append(Pretraining(spec, entry.folder, entry.receipt.metrics))
                costs.append(_cost_row(entry, spec.dataset, spec.label))
    rows, finished = [], {}
    for entry in entries:
        if entry.task.stage == "finetune":
            spec_ = FinetuneSpec.model_validate(entry.task.spec)
            rows.append(_result_row(entry, spec_, by_id))
            planned["finetune", spec_.dataset, spec_.label] += 1
            if entry.receipt is not None:
                finished[entry.task.key] = entry
                costs.append(_cost_row(entry, spec_.dataset, spec_.label))
    metrics = MULTILABEL_METRICS if any("map" in row for row in rows) else METRICS
    order = list(dict.fromkeys(methods))
    return Collected(
        results=_ordered(rows, metrics, order),
        finished=finished,
        groups=groups,
        costs=pd.DataFrame(costs, columns=list(_COST_COLUMNS)),
        planned=planned,
        pretrainings=pretrainings,
        unfinished=[_unfinished(entry, by_id) for entry in entries if entry.receipt is None],
        methods=order,
        metrics=metrics,
    )


def cells(results: pd.DataFrame) -> list[np.ndarray]:
    """The rows of ``results`` that make one row of summary.csv each: their positions, in order."""
    number = results.groupby(IDENTITY, sort=False).ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(number[order])) + 1) if len(order) else []


def pairs(results: pd.DataFrame, settings: ReportSettings) -> np.ndarray:
    """Rows of ``results`` whose difference is a gain: those of a method beside those of the baseline.

    They share everything but the method, and have the report's metric both.

    Returns:
        int (P, 2): positions of the method's rows, in order, and of the baseline's.
    """
    keys = [*PLACE, "seed"]
    rows = results[keys].assign(at=np.arange(len(results)))
    is_base, exists = results["method"] == settings.baseline, results[settings.metric].notna()
    both = rows[~is_base & exists].merge(rows[is_base & exists], on=keys, suffixes=("", "_base"))
    return both[["at", "at_base"]].to_numpy()


def sample_groups(folder: Path) -> np.ndarray | None:
    """The group (patient, slide) of every sample of a shard folder, or None where it has no groups."""
    groups = Index.open(folder).samples["group"].fillna("").astype(str).to_numpy(object)
    return groups if (groups != "").any() else None


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
        "status": "done" if entry.receipt is not None else _state(entry),
        "collapsed": None if trained is None else trained.metrics.get("collapsed", {}).get(spec.arch),
        "task_key": entry.task.key,
        "pretrain_key": "" if pretrain is None else pretrain.task.key,
    }
    if entry.receipt is not None:
        row["num_labels"] = entry.receipt.metrics["num_labels"]
        row |= entry.receipt.metrics["test"]
    return row


def _ordered(rows: list[dict[str, Any]], metrics: tuple[str, ...], methods: list[str]) -> pd.DataFrame:
    """The rows as a frame whose order depends on the experiment alone."""
    columns = [*IDENTITY, "num_labels", "seed", "status", *metrics, "collapsed", "task_key", "pretrain_key"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["num_labels"] = frame["num_labels"].astype("Int64")
    frame["collapsed"] = frame["collapsed"].astype("boolean")
    for metric in metrics:
        frame[metric] = frame[metric].astype("float64")
    place = {method: position for position, method in enumerate(methods)}
    return frame.sort_values(
        [*IDENTITY, "seed"],
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
    "images_seen",
    "seconds",
    "device",
    "device_seconds",
    "world_size",
    "peak_memory_bytes",
)


def _cost_row(entry: Entry, dataset: str, method: str) -> dict[str, Any]:
    receipt = entry.receipt
    assert receipt is not None
    measured = {name: getattr(receipt, name) for name in _COST_COLUMNS[3:]}
    return {"stage": entry.task.stage, "dataset": dataset, "method": method, **measured}


def _state(entry: Entry) -> str:
    return "failed" if entry.error is not None else "missing"


def _unfinished(entry: Entry, by_id: dict[str, Entry]) -> Unfinished:
    error = entry.error
    if error is None:
        open_needs = [need for need in entry.task.needs if by_id[need].receipt is None]
        reason = f"waits for {', '.join(open_needs)}" if open_needs else "not run, or still running"
        return Unfinished(entry.task.id, "missing", reason)
    message = " ".join(str(error.get("message") or "no message").split())
    kind = "" if error.get("user_error") or not error.get("kind") else f"{error['kind']}: "
    log = error.get("log")
    trace = error.get("traceback") or []
    last = _last_line(Path(log)) if log else None
    return Unfinished(
        entry.task.id, "failed", kind + message, log, last or (trace[-1].strip() if trace else None)
    )


def _last_line(path: Path, tail: int = 8192) -> str | None:
    """The last line of a log that is not blank; None where the log cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tail))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
