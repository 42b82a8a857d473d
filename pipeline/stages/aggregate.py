"""Aggregate stage: every receipt and prediction of an experiment → tables, plots and a report. Needs no
torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.evaluate.protocols import check_metric
from pipeline.garbage import no_garbage_collection
from pipeline.report import bootstrap, markdown, plots, tables
from pipeline.report.load import Collected, collect
from pipeline.report.parallel import in_parallel
from pipeline.specs import AggregateSpec, ReportSettings
from pipeline.stages.work import Entry, Outcome, Work


@no_garbage_collection()
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
    work.progress(3, 4, "files")
    named = {"results": collected.results, "summary": summary, "gains": gains, "cost": cost}
    drawings = _drawings(collected, summary, folder, settings.metric)
    makers: list[Callable[[], Any]] = [make for _, _, make in drawings]
    makers += [partial(tables.write_csv, table, folder / f"{name}.csv") for name, table in named.items()]
    made = in_parallel(lambda make: make(), makers)
    images: dict[str, list[Path]] = {}
    for (dataset, path, _), drawn in zip(drawings, made):
        if drawn:
            images.setdefault(dataset, []).append(path)
    report = markdown.render(spec.experiment, collected, summary, gains, cost, images, settings)
    (folder / "report.md").write_text(report)
    work.progress(4, 4, "done")
    return Outcome(metrics={"unfinished": [task.task for task in collected.unfinished]})


def _collect(entries: Sequence[Entry], settings: ReportSettings) -> Collected:
    collected = collect(entries)
    check_metric(
        settings.metric,
        task="multilabel" if "map" in collected.metrics else "multiclass",
        key="report.metric",
    )
    return collected


def _failed(entry: Entry, damaged: Mapping[str, str]) -> Entry:
    """The entry, or, where its predictions are damaged, that of a failed task."""
    if entry.task.key not in damaged:
        return entry
    return replace(entry, receipt=None, error={"kind": "Damaged", "message": damaged[entry.task.key]})


def _drawings(
    collected: Collected, summary: pd.DataFrame, folder: Path, metric: str
) -> list[tuple[str, Path, Callable[[], bool]]]:
    """Data set, image and what draws it; that returns whether there was anything to draw."""
    drawings: list[tuple[str, Path, Callable[[], bool]]] = []
    for dataset, rows in summary.groupby("dataset", sort=False):
        if (rows["n"] > 0).any():
            path = folder / f"{metric}_{dataset}.png"
            draw = partial(plots.plot_fractions, rows, path, metric=metric, methods=collected.methods)
            drawings.append((str(dataset), path, draw))
        path = folder / f"pretraining_{dataset}.png"
        runs = [run for run in collected.pretrainings if run.spec.dataset == dataset]
        drawings.append((str(dataset), path, partial(plots.plot_pretraining, runs, path)))
    return drawings


if __name__ == "__main__":
    from pipeline.stages.runner import main

    main("aggregate")
