"""The shard stage reads what a data set of the experiment file describes."""

from __future__ import annotations

import json

import pytest
from test_shards_boxes import like_bccd
from test_shards_masks import flat, like_nuclei, table

import shards
from pipeline.errors import UserError
from pipeline.experiment_file import load_experiment
from pipeline.manifest import Task
from pipeline.plan import plan
from pipeline.preflight import preflight
from pipeline.specs import Dataset
from pipeline.stages.shard import check_source, source_of

BCCD = {"images": "images/{split}", "annotations": "instances_{split}.json"}


def index_of(tmp_path, **given) -> shards.Index:
    dataset = Dataset(root=str(tmp_path / "in"), **given)
    return shards.write(source_of(dataset), tmp_path / "out")


def test_masks_in_folders(tmp_path):
    root = like_nuclei(tmp_path / "in", [0, 128])
    (root / "images").rename(root / "pictures")
    classes = {"nucleus": 128, "background": 0}
    index = index_of(tmp_path, source="masks", images="pictures", masks="masks", mask_classes=classes)
    assert index.task == "segmentation" and index.classes == ["background", "nucleus"]


def test_masks_in_a_column(tmp_path):
    table(tmp_path / "in")
    options = {"mask_column": "mask", "group_column": "patient", "split_column": "part"}
    index = index_of(tmp_path, source="csv", mask_classes={"rest": 0, "cell": 1}, mask_ignore=255, **options)
    assert index.task == "segmentation" and index.classes == ["rest", "cell"]
    assert index.samples.groupby("group")["split"].nunique().max() == 1


@pytest.mark.parametrize(
    "given",
    [
        {"source": "coco", **BCCD},
        {"source": "voc", "images": "images", "annotations": "annotations_voc"},
    ],
)
def test_boxes(tmp_path, given):
    like_bccd(tmp_path / "in")
    index = index_of(tmp_path, classes=["WBC", "RBC", "Platelets"], **given)
    assert index.task == "detection" and index.classes == ["WBC", "RBC", "Platelets"]
    assert sum(len(index.boxes(row)) for row in range(len(index))) > 20


def test_what_is_wrong_is_said_before_anything_is_submitted(tmp_path):
    flat(tmp_path / "in", [0, 1], 3)
    task = shard_task(source="masks", root=str(tmp_path / "in"), masks="mask")
    with pytest.raises(shards.InputError, match=r"masks: there is no .*mask"):
        check_source(task)


def shard_task(**given) -> Task:
    dataset = Dataset(name="x", **given)
    return Task("shard/x", "shard", {"dataset": dataset.model_dump(mode="json")}, (), "0" * 64)


def test_objects_that_all_lack_an_outline_are_found_before_anything_is_submitted(tmp_path, capsys):
    root = tmp_path / "in"
    like_bccd(root)
    task = shard_task(source="coco", root=str(root), **BCCD)
    for file in root.glob("*.json"):
        content = json.loads(file.read_text())
        for one in content["annotations"]:
            one["segmentation"] = []
        file.write_text(json.dumps(content))
    check_source(task)
    with pytest.raises(
        UserError, match=r"finetune\.protocols: detect_masks needs .* detect needs boxes only"
    ):
        check_source(task, outlined="detect_masks")
    one["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    file.write_text(json.dumps(content))
    check_source(task, outlined="detect_masks")
    assert "have none" in capsys.readouterr().err


def test_preflight_asks_for_outlines_where_masks_are_to_be_learned(tmp_path):
    like_bccd(tmp_path / "in")
    for file in (tmp_path / "in").glob("*.json"):
        content = json.loads(file.read_text())
        content["annotations"] = [one | {"segmentation": []} for one in content["annotations"]]
        file.write_text(json.dumps(content))
    path = tmp_path / "x.yaml"
    given = {"source": "coco", "root": str(tmp_path / "in"), **BCCD}
    path.write_text(
        f"dataset: {json.dumps(given)}\nbackbones: {{cnn: {{name: test_resnet}}}}\nmethods: [supervised]\n"
        "pretrain: {image_size: 32}\n"
    )
    preflight(plan(load_experiment(str(path), ["finetune.protocols=[detect]"])))
    tasks = plan(load_experiment(str(path), ["finetune.protocols=[detect, detect_masks]"]))
    with pytest.raises(UserError, match="detect_masks needs the outline"):
        preflight(tasks)
    shards.write(shards.CocoSource(tmp_path / "in", **BCCD), tmp_path / "sharded")
    later = [task for task in tasks if task.stage != "shard"]
    with pytest.raises(UserError, match="detect_masks needs the outline"):
        preflight(later, {"shard/x": tmp_path / "sharded"})
