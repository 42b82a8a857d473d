"""The aggregate stage on a store with finished, failed and missing tasks."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from aggregate_cases import build, key_of, run, write_patients
from PIL import Image
from rich.console import Console

import shards
from pipeline.errors import UserError
from pipeline.report.terminal import terminal
from pipeline.stages.work import Entry


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patients(tmp_path_factory.mktemp("data"))


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
        assert row.gain_test_low < row.gain < row.gain_test_high and math.isnan(row.gain_low)
        assert row.n == 2 and row.note.startswith("one pretraining")
        assert math.isnan(row.p_value)  # one pretraining for both seeds


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
    best = [line.split(" | ") for line in top.splitlines() if line.startswith("| 10")]
    assert [row[2] for row in best] == ["cass", "dino", "cass", "dino"]  # on the ViT, cass collapsed
    assert " †" in report and "the pretraining collapsed" in report
    assert "picked on validation" in top and "collapsed in pretraining are not picked" in top
    assert "interval over whole groups (patients)" in report
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
    assert "| ViT | linear | dino | deit_tiny | **missing** | **missing** |" in report
    assert "(1 of 2 seeds)" in report and "**1 of 2**" in report
    best, _ = report.split("## Not finished")
    (row,) = (line for line in best.splitlines() if line.startswith("| 10 % | CNN |"))
    assert row.startswith("| 10 % | CNN | cass |") and "] (1 of 2 seeds) | dino, linear: " in row
    assert row.endswith("] (test intervals overlap) |")


def test_what_the_data_warn_of_stands_before_the_tables(
    whole: tuple[list[Entry], Path], tmp_path: Path
) -> None:
    shard = whole[0][0]
    assert shard.receipt is not None
    metrics = {**shard.receipt.metrics, "warnings": ["3 images have no mask", *map(str, range(5))]}
    warned = replace(shard, receipt=replace(shard.receipt, metrics=metrics))
    report = (run([warned, *whole[0][1:]], tmp_path) / "report.md").read_text()
    before, section = report.split("## Warnings\n\n")
    assert section.startswith("- shard/blood: 3 images have no mask\n- shard/blood: 0\n")
    assert f"\n- shard/blood: 1 more, in {shard.task.folder}/receipt.json of the store\n" in section
    assert "## blood: macro_f1" in section and "## blood" not in before
    assert "## Warnings" not in (whole[1] / "report.md").read_text()


def test_nothing_done_still_gives_every_file(whole: tuple[list[Entry], Path], tmp_path: Path) -> None:
    folder = run([replace(entry, receipt=None) for entry in whole[0]], tmp_path)
    assert len(pd.read_csv(folder / "results.csv")) == 24
    assert "No fine-tuning has finished." in (folder / "report.md").read_text()
    for name in ("summary", "gains", "cost"):
        assert (folder / f"{name}.csv").is_file()
    assert not list(folder.glob("*.png"))


def test_metric_that_does_not_exist_is_not_taken_for_nothing_done(
    whole: tuple[list[Entry], Path], tmp_path: Path
) -> None:
    entries = []
    for entry in whole[0]:
        if entry.task.stage == "finetune":
            assert entry.receipt is not None
            found = {name: v for name, v in entry.receipt.metrics["test"].items() if name != "macro_auroc"}
            receipt = replace(entry.receipt, metrics={**entry.receipt.metrics, "test": found})
            entry = replace(entry, receipt=receipt)
        entries.append(entry)
    report = (run(entries, tmp_path, metric="macro_auroc") / "report.md").read_text()
    assert "No fine-tuning has finished" not in report
    assert "Fine-tunings have finished, but on their test images there is no macro_auroc." in report


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


def test_tables_say_how_many_labels_and_patients_a_fraction_came_to(whole: tuple[list[Entry], Path]) -> None:
    for name in ("results.csv", "summary.csv"):
        table = pd.read_csv(whole[1] / name)
        assert (table.num_labels == 3).all() and (table.num_groups == 2).all()
        assert (table.fraction_drawn == 0.5).all()
    report = (whole[1] / "report.md").read_text()
    assert "| fraction | drawn | labels | groups (patients) |" in report
    assert "| 10 % | 50 % | 3 | 2 |" in report


def test_a_set_without_groups_has_no_number_of_patients(shard_folder: Path, tmp_path: Path) -> None:
    entries = build(tmp_path / "store", shard_folder)
    for entry in entries:
        if entry.task.stage == "finetune" and entry.receipt is not None:
            entry.receipt.metrics["num_groups"] = None
    folder = run(entries, tmp_path / "tables")
    assert pd.read_csv(folder / "results.csv").num_groups.isna().all()
    assert "| fraction | drawn | labels |\n" in (folder / "report.md").read_text()
