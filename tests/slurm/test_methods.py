"""Every method on two nodes of a real Slurm, from the experiment file to the tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from pipeline.methods.registry import METHODS

SMALL: dict[str, Any] = {
    "hidden": 32,
    "out_dim": 32,
    "bottleneck": 16,
    "projector_hidden": 32,
    "projector_dim": 16,
    "pretext_hidden": [16, 8],
    "patch_out_dim": 32,
    "depth": 1,
    "head": "search",
    "candidates": ["convnext", "pool"],
    "search_epochs": 0.05,
}
VIT = {"name": "vit_tiny_patch16_224", "args": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}}
OWN = {"scatsimclr": {"cnn": {"name": "test_scatnet"}}}
HOURLESS = {"minutes": 10}


def entry(name: str) -> dict[str, Any]:
    info = METHODS[name]
    options = {key: value for key, value in SMALL.items() if key in info.options.model_fields}
    if name.startswith("cass"):
        del options["head"]  # which is another option there
    both = {"cnn": {"name": "test_resnet"}}
    return {"options": options, "backbones": both if info.joint else OWN.get(name, {})}


def experiment() -> dict[str, Any]:
    return {
        "name": "methods",
        "dataset": {"source": "digits", "shard_samples": 500},
        "backbones": {"vit": VIT},
        "methods": {name: entry(name) for name in METHODS},
        "seeds": [0],
        "pretrain": {"epochs": 0.1, "batch_size": 64, "image_size": 16, "probe_epochs": None},
        "finetune": {"protocols": ["knn"], "fractions": [0.1]},
        "report": {"bootstrap": 20},
        "resources": {
            "search": HOURLESS | {"nodes": 2},
            "pretrain": HOURLESS | {"nodes": 2},
            **{stage: HOURLESS for stage in ("shard", "finetune", "aggregate")},
        },
    }


@pytest.mark.timeout(1200)
def test_every_method_trains_on_two_nodes_and_stands_in_the_tables(testbed, launch, profile_file, tmp_path):
    file = tmp_path / "methods.yaml"
    file.write_text(yaml.safe_dump(experiment()))
    launch("all", str(file), "--cluster", profile_file, "--wait", timeout=1100)
    receipts = [json.loads(path.read_text()) for path in tmp_path.glob("store/*/*/receipt.json")]
    trained = {one["task"]: one["world_size"] for one in receipts if one["stage"] in ("search", "pretrain")}
    assert len(trained) == len(METHODS) + 2, "a pretraining a method, and two searches"
    assert set(trained.values()) == {2}
    table = pd.read_csv(Path(tmp_path, "runs", "methods", "tables", "results.csv"))
    assert set(table.loc[table.status == "done", "method"]) == set(METHODS)
    assert set(table.loc[table.method == "scatsimclr", "arch"]) == {"cnn"}
    assert table["macro_f1"].notna().all()
