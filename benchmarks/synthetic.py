"""Made-up experiments of any size: real plans, manifests and receipts, predictions out of thin air."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

import shards
from pipeline.evaluate.protocols import METRICS
from pipeline.experiment import Experiment
from pipeline.experiment_file import load_experiment
from pipeline.manifest import Manifest, Receipt, Task, describe_files
from pipeline.plan import plan
from pipeline.report.weighted import weighted_metrics

CLASSES = 3
LOG_LINES = 10


@dataclass(frozen=True)
class Shape:
    """How large an experiment is: fine-tunings are the product of all numbers, times two nets."""

    datasets: int = 1
    methods: int = 4
    protocols: int = 2
    fractions: int = 25
    seeds: int = 25

    @property
    def finetunings(self) -> int:
        return self.datasets * self.methods * 2 * self.protocols * self.fractions * self.seeds


def write_experiment(shape: Shape, folder: Path, **sections: Any) -> Path:
    """Write an experiment file; sections such as ``resources`` are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    methods: dict[str, dict] = {"supervised": {}}
    for number in range(1, shape.methods):
        methods[f"simclr-{number}"] = {"method": "simclr", "train": {"lr": 1e-3 * number}}
    content = {
        "name": "load",
        "datasets": {f"set{number}": {"source": "digits"} for number in range(shape.datasets)},
        "backbones": {"cnn": {"name": "test_resnet"}, "vit": {"name": "vit_tiny_patch16_224"}},
        "methods": methods,
        "seeds": list(range(shape.seeds)),
        "finetune": {
            "protocols": ["linear", "knn", "finetune"][: shape.protocols],
            "fractions": [round((1 + number) / shape.fractions, 4) for number in range(shape.fractions)],
        },
        **sections,
    }
    path = folder / "load.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def write_manifest(experiment: Experiment, folder: Path, **fields: Any) -> Manifest:
    """Plan an experiment and write its manifest into ``folder/runs``, its store being ``folder/store``."""
    manifest = Manifest(experiment.resolved(), str(folder / "store"), plan(experiment), **fields)
    manifest.write(folder / "runs" / experiment.name / "manifest.json")
    return manifest


def fill_store(manifest: Manifest, *, test_images: int = 50) -> None:
    """Leave what every task but the aggregation would have left: a receipt, and the files that it names.

    Args:
        test_images: of each data set, two of each patient.
    """
    source = _images(Path(manifest.store).parent / "images", test_images)
    targets = rows = np.empty(0, np.int64)
    for number, task in enumerate(manifest.tasks):
        folder = manifest.folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        if task.stage == "shard":
            shards.write(source, folder, shards.ShardOptions(processes=1))
            index = shards.Index.open(folder)
            rows = np.sort(index.rows("test"))
            targets = index.targets(rows)
            samples = {split: len(index.rows(split)) for split in ("train", "val", "test")}
            said: dict[str, Any] = {"samples": samples, "task": index.task, "classes": index.classes}
            _leave_receipt(task, folder, said | {"warnings": []})
        elif task.stage == "pretrain":
            _write_log(folder, _pretraining_log(task, rng))
            metrics = {"loss": 1.0, "collapsed": dict.fromkeys(task.spec["backbones"], False)}
            _leave_receipt(task, folder, metrics, device_seconds=100 * rng.random(), images_seen=10_000)
        elif task.stage == "finetune":
            test = _predict(folder, task, targets, rows, rng)
            log = [{"epoch": epoch, "loss": 1 / (1 + epoch), "val": test} for epoch in range(LOG_LINES)]
            _write_log(folder, log)
            metrics = {"num_labels": round(100 * task.spec["fraction"]), "num_val": 20, "num_test": len(rows)}
            metrics |= {"best_epoch": int(rng.integers(LOG_LINES)), "val": test, "test": test}
            _leave_receipt(task, folder, metrics, device_seconds=10 * rng.random(), images_seen=300)


def _images(folder: Path, test_images: int) -> shards.CsvSource:
    """Images of noise with a label, a patient and a split each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = ["path,label,patient,split"]
    for number in range(test_images + 40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        split = "test" if number < test_images else "train" if number % 4 < 2 else "val"
        lines.append(f"{number}.png,{'abc'[number % CLASSES]},p{number // 2},{split}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return shards.CsvSource(folder, split_column="split", group_column="patient")


def _predict(
    folder: Path, task: Task, targets: np.ndarray, rows: np.ndarray, rng: np.random.Generator
) -> dict[str, float]:
    """Write predictions that are better with more labels; returns their metrics."""
    odds = rng.normal(size=(len(targets), CLASSES)) + 2 * task.spec["fraction"] * np.eye(CLASSES)[targets]
    powers = np.exp(odds)
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    np.savez(folder / "predictions.npz", probabilities=probabilities, targets=targets, rows=rows)
    once = np.ones((1, len(targets)), np.float32)
    return {
        name: float(value[0])
        for name, value in weighted_metrics(METRICS, probabilities, targets, once).items()
    }


def _pretraining_log(task: Task, rng: np.random.Generator) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"kind": "step", "step": step, "epoch": step / 10, "loss": float(rng.random())} for step in range(100)
    ]
    health = {arch: {"effective_rank": 20 * rng.random()} for arch in task.spec["backbones"]}
    return [*lines, {"kind": "health", "step": 100, "epoch": 10.0, **health}]


def _write_log(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _leave_receipt(task: Task, folder: Path, metrics: dict[str, Any], **measured: Any) -> None:
    receipt = Receipt(
        key=task.key,
        task=task.id,
        stage=task.stage,
        metrics=metrics,
        files=describe_files(folder, sync=False),
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:00:10+00:00",
        seconds=10.0,
        hosts=["node1"],
        world_size=1,
        peak_memory_bytes=1_000_000_000,
        versions={"python": "3.11.7", "torch": "2.6.0", "timm": "1.0.16", "torchvision": "0.21.0"},
        **measured,
    )
    receipt.write(folder, sync=False)


def make(
    shape: Shape,
    folder: Path,
    *,
    finished: bool = False,
    jobs: dict[str, str] | None = None,
    cluster: str = "",
    **sections: Any,
) -> Manifest:
    """An experiment's file, manifest and, where ``finished``, its whole store below ``folder``.

    Args:
        jobs: task id → job id, as a launch would have left them.
        cluster: where those jobs are.
        sections: of the experiment file.
    """
    experiment = load_experiment(str(write_experiment(shape, folder, **sections)))
    manifest = write_manifest(experiment, folder, jobs=jobs or {}, cluster=cluster)
    if finished:
        fill_store(manifest)
    return manifest
