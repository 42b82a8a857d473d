"""Tables of data sets whose labels are of several kinds, of searches, and of what nets cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from aggregate_cases import BACKBONES, COUNTED, LABELS, build, receipt, run, task, write_patients
from rich.console import Console

from pipeline.errors import UserError
from pipeline.evaluate.protocols import METRICS_OF
from pipeline.report.terminal import terminal
from pipeline.specs import Dataset, SearchSpec, ShardSpec, Training
from pipeline.stages.work import Entry

DATASETS = {"blood": "multiclass", "cells": "segmentation", "polyps": "detection"}
COMPARED = {"blood": "macro_f1", "cells": "miou", "polyps": "box_ap"}


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patients(tmp_path_factory.mktemp("data"))


def build_all(root: Path, shard_folder: Path) -> list[Entry]:
    return [
        entry
        for dataset, labels in DATASETS.items()
        for entry in build(root, shard_folder, dataset=dataset, labels=labels)
    ]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> tuple[list[Entry], Path]:
    root = tmp_path_factory.mktemp("store")
    entries = build_all(root, shard_folder)
    return entries, run(entries, root / "tables")


def test_tables_hold_the_metrics_of_every_kind_and_leave_others_empty(
    mixed: tuple[list[Entry], Path],
) -> None:
    entries, folder = mixed
    results, summary = (pd.read_csv(folder / f"{name}.csv") for name in ("results", "summary"))
    said = {
        entry.task.key: entry.receipt.metrics["test"]
        for entry in entries
        if entry.receipt and "test" in entry.receipt.metrics
    }
    every = [name for labels in DATASETS.values() for name in METRICS_OF[labels]]
    assert [name for name in results.columns if name in every] == every
    for _, row in results.iterrows():
        found = {name: row[name] for name in every if not np.isnan(row[name])}
        assert found == said[row.task_key]
    for dataset, labels in DATASETS.items():
        mine = summary[summary.dataset == dataset]
        assert (mine.metric == COMPARED[dataset]).all()
        for name in METRICS_OF[labels]:
            if not name.startswith("mask"):
                assert (mine[f"{name}_low"] < mine[name]).all() and (mine[name] < mine[f"{name}_high"]).all()
        others = set(every) - set(METRICS_OF[labels])
        assert mine[[f"{name}{part}" for name in others for part in ("", "_low")]].isna().all(axis=None)


def test_gains_are_of_each_kinds_metric(mixed: tuple[list[Entry], Path]) -> None:
    results, gains = (pd.read_csv(mixed[1] / f"{name}.csv") for name in ("results", "gains"))
    for dataset, metric in COMPARED.items():
        mine = gains[gains.dataset == dataset]
        assert len(mine) == 8 and (mine.metric == metric).all()
        means = results[results.dataset == dataset].groupby(["method", "arch", "fraction"])[metric].mean()
        for _, row in mine.iterrows():
            place = row.arch, row.fraction
            gain = means[(row.method, *place)] - means[("supervised", *place)]
            assert row.gain == pytest.approx(gain)
            assert row.gain_test_low < gain < row.gain_test_high


def test_report_plots_and_terminal_use_each_kinds_metric(
    mixed: tuple[list[Entry], Path], tmp_path: Path
) -> None:
    report = (mixed[1] / "report.md").read_text()
    best = report.split("## blood")[0]
    for dataset, metric in COMPARED.items():
        assert f"## {dataset}: {metric}\n" in report and f"Mean over seeds of {metric} minus" in report
        assert f"![{metric}_{dataset}]" in report and (mixed[1] / f"{metric}_{dataset}.png").is_file()
        assert best.count(f"| {dataset} | {metric} |") == 4
    console = Console(width=120, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(terminal(mixed[1] / "summary.csv"))
    lines = console.export_text().splitlines()
    assert "macro_f1, miou, box_ap on the test split" in lines[0]
    summary = pd.read_csv(mixed[1] / "summary.csv").query("method == 'dino' and arch == 'cnn'")
    for dataset, metric in COMPARED.items():
        value = summary[(summary.dataset == dataset) & (summary.fraction == 1)][metric].item()
        assert any(dataset in line and metric in line and f"{value:.3f}" in line for line in lines)


def test_report_metric_may_be_of_one_kind_and_has_to_be_of_some(
    mixed: tuple[list[Entry], Path], tmp_path: Path
) -> None:
    others = [entry for entry in mixed[0] if "blood" not in entry.task.id]
    gains = pd.read_csv(run(others, tmp_path, metric="mask_ap50") / "gains.csv")
    assert set(zip(gains.dataset, gains.metric)) == {("cells", "miou"), ("polyps", "box_ap50")}  # no masks
    masked = [_with_mask_ap(entry) if "dino" in entry.task.id else entry for entry in others]
    gains = pd.read_csv(run(masked, tmp_path, metric="mask_ap50") / "gains.csv").query("dataset == 'polyps'")
    assert set(gains.metric) == {"mask_ap50"} and (gains.n == 0).all()
    assert set(gains.query("method == 'cass'").note) == {"mask_ap50 does not exist here"}
    with pytest.raises(UserError, match=r"report\.metric: no metric 'miou' for single-label data"):
        run(mixed[0], tmp_path, metric="miou")


def _with_mask_ap(entry: Entry) -> Entry:
    if entry.task.stage != "finetune" or entry.receipt is None:
        return entry
    test = entry.receipt.metrics["test"] | {"mask_ap50": 0.5}
    return replace(entry, receipt=replace(entry.receipt, metrics=entry.receipt.metrics | {"test": test}))


def test_without_shards_the_description_says_the_kind(
    mixed: tuple[list[Entry], Path], tmp_path: Path
) -> None:
    waiting = [replace(entry, receipt=None) for entry in mixed[0] if "cells" in entry.task.id]
    pages = ShardSpec(dataset=Dataset(name="cells", source="digit_pages")).model_dump()
    waiting[0] = replace(waiting[0], task=replace(waiting[0].task, spec=pages))
    folder = run(waiting, tmp_path)
    assert set(pd.read_csv(folder / "gains.csv").metric) == {"miou"}
    assert "miou" in pd.read_csv(folder / "results.csv").columns


def search(dataset: str, seed: int, *, done: bool = True) -> Entry:
    spec = SearchSpec(
        dataset=dataset,
        label="dino",
        method="dino",
        options={"auxiliary": "search"},
        backbones={"cnn": BACKBONES["cnn"]},
        train=Training(),
        seed=seed,
    )
    of = task("search", f"{dataset}-dino-cnn-s{seed}", spec.model_dump())
    numbers = {"discrepancy": 1.5, "cka_distance": 0.25, "loss": 3.0}
    metrics = {
        "decides": "auxiliary",
        "winner": "vit",
        "ranking": [{"candidate": "vit", **numbers}, {"candidate": "swin", **numbers, "discrepancy": 0.5}],
    }
    seen = {"images_seen": 500, "device": "cuda", "device_seconds": 7.0}
    left = receipt(of, metrics=metrics, peak_memory_bytes=3_000_000_000, **seen) if done else None
    return Entry(of, Path("nowhere"), left, None)


def test_searches_are_ranked_in_a_table_and_cost_their_method(shard_folder: Path, tmp_path: Path) -> None:
    entries = build(tmp_path / "store", shard_folder)
    searches = [search("blood", 0), search("blood", 1, done=False)]
    folder = run([entries[0], *searches, *entries[1:]], tmp_path / "tables", baseline="cass")
    table = pd.read_csv(folder / "search.csv")
    assert list(table.columns) == [
        *("dataset", "method", "backbone", "arch", "seed"),
        *("rank", "candidate", "discrepancy", "cka_distance", "loss", "chosen"),
    ]
    assert table.values.tolist() == [
        ["blood", "dino", "resnet10t", "cnn", 0, 1, "vit", 1.5, 0.25, 3.0, True],
        ["blood", "dino", "resnet10t", "cnn", 0, 2, "swin", 0.5, 0.25, 3.0, False],
    ]
    cost = pd.read_csv(folder / "cost.csv").set_index("method")
    assert cost.pretrain_runs.to_dict() == {"supervised": 2, "dino": 2, "cass": 1}
    assert cost.gpu_seconds["dino"] == 2 * 40 + 7 and cost.gpu_seconds["cass"] == 50
    assert cost.images_seen["dino"] == 2 * 3000 + 500
    assert cost.peak_memory_gb["dino"] == 3
    assert cost.pretrain_ratio["dino"] == pytest.approx(87 / 50)
    report = (folder / "report.md").read_text()
    assert "## Searches" in report and "| 1 | **vit** | 1.500 | 0.250 | 3.000 |" in report
    assert "| search/blood-dino-cnn-s1 | **missing** |" in report


def test_an_experiment_without_searches_has_no_table_of_them(mixed: tuple[list[Entry], Path]) -> None:
    assert not (mixed[1] / "search.csv").exists()
    assert "## Searches" not in (mixed[1] / "report.md").read_text()


def test_backbones_say_what_they_cost_once_they_are_trained(shard_folder: Path, tmp_path: Path) -> None:
    waiting = ("pretrain/blood-dino-vit", "pretrain/blood-cass-cnn-vit-s1")  # of dino's both, of cass's one
    entries = [
        replace(entry, receipt=None) if entry.task.id.startswith(waiting) else entry
        for entry in build(tmp_path / "store", shard_folder, each_seed=True)
    ]
    folder = run(entries, tmp_path / "tables")
    table = pd.read_csv(folder / "backbones.csv").set_index(["method", "arch"])
    assert len(table) == 6 and (table.image_size == 224).all()
    counted = table.params_m.drop(("dino", "vit"))
    assert counted.tolist() == [COUNTED[arch]["params"] / 1e6 for _, arch in counted.index]
    assert table.gmac["cass", "vit"] == COUNTED["vit"]["gmac"] and np.isnan(table.gmac["dino", "vit"])
    assert table.backbone["dino", "vit"] == "deit_tiny"
    assert "| blood | cass | ViT | deit_tiny | 224 | 5.50 | 1.07 |" in (folder / "report.md").read_text()


def test_every_kind_is_tested_here() -> None:
    assert set(DATASETS.values()) == set(LABELS) == set(METRICS_OF) - {"multilabel"}
