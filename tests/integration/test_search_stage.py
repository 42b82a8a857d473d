"""A search, and the pretraining that takes its winner: whole, stopped in the middle, and in one launch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from pretrain_cases import BACKBONES, SIZE, settings, write_shards

from pipeline.launch import main
from pipeline.manifest import Manifest, Receipt, Task
from pipeline.methods.registry import resolve_options
from pipeline.specs import Resources, SearchSpec
from pipeline.stages import search
from pipeline.stages.work import Done, Interrupted, Work

torch.set_num_threads(1)
OPTIONS = {
    "head": "search",
    "candidates": ["vit", "pool", "convnext"],
    "search_epochs": 2,
    "out_dim": 32,
    "hidden": 16,
    "bottleneck": 8,
}


def make_work(folder: Path, shards: Path, stop=lambda: False) -> Work:
    spec = SearchSpec(
        dataset="tiny",
        label="hssl",
        method="hssl",
        options=resolve_options("hssl", OPTIONS),
        backbones={"cnn": BACKBONES["cnn"]},
        train=settings(),
        seed=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    task = Task(id="search/hssl", stage="search", spec=spec.model_dump(), needs=[], key="0" * 64)
    sharded = Task(id="shard/tiny", stage="shard", spec={}, needs=[], key="1" * 64)
    receipt = Receipt(sharded.key, sharded.id, "shard", {}, {}, "", "", 0.0, ["here"], 1)
    return Work(
        task=task,
        folder=folder,
        inputs={"shard": [Done(sharded, shards, receipt)]},
        resources=Resources(device="cpu"),
        stop_requested=stop,
    )


def test_search_ranks_every_candidate_and_one_that_was_stopped_ends_with_the_same_ranking(tmp_path):
    shards = write_shards(tmp_path)
    whole = search.run(make_work(tmp_path / "whole", shards)).metrics
    assert sorted(row["candidate"] for row in whole["ranking"]) == sorted(OPTIONS["candidates"])
    assert whole["decides"] == "head" and whole["winner"] == whole["ranking"][0]["candidate"]
    discrepancies = [row["discrepancy"] for row in whole["ranking"]]
    assert discrepancies == sorted(discrepancies, reverse=True)
    asked = iter([False] * 4 + [True] * 100)
    with pytest.raises(Interrupted):
        search.run(make_work(tmp_path / "stopped", shards, stop=lambda: next(asked)))
    resumed = search.run(make_work(tmp_path / "stopped", shards)).metrics
    assert resumed["ranking"] == whole["ranking"] and resumed["steps"] == whole["steps"]


@pytest.mark.slow
def test_launch_searches_and_then_pretrains_with_the_winner(tmp_path):
    experiment = {
        "dataset": {"source": "digits"},
        "backbones": {"cnn": {"name": "resnet10t", "args": {"channels": [16, 16, 32, 32]}}},
        "methods": {"hssl": {"options": OPTIONS | {"search_epochs": 0.1}}},
        "seeds": [0],
        "pretrain": {"epochs": 0.1, "batch_size": 64, "image_size": SIZE, "probe_epochs": None},
        "finetune": {"protocols": ["knn"], "fractions": [0.1]},
        "report": {"bootstrap": 20},
    }
    file = tmp_path / "searched.yaml"
    file.write_text(yaml.safe_dump(experiment))
    places = ["--cluster", "local", "--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as ended:
        main(["all", str(file), *places])
    assert ended.value.code == 0
    manifest = Manifest.read(tmp_path / "runs" / "searched" / "manifest.json")
    task = next(task for task in manifest.tasks if task.stage == "search")
    winner = manifest.receipt(task).metrics["winner"]
    (folder,) = (tmp_path / "store" / "pretrain").iterdir()
    exported = json.loads((folder / "cnn" / "config.json").read_text())
    assert exported["training"]["options"]["head"] == winner in OPTIONS["candidates"]
