"""Which fine-tuned models are kept: of the seeds of a cell the best by validation. Imports no torch."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from pipeline.evaluate.protocols import check_metric
from pipeline.manifest import Receipt
from pipeline.report.load import IDENTITY
from pipeline.specs import FinetuneSpec
from pipeline.stages.work import MODEL, Entry

COLUMNS = [*IDENTITY, "seed", "metric", "val", "test", "model"]
CLAIM = ".kept-by-"  # a file of this name and an experiment's in a model's folder: that experiment keeps it


def validation_score(spec: FinetuneSpec, receipt: Receipt) -> float:
    """The validation metric that picked a model's epoch or weight decay; -inf where there is none."""
    return float(receipt.metrics["val"].get(selecting_metric(spec, receipt), -math.inf))


def selecting_metric(spec: FinetuneSpec, receipt: Receipt) -> str:
    """The metric that ``select_by`` means for the labels of a fine-tuning."""
    metrics = receipt.metrics["val"]
    kinds = {"miou": "segmentation", "box_ap": "detection", "map": "multilabel"}
    task = next((kind for name, kind in kinds.items() if name in metrics), "multiclass")
    return check_metric(spec.settings.select_by, task=task, key="select_by")


def best_of_seeds(entries: Iterable[Entry]) -> list[tuple[Entry, FinetuneSpec]]:
    """Of each cell's finished fine-tunings the best by validation; of equal ones the first."""
    best: dict[tuple, tuple[float, Entry, FinetuneSpec]] = {}
    for entry in entries:
        if entry.task.stage != "finetune" or entry.receipt is None:
            continue
        spec = FinetuneSpec.model_validate(entry.task.spec)
        cell = spec.dataset, spec.label, spec.arch, spec.protocol, spec.fraction
        score = validation_score(spec, entry.receipt)
        if cell not in best or score > best[cell][0]:
            best[cell] = score, entry, spec
    return [(entry, spec) for _, entry, spec in best.values()]


def models_table(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row a cell: its best seed by validation, and where its model is below the store."""
    rows = []
    for entry, spec in best_of_seeds(entries):
        receipt = entry.receipt
        assert receipt is not None
        metric = selecting_metric(spec, receipt)
        there = "model" in receipt.metrics and (entry.folder / MODEL).is_dir()
        identity = (spec.dataset, spec.label, spec.backbone.name, spec.arch, spec.protocol, spec.fraction)
        row: dict[str, Any] = dict(zip(IDENTITY, identity, strict=True)) | {
            "seed": spec.seed,
            "metric": metric,
        }
        row |= {split: receipt.metrics[split].get(metric) for split in ("val", "test")}
        rows.append(row | {"model": f"{entry.task.folder}/{MODEL}" if there else ""})
    return pd.DataFrame(rows, columns=COLUMNS)


def keep_best(entries: Sequence[Entry], *, experiment: str) -> None:
    """Remove the models that are not the best of their cell, but for those that another experiment keeps.

    What cannot be removed (a store of someone else) stays. Experiments of one name count as one.
    """
    best = {entry.task.key for entry, _ in best_of_seeds(entries)}
    for entry in entries:
        folder = entry.folder / MODEL
        if entry.task.stage != "finetune" or entry.receipt is None or not folder.is_dir():
            continue
        spec = FinetuneSpec.model_validate(entry.task.spec)
        claim = folder / f"{CLAIM}{experiment}"
        with contextlib.suppress(OSError):
            if entry.task.key in best or spec.settings.keep == "all":
                claim.touch()
                continue
            claim.unlink(missing_ok=True)
            if not any(folder.glob(f"{CLAIM}*")):
                shutil.rmtree(folder)
