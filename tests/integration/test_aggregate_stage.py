"""The aggregate stage on a store with finished, failed and missing tasks."""

from __future__ import annotations

import csv
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

import shards
from pipeline.errors import UserError
from pipeline.evaluate.metrics import evaluate
from pipeline.manifest import Receipt, Task
from pipeline.report.terminal import terminal
from pipeline.specs import (
    AggregateSpec,
    Backbone,
    Dataset,
    FinetuneSettings,
    FinetuneSpec,
    PretrainSpec,
    ReportSettings,
    ShardSpec,
    Training,
)
from pipeline.stages import aggregate
from pipeline.stages.work import Entry, Work

FRACTIONS, SEEDS = (0.1, 1.0), (0, 1)
# method → archs trained together, and how often its predictions are right
METHODS = {
    "supervised": ([["cnn"], ["vit"]], 0.5),
    "dino": ([["cnn"], ["vit"]], 0.7),
    "cass": ([["cnn", "vit"]], 0.8),
}
TEST_IMAGES = 60


def key_of(name: str) -> str:
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of patients with three images each; the test split has 20 patients."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["path,label,patient,split"]
    for number in range(TEST_IMAGES + 6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"{number:02}.png")
        split = "test" if number < TEST_IMAGES else ("train", "val")[number // 3 % 2]
        lines.append(f"{number:02}.png,{'abc'[number % 3]},p{number // 3},{split}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    source = shards.CsvSource(root, split_column="split", group_column="patient")
    shards.write(source, root / "shards", shards.ShardOptions(processes=1))
    return root / "shards"


def task(stage: str, name: str, spec: Any, needs: tuple[str, ...] = ()) -> Task:
    return Task(f"{stage}/{name}", stage, spec.model_dump(mode="json"), needs, key_of(f"{stage}/{name}"))


def receipt(of: Task, *, hosts: str = "here", seconds: float = 10.0, **values: Any) -> Receipt:
    return Receipt(
        of.key, of.id, of.stage, values.pop("metrics", {}), {}, "", "", seconds, [hosts], 1, **values
    )


def build(root: Path, shard_folder: Path, *, host: str = "here", seconds: float = 10.0) -> list[Entry]:
    """Every task of an experiment, all of them finished."""
    dataset = Dataset(name="blood", root="/data")
    shard = task("shard", "blood", ShardSpec(dataset=dataset))
    entries = [Entry(shard, shard_folder, receipt(shard), None)]
    index = shards.Index.open(shard_folder)
    rows = index.rows("test")
    targets = index.targets(rows)
    for method, (together, skill) in METHODS.items():
        for archs in together:
            backbones = {
                arch: Backbone(name={"cnn": "resnet10t", "vit": "deit_tiny"}[arch]) for arch in archs
            }
            name = f"blood-{method}-{'-'.join(archs)}"
            spec = PretrainSpec(
                dataset="blood",
                label=method,
                method=method,
                options={},
                backbones=backbones,
                train=Training(),
                seed=0,
            )
            pretrain = task("pretrain", name, spec, (shard.id,))
            folder = root / name
            folder.mkdir(parents=True)
            write_log(folder, archs)
            trained = receipt(
                pretrain,
                hosts=host,
                seconds=seconds,
                metrics={"collapsed": {arch: method == "cass" and arch == "vit" for arch in archs}},
                images_seen=0 if method == "supervised" else 3000,
                device="cuda",
                device_seconds={"supervised": 0.0, "dino": 40.0, "cass": 50.0}[method],
                peak_memory_bytes=2_000_000_000,
            )
            entries.append(Entry(pretrain, folder, trained, None))
            for arch in archs:
                for fraction in FRACTIONS:
                    for seed in SEEDS:
                        spec_ = FinetuneSpec(
                            dataset="blood",
                            label=method,
                            arch=arch,  # type: ignore[arg-type]
                            backbone=backbones[arch],
                            protocol="linear",
                            fraction=fraction,
                            seed=seed,
                            settings=FinetuneSettings(),
                        )
                        one = task(
                            "finetune",
                            f"blood-{method}-{arch}-{100 * fraction:g}pc-s{seed}",
                            spec_,
                            (shard.id, pretrain.id),
                        )
                        place = root / one.name
                        place.mkdir()
                        metrics = predict(place, one, rows, targets, skill + 0.1 * (fraction == 1))
                        left = receipt(
                            one,
                            hosts=host,
                            seconds=seconds,
                            metrics=metrics,
                            device="cuda",
                            device_seconds=5.0,
                        )
                        entries.append(Entry(one, place, left, None))
    return entries


def predict(folder: Path, of: Task, rows: np.ndarray, targets: np.ndarray, skill: float) -> dict[str, Any]:
    rng = np.random.default_rng(int(of.key[:8], 16))
    said = np.where(rng.random(len(targets)) < skill, targets, rng.integers(0, 3, len(targets)))
    probabilities = (0.1 + 0.7 * np.eye(3)[said] + 0.01 * rng.random((len(targets), 3))).astype(np.float32)
    np.savez(folder / "predictions.npz", probabilities=probabilities, targets=targets, rows=rows)
    return {"num_labels": 3, "best_epoch": 0, "val": {}, "test": evaluate(probabilities, targets)}


def write_log(folder: Path, archs: list[str]) -> None:
    lines = [{"kind": "step", "step": step, "epoch": step / 5, "loss": 1 / (1 + step)} for step in range(20)]
    lines += [
        {
            "kind": "health",
            "step": step,
            "epoch": step / 5,
            **{arch: {"effective_rank": 3.0 + step} for arch in archs},
        }
        for step in (0, 10, 20)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(entries: list[Entry], folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    spec = AggregateSpec(
        experiment="trial", report=ReportSettings(**({"bootstrap": 200} | settings)), seeds=list(SEEDS)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        aggregate.run(Work(task=task("aggregate", "trial", spec), folder=folder, everything=entries))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> tuple[list[Entry], Path]:
    root = tmp_path_factory.mktemp("store")
    entries = build(root, shard_folder)
    return entries, run(entries, root / "tables")


def test_results_have_a_row_a_task_and_read_back_to_the_same_bits(whole: tuple[list[Entry], Path]) -> None:
    entries, folder = whole
    with (folder / "results.csv").open() as file:
        rows = {row["task_key"]: row for row in csv.DictReader(file)}
    finetunes = [entry for entry in entries if entry.task.stage == "finetune"]
    assert len(rows) == len(finetunes) == 24
    for entry in finetunes:
        assert entry.receipt is not None
        row = rows[entry.task.key]
        for metric, value in entry.receipt.metrics["test"].items():
            assert float(row[metric]) == value
        assert row["status"] == "done"
        assert row["backbone"] == entry.task.spec["backbone"]["name"]
        assert row["pretrain_key"] == key_of(entry.task.needs[1])
        assert row["collapsed"] == str(row["method"] == "cass" and row["arch"] == "vit")


def test_results_do_not_depend_on_hosts_or_clock(
    whole: tuple[list[Entry], Path], shard_folder: Path, tmp_path: Path
) -> None:
    again = build(tmp_path / "store", shard_folder, host="elsewhere", seconds=99.0)
    folder = run(again, tmp_path / "tables")
    for name in ("results.csv", "summary.csv", "gains.csv"):
        assert (folder / name).read_bytes() == (whole[1] / name).read_bytes()
    assert (folder / "cost.csv").read_bytes() != (whole[1] / "cost.csv").read_bytes()


def test_summary_is_mean_std_and_interval_over_groups(whole: tuple[list[Entry], Path]) -> None:
    results, summary = (pd.read_csv(whole[1] / name) for name in ("results.csv", "summary.csv"))
    assert len(summary) == 12
    for _, row in summary.iterrows():
        mine = results.query(
            "method == @row.method and arch == @row.arch and fraction == @row.fraction"
        ).macro_f1
        assert row.n == row.planned == 2
        assert row.macro_f1 == pytest.approx(mine.mean())
        assert row.macro_f1_std == pytest.approx(mine.std())
        assert row.macro_f1_low < row.macro_f1 < row.macro_f1_high
    assert summary.query("arch == 'vit' and method == 'cass'").collapsed.tolist() == [2, 2]


def test_intervals_resample_patients(
    whole: tuple[list[Entry], Path], shard_folder: Path, tmp_path: Path
) -> None:
    """When every patient's images share one fate, the interval must be wider than with images alone."""
    root = tmp_path / "store"
    entries = build(root, shard_folder)
    index = shards.Index.open(shard_folder)
    rows = index.rows("test")
    patients = index.samples["group"].to_numpy()[rows]
    for number, entry in enumerate(entries):
        if entry.task.stage == "finetune":
            rng = np.random.default_rng(number)
            fate = {patient: rng.random() < 0.6 for patient in sorted(set(patients))}
            said = [
                target if fate[patient] else (target + 1) % 3
                for target, patient in zip(index.targets(rows), patients)
            ]
            probabilities = np.eye(3, dtype=np.float32)[said]
            np.savez(
                entry.folder / "predictions.npz",
                probabilities=probabilities,
                targets=index.targets(rows),
                rows=rows,
            )
    summary = pd.read_csv(run(entries, tmp_path / "tables") / "summary.csv")
    width = (summary.accuracy_high - summary.accuracy_low).mean()
    # two seeds of 20 patients: 2 · 1.96 · sqrt(.24 / 20 / 2) = .30; drawing 60 single images would give .18
    assert 0.22 < width < 0.36


def test_gains_are_paired_by_seed(whole: tuple[list[Entry], Path]) -> None:
    results, gains = (pd.read_csv(whole[1] / name) for name in ("results.csv", "gains.csv"))
    assert set(gains.method) == {"dino", "cass"}
    keys = ["arch", "fraction", "seed"]
    table = results.pivot(index=keys, columns="method", values="macro_f1")
    for _, row in gains.iterrows():
        difference = (table[row.method] - table.supervised).loc[row.arch, row.fraction]
        assert row.gain == pytest.approx(difference.mean())
        assert row.gain_std == pytest.approx(difference.std())
        assert row.gain_low < row.gain < row.gain_high
        assert row.n == 2 and "2 seeds" in row.note
        assert 0 <= row.p_value <= 1


def test_cost_charges_a_method_for_every_run_it_needs(whole: tuple[list[Entry], Path]) -> None:
    cost = pd.read_csv(whole[1] / "cost.csv").set_index("method")
    assert cost.pretrain_runs.to_dict() == {"supervised": 2, "dino": 2, "cass": 1}
    assert cost.gpu_seconds.to_dict() == {"supervised": 0, "dino": 80, "cass": 50}
    assert cost.images_seen.to_dict() == {"supervised": 0, "dino": 6000, "cass": 3000}
    assert cost.images_per_second["dino"] == 75
    assert cost.finetune_gpu_seconds.to_dict() == {"supervised": 40, "dino": 40, "cass": 40}
    assert cost.gpu_hours["dino"] == pytest.approx(120 / 3600)
    assert cost.total_ratio.to_dict() == {"supervised": 1, "dino": 3, "cass": 2.25}
    assert math.isnan(cost.pretrain_ratio["cass"])  # the baseline was not pretrained


def test_ratio_of_pretraining_to_a_baseline_that_has_one(
    whole: tuple[list[Entry], Path], tmp_path: Path
) -> None:
    cost = pd.read_csv(run(whole[0], tmp_path, baseline="dino") / "cost.csv").set_index("method")
    assert cost.pretrain_ratio["cass"] == pytest.approx(50 / 80)


def test_report_says_the_best_and_marks_collapse(whole: tuple[list[Entry], Path]) -> None:
    report = (whole[1] / "report.md").read_text()
    top = report.split("## blood")[0]
    assert top.count("| 10 % |") == 2 and top.count("| 100 % |") == 2
    assert "cass †" in report and "the pretraining collapsed" in report
    assert "resamples whole groups (patients)" in report
    for image in ("macro_f1_blood.png", "pretraining_blood.png"):
        assert f"]({image})" in report
        with Image.open(whole[1] / image) as picture:
            assert min(picture.size) > 300
    assert "Not finished" not in report


def broken(entries: list[Entry], log: Path) -> list[Entry]:
    """DINO's ViT pretraining failed and took its fine-tunings along; one fine-tuning of CASS failed alone."""
    log.write_text("step 1\nRuntimeError: out of memory on gpu7\n\n")
    error = {"kind": "RuntimeError", "message": "loss is\nnot finite", "user_error": False, "log": str(log)}
    changed = []
    for entry in entries:
        if entry.task.id == "pretrain/blood-dino-vit":
            entry = replace(entry, receipt=None, error=error)
        elif entry.task.id.startswith("finetune/blood-dino-vit"):
            entry = replace(entry, receipt=None)
        elif entry.task.id == "finetune/blood-cass-cnn-10pc-s1":
            entry = replace(
                entry, receipt=None, error={"kind": "UserError", "message": "bad", "user_error": True}
            )
        changed.append(entry)
    return changed


def test_missing_and_failed_tasks_are_named_in_the_tables_place(
    whole: tuple[list[Entry], Path], tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    folder = run(broken(whole[0], log), tmp_path / "tables")
    results = pd.read_csv(folder / "results.csv")
    assert results.status.value_counts().to_dict() == {"done": 19, "missing": 4, "failed": 1}
    assert results[results.status != "done"].macro_f1.isna().all()
    summary = pd.read_csv(folder / "summary.csv")
    assert len(summary) == 12
    assert summary.query("method == 'dino' and arch == 'vit'").n.tolist() == [0, 0]
    assert summary.query("method == 'cass' and arch == 'cnn'").n.tolist() == [1, 2]
    gains = pd.read_csv(folder / "gains.csv")
    assert gains.query("method == 'dino' and arch == 'vit'").note.str.contains("no seed").all()
    assert "one seed" in gains.query("method == 'cass' and arch == 'cnn' and fraction == .1").note.item()
    cost = pd.read_csv(folder / "cost.csv").set_index("method")
    assert (cost.pretrain_runs["dino"], cost.pretrain_planned["dino"]) == (1, 2)
    report = (folder / "report.md").read_text()
    assert "## Not finished: 2 failed, 4 missing" in report
    assert (
        f"RuntimeError: loss is not finite; last line: `RuntimeError: out of memory on gpu7` | `{log}`"
        in report
    )
    assert "| finetune/blood-dino-vit-10pc-s0 | **missing** | waits for pretrain/blood-dino-vit |" in report
    assert "| ViT | deit_tiny | linear | dino | **missing** | **missing** |" in report
    assert "(1 of 2 seeds)" in report and "**1 of 2**" in report


def test_nothing_done_still_gives_every_file(whole: tuple[list[Entry], Path], tmp_path: Path) -> None:
    folder = run([replace(entry, receipt=None) for entry in whole[0]], tmp_path)
    assert len(pd.read_csv(folder / "results.csv")) == 24
    assert "No fine-tuning has finished" in (folder / "report.md").read_text()
    for name in ("summary", "gains", "cost"):
        assert (folder / f"{name}.csv").is_file()
    assert not list(folder.glob("*.png"))


def test_terminal_table_reads_the_summary(whole: tuple[list[Entry], Path], tmp_path: Path) -> None:
    folder = run(broken(whole[0], tmp_path / "job.log"), tmp_path / "tables")
    console = Console(width=110, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(terminal(folder / "summary.csv"))
    text = console.export_text()
    assert "10 % labels" in text and "100 % labels" in text
    assert text.count("missing") == 2 and "1/2 seeds" in text and "† collapsed" in text
    summary = pd.read_csv(folder / "summary.csv")
    best = summary.query("method == 'dino' and arch == 'cnn' and fraction == 1").iloc[0]
    low, high = (f"{value:.2f}".removeprefix("0") for value in (best.macro_f1_low, best.macro_f1_high))
    assert f"{best.macro_f1:.3f} [{low} {high}]" in text


def test_unknown_metric_is_refused(whole: tuple[list[Entry], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.metric: no metric 'macro_f2'.*did you mean"):
        run(whole[0], tmp_path, metric="macro_f2")
