"""Detection through the fine-tune stage, on real shards of a COCO file and exported nets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import shards
from pipeline.errors import UserError
from pipeline.evaluate import images
from pipeline.manifest import Receipt, Task
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export
from pipeline.specs import Backbone, FinetuneSettings, FinetuneSpec
from pipeline.stages import finetune
from pipeline.stages.work import Done, Work

BACKBONE = Backbone(name="test_resnet")
COUNTS = {"train": 12, "val": 3, "test": 4}
THRESHOLDS = 10


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO set with polygons and one crowd, the same without outlines, and an exported net."""
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        (root / "raw" / split).mkdir(parents=True)
        listed: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 1, "name": "dark"}, {"id": 2, "name": "bright"}],
        }
        for number in range(count):
            size = (48, 36) if number % 2 else (32, 40)
            pixels = rng.integers(90, 130, (size[1], size[0], 3)).astype(np.uint8)
            listed["images"].append(
                {"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
            )
            for place in range(number % 3):  # none, one or two
                x, y, width, height = 3 + 14 * place, int(rng.integers(2, 14)), 12, int(rng.integers(10, 18))
                kind = int(rng.integers(1, 3))
                pixels[y : y + height, x : x + width] = 20 if kind == 1 else 240
                corners = [x, y, x + width, y, x + width, y + height, x, y + height]
                listed["annotations"].append(
                    {
                        "id": len(listed["annotations"]) + 1,
                        "image_id": number,
                        "category_id": kind,
                        "bbox": [x, y, width, height],
                        "area": width * height,
                        "iscrowd": int(split == "test" and number == 1),
                        "segmentation": [corners],
                    }
                )
            Image.fromarray(pixels).save(root / "raw" / split / f"{number}.png")
        (root / "raw" / f"outlined_{split}.json").write_text(json.dumps(listed))
        for one in listed["annotations"]:
            del one["segmentation"]
        (root / "raw" / f"plain_{split}.json").write_text(json.dumps(listed))
    for name in ("outlined", "plain"):
        source = shards.CocoSource(root / "raw", images="{split}", annotations=f"{name}_{{split}}.json")
        shards.write(source, root / name, shards.ShardOptions(processes=1, seed=0))
    net = create_backbone(BACKBONE, 32, seed=0, arch="cnn")
    export(net, root / "pretrain" / "cnn", trained={"method": "supervised"})
    return root


@pytest.fixture(autouse=True)
def forget() -> None:
    images._recent.clear()


def run(store: Path, folder: Path, data: str, protocol: str, **changes: Any) -> dict[str, Any]:
    settings = FinetuneSettings(epochs=1, batch_size=4, head_width=8, lr=1e-3)
    given = {"dataset": data, "label": "supervised", "arch": "cnn", "backbone": BACKBONE}
    given |= {"protocol": protocol, "fraction": 1.0, "seed": 0, "settings": settings}
    spec = FinetuneSpec(**(given | changes))
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {
        stage: [done(stage, store / where)] for stage, where in (("shard", data), ("pretrain", "pretrain"))
    }
    task = Task("finetune/one", "finetune", spec.model_dump(mode="json"), (), "0" * 64)
    outcome = finetune.run(Work(task=task, folder=folder, inputs=inputs))
    json.dumps(outcome.metrics, allow_nan=False)
    return outcome.metrics


def done(stage: str, folder: Path) -> Done:
    receipt = Receipt("0" * 64, f"{stage}/x", stage, {}, {}, "", "", 1.0, [], 1)
    return Done(Task(f"{stage}/x", stage, {}, (), "0" * 64), folder, receipt)


@pytest.mark.parametrize("protocol", ["detect", "detect_masks"])
def test_a_task_leaves_metrics_and_what_intervals_are_made_of(
    store: Path, tmp_path: Path, protocol: str
) -> None:
    metrics = run(store, tmp_path, "outlined", protocol)
    kinds = ["box", "mask"] if protocol == "detect_masks" else ["box"]
    assert set(metrics["test"]) == {f"{kind}_{ap}" for kind in kinds for ap in ("ap", "ap50", "ap75")}
    assert metrics["num_labels"] == 12 and metrics["best_epoch"] == 1
    index = shards.Index.open(store / "outlined")
    with np.load(tmp_path / "predictions.npz") as stored:
        arrays = dict(stored)
    np.testing.assert_array_equal(arrays["rows"], index.rows("test", labelled=True))
    assert arrays["truth_count"].shape == (4, 2)
    counted = [int((~index.boxes(row).crowd).sum()) for row in arrays["rows"]]
    assert arrays["truth_count"].sum(axis=1).tolist() == counted and sum(counted) == 2
    for prefix in ["detection", "mask_detection"][: len(kinds)]:
        detections = len(arrays[f"{prefix}_score"])
        assert detections and arrays[f"{prefix}_match"].shape == (detections, THRESHOLDS)
        assert arrays[f"{prefix}_image"].shape == arrays[f"{prefix}_class"].shape == (detections,)
    assert ("mask_detection_score" in arrays) == (protocol == "detect_masks")


def test_masks_are_refused_where_there_are_no_outlines(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="detect_masks needs the outline of every object") as caught:
        run(store, tmp_path, "plain", "detect_masks")
    assert "\n" not in str(caught.value)


def test_label_fractions_draw_images(store: Path, tmp_path: Path) -> None:
    assert run(store, tmp_path, "plain", "detect", fraction=0.25)["num_labels"] == 3
