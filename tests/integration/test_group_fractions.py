"""Label fractions of whole patients, of sets with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards
from pipeline.manifest import Receipt, Task
from pipeline.specs import Backbone, FinetuneSettings, FinetuneSpec
from pipeline.stages import finetune
from pipeline.stages.work import Done, Work


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images with masks, three a patient; the class ``rare`` occurs in two train patients alone."""
    root = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    lines = ["path,mask,patient,split"]
    for number in range(60):
        patient = number // 3
        split = ("train", "train", "train", "val", "test")[patient % 5]
        mask = np.zeros((16, 16), np.uint8)
        mask[4:9, 4:9] = 1
        if patient in (0, 6) or (split != "train" and number % 3 == 0):
            mask[10:13, 10:13] = 2
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"{number}.png")
        Image.fromarray(mask).save(root / f"{number}_m.png")
        lines.append(f"{number}.png,{number}_m.png,p{patient},{split}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    source = shards.CsvSource(
        root,
        split_column="split",
        group_column="patient",
        mask_column="mask",
        mask_classes={"none": 0, "usual": 1, "rare": 2},
    )
    shards.write(source, root / "shards", shards.ShardOptions(processes=1, near_duplicates="warn"))
    return root / "shards"


def problem(pages: Path, fraction: float, seed: int) -> finetune.Problem:
    spec = FinetuneSpec(
        dataset="pages",
        label="x",
        arch="cnn",
        backbone=Backbone(name="test_resnet"),
        protocol="seg_linear",
        fraction=fraction,
        seed=seed,
        settings=FinetuneSettings(fractions_by="group"),
    )
    receipt = Receipt("0" * 64, "x/x", "x", {}, {}, "", "", 1.0, [], 1)
    inputs = {
        stage: [Done(Task(f"{stage}/x", stage, {}, (), "0" * 64), folder, receipt)]
        for stage, folder in (("shard", pages), ("pretrain", pages))
    }
    task = Task("finetune/x", "finetune", {}, (), "0" * 64)
    return finetune.make_problem(Work(task=task, folder=pages, inputs=inputs), spec)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_images_with_masks_are_drawn_by_patient_with_every_class(pages: Path, seed: int) -> None:
    index = shards.Index.open(pages)
    names = index.samples["group"].to_numpy()
    before: set[int] = set()
    for fraction in (0.05, 0.3, 0.6, 1.0):
        found = problem(pages, fraction, seed)
        drawn = found.train.rows
        of_patients = np.intersect1d(np.flatnonzero(np.isin(names, names[drawn])), index.rows("train"))
        np.testing.assert_array_equal(drawn, of_patients)
        assert (found.train.targets.sum(dim=0) > 0).all()  # rare is there with 5 %
        assert len(drawn) == max(3, 3 * round(fraction * 12))
        assert before <= set(drawn.tolist())
        before = set(drawn.tolist())
