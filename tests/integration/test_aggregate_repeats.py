"""The aggregate stage on repeated splits of one data set, also where some are not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from aggregate_cases import build, run, write_patients

from pipeline.report.statistics import gain_of_repeats
from pipeline.stages.work import Entry


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patients(tmp_path_factory.mktemp("data"))


def repeated(root: Path, shard_folder: Path, number: int) -> list[Entry]:
    """That many splits of ``blood``: here all are the same one, with other predictions."""
    entries = []
    for repeat in range(1, number + 1):
        name = "blood" if repeat == 1 else f"blood-r{repeat}"
        of_split = build(root / name, shard_folder, dataset=name, seeds=(0, 1))
        shard = of_split[0].task
        spec = shard.spec | {"repeat": repeat, "pooled": "blood"}
        entries += [replace(of_split[0], task=replace(shard, spec=spec)), *of_split[1:]]
    return entries


def test_rows_pool_over_splits_and_intervals_are_over_them(shard_folder: Path, tmp_path: Path) -> None:
    folder = run(repeated(tmp_path, shard_folder, 3), tmp_path / "tables")
    results = pd.read_csv(folder / "results.csv")
    assert set(results.dataset) == {"blood"} and set(results.repeat) == {1, 2, 3}
    assert len(results) == 3 * 24
    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == 12 and (summary.n == 6).all() and (summary.repeats == 3).all()
    assert (summary.test_groups == 20).all()
    assert (summary.macro_f1_low < summary.macro_f1).all() and (
        summary.macro_f1 < summary.macro_f1_high
    ).all()
    gains = pd.read_csv(folder / "gains.csv").query("method == 'dino' and arch == 'cnn' and fraction == 1")
    keys = ["repeat", "seed"]
    place = results.query("arch == 'cnn' and fraction == 1").set_index(keys)
    difference = place[place.method == "dino"].macro_f1 - place[place.method == "supervised"].macro_f1
    means = difference.groupby("repeat").mean()
    expected = gain_of_repeats(means, ratio=20 / 1, units=22, confidence=0.95)
    row = gains.iloc[0]
    assert row.gain == pytest.approx(means.mean()) and row.p_value == pytest.approx(expected.p_value)
    assert (row.gain_low, row.gain_high) == pytest.approx((expected.low, expected.high))
    assert np.isnan(row.gain_test_low) and row.note == "3 repeated splits"
    assert set(pd.read_csv(folder / "models.csv").dataset) == {"blood", "blood-r2", "blood-r3"}
    assert len(pd.read_csv(folder / "cost.csv")) == 3  # methods


def test_one_finished_split_has_no_interval_and_the_others_are_missing(
    shard_folder: Path, tmp_path: Path
) -> None:
    entries = [
        replace(entry, receipt=None) if "blood-r" in entry.task.id and entry.task.stage != "shard" else entry
        for entry in repeated(tmp_path, shard_folder, 2)
    ]
    folder = run(entries, tmp_path / "tables")
    summary = pd.read_csv(folder / "summary.csv")
    assert (summary.n == 2).all() and (summary.planned == 4).all() and (summary.repeats == 1).all()
    assert summary.macro_f1.notna().all() and summary.macro_f1_low.isna().all()
    gains = pd.read_csv(folder / "gains.csv")
    assert gains.p_value.isna().all() and gains.note.str.startswith("one split: no interval").all()
    assert "(2 of 4 seeds)" in (folder / "report.md").read_text()


def test_damaged_predictions_of_a_repeated_split_are_told(shard_folder: Path, tmp_path: Path) -> None:
    entries = repeated(tmp_path, shard_folder, 2)
    broken = next(entry for entry in entries if "finetune/blood-r2-dino" in entry.task.id)
    (broken.folder / "predictions.npz").write_bytes(b"cut")
    results = pd.read_csv(run(entries, tmp_path / "tables") / "results.csv").set_index("task_key")
    assert results.status[broken.task.key] == "failed" and (results.status == "failed").sum() == 1
