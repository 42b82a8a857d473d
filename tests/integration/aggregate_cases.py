"""Made-up stores for the tests of the aggregate stage: receipts and predictions of every kind."""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import shards
from pipeline.evaluate.metrics import evaluate
from pipeline.manifest import Receipt, Task
from pipeline.report.predictions import Detected, Segmented, prediction_of
from pipeline.report.weighted_detection import DetectionResamples
from pipeline.report.weighted_segmentation import SegmentationResamples
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
BACKBONES = {"cnn": Backbone(name="resnet10t"), "vit": Backbone(name="deit_tiny")}
COUNTED = {"cnn": {"params": 4_900_000, "gmac": 0.25}, "vit": {"params": 5_500_000, "gmac": 1.07}}
TEST_IMAGES, CLASSES = 60, 3
Predict = Callable[[Path, Task, np.ndarray, np.ndarray, float], dict[str, float]]


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def write_patients(root: Path) -> Path:
    """Images of patients with three images each; the test split has 20 patients."""
    rng = np.random.default_rng(0)
    lines = ["path,label,patient,split"]
    for number in range(TEST_IMAGES + 6):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"{number:02}.png")
        split = "test" if number < TEST_IMAGES else ("train", "val")[number // 3 % 2]
        lines.append(f"{number:02}.png,{'abc'[number % CLASSES]},p{number // 3},{split}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    source = shards.CsvSource(root, split_column="split", group_column="patient")
    shards.write(source, root / "shards", shards.ShardOptions(processes=1))
    return root / "shards"


def task(stage: str, name: str, spec: dict[str, Any], needs: Iterable[Task] = ()) -> Task:
    return Task(f"{stage}/{name}", stage, spec, tuple(need.id for need in needs), key_of(f"{stage}/{name}"))


def receipt(of: Task, *, hosts: str = "here", seconds: float = 10.0, **values: Any) -> Receipt:
    return Receipt(
        of.key, of.id, of.stage, values.pop("metrics", {}), {}, "", "", seconds, [hosts], 1, **values
    )


def classify(folder: Path, of: Task, rows: np.ndarray, targets: np.ndarray, skill: float) -> dict[str, float]:
    rng = np.random.default_rng(int(of.key[:8], 16))
    said = np.where(rng.random(len(targets)) < skill, targets, rng.integers(0, CLASSES, len(targets)))
    odds = 0.1 + 0.7 * np.eye(CLASSES)[said] + 0.01 * rng.random((len(targets), CLASSES))
    probabilities = odds.astype(np.float32)
    np.savez(folder / "predictions.npz", probabilities=probabilities, targets=targets, rows=rows)
    return evaluate(probabilities, targets)


def segment(folder: Path, of: Task, rows: np.ndarray, targets: np.ndarray, skill: float) -> dict[str, float]:
    """Pixels right or wrong at random; their number and classes are the same for every task."""
    rng = np.random.default_rng(int(of.key[:8], 16))
    confusion = np.zeros((len(rows), CLASSES, CLASSES), np.uint32)
    for image, target in enumerate(targets):
        for true, pixels in ((target, 40), (0, 60)):
            right = rng.binomial(pixels, skill)
            confusion[image, true, true] += right
            confusion[image, true, (true + 1) % CLASSES] += pixels - right
    np.savez(folder / "predictions.npz", confusion=confusion, rows=rows)
    found = prediction_of({"confusion": confusion, "rows": rows})
    assert isinstance(found, Segmented)
    return _once(SegmentationResamples, found)


def detect(folder: Path, of: Task, rows: np.ndarray, targets: np.ndarray, skill: float) -> dict[str, float]:
    """One object an image, found with one box that fits up to an IoU which is greater with more skill."""
    rng = np.random.default_rng(int(of.key[:8], 16))
    fits = rng.random(len(rows)) * skill / 0.8
    arrays = {
        "detection_image": np.arange(len(rows), dtype=np.int32),
        "detection_class": targets.astype(np.int32),
        "detection_score": rng.random(len(rows)).astype(np.float32),
        "detection_match": (fits[:, None] > np.linspace(0.1, 0.7, 10)).astype(np.int8),
        "truth_count": np.eye(CLASSES, dtype=np.int32)[targets],
        "rows": rows,
    }
    np.savez(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
    found = prediction_of(arrays)
    assert isinstance(found, Detected)
    return _once(DetectionResamples, found)


def _once(resamples: Any, found: Segmented | Detected) -> dict[str, float]:
    weights = np.ones((1, len(found.rows)), np.float32)
    values = resamples(found, weights).metrics(found.metrics, [found])
    return {name: float(value[0, 0]) for name, value in values.items()}


LABELS: dict[str, Predict] = {
    "multiclass": classify,
    "segmentation": segment,
    "detection": detect,
}


def build(
    root: Path,
    shard_folder: Path,
    *,
    dataset: str = "blood",
    labels: str = "multiclass",
    host: str = "here",
    seconds: float = 10.0,
    own: Mapping[str, Mapping[str, Backbone]] | None = None,
    each_seed: bool = False,
    seeds: Sequence[int] = SEEDS,
    predict: Predict | None = None,
) -> list[Entry]:
    """Every task of an experiment on one data set, all of them finished.

    Args:
        labels: which kind, a key of ``LABELS``.
        own: method → the backbones that it has instead of the usual ones.
        each_seed: a pretraining for each seed, instead of one for all.
        predict: writes a task's predictions and returns their metrics; by default that of ``labels``.
    """
    shard = task("shard", dataset, ShardSpec(dataset=Dataset(name=dataset, root="/data")).model_dump())
    entries = [Entry(shard, shard_folder, receipt(shard, metrics={"task": labels}), None)]
    rows, targets = _test_split(shard_folder)
    measured = {"hosts": host, "seconds": seconds, "device": "cuda"}
    for method, (together, skill) in METHODS.items():
        nets = BACKBONES | (own or {}).get(method, {})
        for archs in together:
            for group in [[seed] for seed in seeds] if each_seed else [seeds]:
                suffix = f"-s{group[0]}" if each_seed else ""
                name = f"{dataset}-{method}-{'-'.join(archs)}{suffix}"
                backbones = {arch: nets[arch] for arch in archs}
                pretrain = _pretraining(root / name, shard, dataset, method, backbones, group[0], measured)
                entries.append(pretrain)
                for arch, fraction, seed in itertools.product(archs, FRACTIONS, group):
                    one = _finetuning(
                        dataset, method, arch, nets[arch], fraction, seed, [shard, pretrain.task]
                    )
                    place = root / one.name
                    place.mkdir()
                    odds = skill + 0.1 * (fraction == 1)
                    test = (predict or LABELS[labels])(place, one, rows, targets, odds)
                    metrics = {
                        "num_labels": 3,
                        "num_groups": 2,
                        "fraction_drawn": 0.5,
                        "num_val": 60,
                        "best_epoch": 0,
                    }
                    metrics |= {"val": dict(test), "test": test}
                    left = receipt(one, metrics=metrics, device_seconds=5.0, **measured)
                    entries.append(Entry(one, place, left, None))
    return entries


def _test_split(shard_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of samples.csv, and their classes."""
    index = shards.Index.open(shard_folder)
    rows = index.rows("test")
    return rows, index.targets(rows)


def _pretraining(
    folder: Path,
    shard: Task,
    dataset: str,
    method: str,
    backbones: dict[Any, Backbone],
    seed: int,
    measured: dict[str, Any],
) -> Entry:
    spec = PretrainSpec(
        dataset=dataset,
        label=method,
        method=method,
        options={},
        backbones=backbones,
        train=Training(),
        seed=seed,
    )
    of = task("pretrain", folder.name, spec.model_dump(), [shard])
    folder.mkdir(parents=True)
    write_log(folder, list(backbones))
    metrics = {
        "collapsed": {arch: method == "cass" and arch == "vit" for arch in backbones},
        "backbones": {arch: COUNTED[arch] for arch in backbones},
    }
    left = receipt(
        of,
        metrics=metrics,
        images_seen=0 if method == "supervised" else 3000,
        device_seconds={"supervised": 0.0, "dino": 40.0, "cass": 50.0}[method],
        peak_memory_bytes=2_000_000_000,
        **measured,
    )
    return Entry(of, folder, left, None)


def _finetuning(
    dataset: str,
    method: str,
    arch: Any,
    backbone: Backbone,
    fraction: float,
    seed: int,
    needs: Sequence[Task],
) -> Task:
    spec = FinetuneSpec(
        dataset=dataset,
        label=method,
        arch=arch,
        backbone=backbone,
        protocol="linear",
        fraction=fraction,
        seed=seed,
        settings=FinetuneSettings(),
    )
    name = f"{dataset}-{method}-{arch}-{100 * fraction:g}pc-s{seed}"
    return task("finetune", name, spec.model_dump(), needs)


def write_log(folder: Path, archs: Sequence[str]) -> None:
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
        aggregate.run(
            Work(task=task("aggregate", "trial", spec.model_dump()), folder=folder, everything=entries)
        )
    return folder
