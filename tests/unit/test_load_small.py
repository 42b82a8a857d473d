"""The load benchmarks on a few tasks: that they run, and what they count. No times."""

from __future__ import annotations

import csv

import numpy as np
import pandas as pd
import pytest

from benchmarks import load
from benchmarks.synthetic import make
from pipeline.evaluate.protocols import METRICS
from pipeline.manifest import Receipt
from pipeline.report.predictions import read_prediction
from pipeline.report.statistics import interval_of_mean, resample_weights
from pipeline.report.weighted import weighted_metrics
from pipeline.stages.work import Entry


def values_of(figures: list[load.Figure]) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures}


def test_plan_is_measured(tmp_path):
    found = values_of(load.plan(tmp_path, load.SMALL))
    assert found["plan: tasks"] == load.SMALL.finetunings + 1 + 4 * load.SMALL.seeds + 1
    assert found["plan"] > 0 and found["plan: memory"] > 10


def test_status_asks_each_command_once_where_no_task_is_done(tmp_path):
    found = values_of(load.status(tmp_path, load.SMALL))
    assert found["status: calls of sacct"] == 1
    assert found["status: calls of squeue"] == 1


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    return folder, load.aggregate(folder, load.SMALL)


def test_aggregate_finds_every_receipt(aggregated):
    folder, figures = aggregated
    results = pd.read_csv(folder / "runs" / "load" / "tables" / "results.csv")
    assert values_of(figures)["aggregate: receipts"] == len(results) == load.SMALL.finetunings
    assert set(results.status) == {"done"}


def test_tables_are_those_of_a_bootstrap_task_by_task(aggregated):
    """However many tasks are computed at a time, an interval has the bits of one resample after the other."""
    folder, _ = aggregated
    manifest = make(load.SMALL, folder)
    draws = {}
    shard = manifest.tasks[0]
    groups = pd.read_csv(manifest.folder(shard) / "samples.csv", dtype=str)["group"].to_numpy()
    for task in manifest.tasks:
        if task.stage == "finetune":
            entry = Entry(task, manifest.folder(task), manifest.receipt(task), None)
            probabilities, targets, rows = read_prediction(entry)
            with np.load(entry.folder / "predictions.npz") as stored:
                np.testing.assert_array_equal(stored["probabilities"], probabilities)
            weights = resample_weights(list(groups[rows]), count=len(rows), draws=1000, seed=0)
            draws[task.key] = weighted_metrics(METRICS, probabilities, targets, weights)
    tables = folder / "runs" / "load" / "tables"
    results, summary = (pd.read_csv(tables / f"{name}.csv", dtype=str) for name in ("results", "summary"))
    place = ["dataset", "method", "backbone", "arch", "protocol", "fraction"]
    assert len(summary) == load.SMALL.finetunings // load.SMALL.seeds
    for (_, cell), (_, row) in zip(results.groupby(place, sort=False), summary.iterrows()):
        for metric in METRICS:
            average = np.mean([draws[key][metric] for key in cell.task_key], axis=0)
            low, high = interval_of_mean(
                float(row[metric]), average.var(ddof=1), units=int(row["test_groups"]), confidence=0.95
            )
            assert float(row[f"{metric}_low"]) == pytest.approx(low, rel=1e-6)
            assert float(row[f"{metric}_high"]) == pytest.approx(high, rel=1e-6)


def test_predictions_are_compared_with_the_receipt_when_they_are_read(aggregated):
    folder, _ = aggregated
    manifest = make(load.SMALL, folder)
    broken, lost = [task for task in manifest.tasks if task.stage == "finetune"][:2]
    path = manifest.folder(broken) / "predictions.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    (manifest.folder(lost) / "predictions.npz").unlink()
    load.aggregate(folder, load.SMALL)
    tables = folder / "runs" / "load" / "tables"
    results = pd.read_csv(tables / "results.csv").set_index("task_key")
    assert results.status.value_counts().to_dict() == {"done": load.SMALL.finetunings - 2, "failed": 2}
    assert set(results.index[results.status == "failed"]) == {broken.key, lost.key}
    report = (tables / "report.md").read_text()
    assert f"Damaged: {path}: its SHA-256 differs from the receipt's" in report
    assert f"Damaged: {manifest.folder(lost) / 'predictions.npz'}: missing" in report
    assert (
        Receipt.read(manifest.folder(broken), broken.key) is not None
    )  # verify --repair decides, not a table


def test_report_keeps_figures_with_date_hardware_and_commit(tmp_path, capsys):
    for _ in range(2):
        load.report([load.Figure("plan", 1.5, "s", 2)], append_to=tmp_path / "results.csv")
    assert "1.50" in capsys.readouterr().out
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["value"] for row in rows] == ["1.5", "1.5"]
    assert list(rows[0]) == ["date", "hardware", "commit", "name", "value", "unit"]
