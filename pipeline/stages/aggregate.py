"""Aggregate stage: every receipt and prediction of an experiment → tables, plots and a report. Needs no
torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from pipeline.evaluate.protocols import check_metric
from pipeline.report import bootstrap, markdown, plots, tables
from pipeline.report.load import Collected, collect
from pipeline.specs import AggregateSpec, ReportSettings
from pipeline.stages.work import Entry, Outcome, Work


def run(work: Work) -> Outcome:
    """Write results.csv, summary.csv, gains.csv, cost.csv, report.md and the plots into the task's folder.

    Tasks that failed or have not run are named in the tables' place; they never stop the others from being
    reported.
    """
    spec = AggregateSpec.model_validate(work.task.spec)
    settings, folder = spec.report, work.folder
    collected = _collect(work.everything, settings)
    work.progress(1, 4, "bootstrap")
    found = bootstrap.bootstrap(collected, settings)
    if found.damaged:
        collected = _collect([_failed(entry, found.damaged) for entry in work.everything], settings)
    work.progress(2, 4, "tables")
    summary = tables.summary_table(collected, found)
    gains = tables.gains_table(collected, found, settings)
    cost = tables.cost_table(collected, settings)
    for name, table in (
        ("results", collected.results),
        ("summary", summary),
        ("gains", gains),
        ("cost", cost),
    ):
        tables.write_csv(table, folder / f"{name}.csv")
    work.progress(3, 4, "plots")
    images = _plots(collected, summary, folder, settings.metric)
    report = markdown.render(spec.experiment, collected, summary, gains, cost, images, settings)
    (folder / "report.md").write_text(report)
    work.progress(4, 4, "done")
    return Outcome(metrics={"unfinished": [task.task for task in collected.unfinished]})


def _collect(entries: Sequence[Entry], settings: ReportSettings) -> Collected:
    collected = collect(entries)
    check_metric(settings.metric, multilabel="map" in collected.metrics, key="report.metric")
    return collected


def _failed(entry: Entry, damaged: Mapping[str, str]) -> Entry:
    """The entry, or, where its predictions are damaged, that of a failed task."""
    if entry.task.key not in damaged:
        return entry
    return replace(entry, receipt=None, error={"kind": "Damaged", "message": damaged[entry.task.key]})


def _plots(collected: Collected, summary: pd.DataFrame, folder: Path, metric: str) -> dict[str, list[Path]]:
    images: dict[str, list[Path]] = {}
    for dataset, rows in summary.groupby("dataset", sort=False):
        if (rows["n"] > 0).any():
            path = folder / f"{metric}_{dataset}.png"
            plots.plot_fractions(rows, path, metric=metric, methods=collected.methods)
            images.setdefault(str(dataset), []).append(path)
        path = folder / f"pretraining_{dataset}.png"
        runs = [run for run in collected.pretrainings if run.spec.dataset == dataset]
        if plots.plot_pretraining(runs, path):
            images.setdefault(str(dataset), []).append(path)
    return images


if __name__ == "__main__":
    from pipeline.stages.runner import main

    main("aggregate")
