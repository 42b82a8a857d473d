"""Aggregate stage: every receipt and prediction of an experiment → tables, plots and a report. Needs no
torch."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports: a mistake or an installation that cannot work is one line
    from pipeline.stages.command import main

    main("aggregate")

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import printable
from pipeline.files import write_atomically
from pipeline.garbage import no_garbage_collection
from pipeline.report import bootstrap, costs, markdown, models, plots, tables
from pipeline.report.load import Collected, collect
from pipeline.report.parallel import in_parallel
from pipeline.specs import AggregateSpec
from pipeline.stages.work import Entry, Outcome, Work


@no_garbage_collection()
def run(work: Work) -> Outcome:
    """Write the CSV tables, report.md and the plots into the task's folder (docs/tables.md).

    Tasks that failed or have not run are named in the tables' place; they never stop the others from being
    reported.
    """
    spec = AggregateSpec.model_validate(work.task.spec)
    settings, folder = spec.report, work.folder
    collected = collect(work.everything, metric=settings.metric)
    work.progress(1, 4, "bootstrap")
    found = bootstrap.bootstrap(collected, settings)
    if found.damaged:
        sound = [_failed(entry, found.damaged) for entry in work.everything]
        collected = collect(sound, metric=settings.metric)
    work.progress(2, 4, "tables")
    named = {
        "results": collected.results,
        "summary": tables.summary_table(collected, found, settings),
        "gains": tables.gains_table(collected, found, settings),
        "cost": costs.cost_table(collected, settings),
        "backbones": costs.backbone_table(collected),
        "models": models.models_table(work.everything),
    }
    if any(stage == "search" for stage, _, _ in collected.planned):
        named["search"] = tables.search_table(collected)
    gaps = tables.validation_gaps(collected, named["summary"], found)
    for line in gaps:
        print(f"warning: {line}", flush=True)
    collected.warnings.update({line: [work.task.id] for line in gaps})
    work.progress(3, 4, "files")
    drawings = _drawings(collected, named["summary"], folder)
    makers: list[Callable[[], Any]] = [make for _, _, make in drawings]
    makers += [partial(tables.write_csv, table, folder / f"{name}.csv") for name, table in named.items()]
    made = in_parallel(lambda make: make(), makers)
    images: dict[str, list[Path]] = {}
    for (dataset, path, _), drawn in zip(drawings, made):
        if drawn:
            images.setdefault(dataset, []).append(path)
    report = markdown.render(spec.experiment, collected, named, images, settings)
    write_atomically(folder / "report.md", printable(report).encode(), sync=False)
    models.keep_best(work.everything, experiment=spec.experiment)
    work.progress(4, 4, "done")
    return Outcome(metrics={"unfinished": [task.task for task in collected.unfinished], "warnings": gaps})


def _failed(entry: Entry, damaged: Mapping[str, str]) -> Entry:
    """The entry, or, where its predictions are damaged, that of a failed task."""
    if entry.task.key not in damaged:
        return entry
    return replace(entry, receipt=None, error={"kind": "Damaged", "message": damaged[entry.task.key]})


def _drawings(
    collected: Collected, summary: pd.DataFrame, folder: Path
) -> list[tuple[str, Path, Callable[[], bool]]]:
    """Data set, image and what draws it; that returns whether there was anything to draw."""
    drawings: list[tuple[str, Path, Callable[[], bool]]] = []
    for dataset, rows in summary.groupby("dataset", sort=False):
        metric = collected.compared[str(dataset)]
        if (rows["n"] > 0).any():
            path = folder / f"{metric}_{dataset}.png"
            draw = partial(plots.plot_fractions, rows, path, metric=metric, methods=collected.methods)
            drawings.append((str(dataset), path, draw))
        path = folder / f"pretraining_{dataset}.png"
        runs = [run for run in collected.pretrainings if run.spec.dataset == dataset]
        drawings.append((str(dataset), path, partial(plots.plot_pretraining, runs, path)))
    return drawings
