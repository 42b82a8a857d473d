"""The segmentation protocols on real shards and exported nets, small enough for one core."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import shards
from pipeline.errors import UserError
from pipeline.evaluate import features, images, seg_fpn, seg_linear
from pipeline.manifest import Receipt, Task
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export, load_exported
from pipeline.specs import Backbone, FinetuneSettings, FinetuneSpec
from pipeline.stages import finetune
from pipeline.stages.work import Done, Interrupted, Work

SIZE = 32
BACKBONES = {
    "cnn": Backbone(name="test_resnet", args={"output_stride": 8}),
    "vit": Backbone(
        name="vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4}
    ),
}
PROTOCOLS = ["seg_linear", "seg_fpn"]
SHAPES = ((40, 56), (48, 48), (33, 61), (64, 37))  # height and width
COUNTS = {"train": 18, "val": 6, "test": 8}


def scene(rng: np.random.Generator, shape: tuple[int, int], *, red: bool) -> tuple[np.ndarray, np.ndarray]:
    """A dark ground with a bright square and perhaps a red one; their outlines are of no class."""
    pixels, mask = rng.normal(60, 20, (*shape, 3)), np.zeros(shape, np.uint8)
    for label, colour in ((1, (190, 190, 190)), (2, (200, 60, 60)))[: 1 + red]:
        side = min(shape) // 3
        middle = shape[1] // 2
        top = int(rng.integers(0, shape[0] - side))
        left = int(rng.integers(0, middle - side)) + (middle if label == 2 else 0)
        pixels[top : top + side, left : left + side] = rng.normal(colour, 20, (side, side, 3))
        mask[top : top + side, left : left + side] = 255
        mask[top + 1 : top + side - 1, left + 1 : left + side - 1] = label
    return np.clip(pixels, 0, 255).astype(np.uint8), mask


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``squares``: three classes, one of which is missing from validation, and two images without a mask.
    ``plain``: two classes, both in every image. And two exported nets."""
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for data in ("squares", "plain"):
        for split, count in COUNTS.items():
            for number in range(count):
                red = data == "squares" and split != "val" and number % 3 == 0
                pixels, mask = scene(rng, SHAPES[number % len(SHAPES)], red=red)
                for kind, image in (("images", pixels), ("masks", mask)):
                    if kind == "masks" and data == "squares" and split == "train" and number < 2:
                        continue
                    path = root / "raw" / data / kind / split / f"{number:02}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(image).save(path)
        source = shards.MaskSource(root / "raw" / data)
        shards.write(source, root / data, shards.ShardOptions(processes=1, seed=0))
    for arch, backbone in BACKBONES.items():
        net = create_backbone(backbone, SIZE, seed=0, arch=arch)  # type: ignore[arg-type]
        export(net, root / "pretrain" / arch, trained={"method": "supervised"})
    coarse = create_backbone(Backbone(name="test_resnet"), SIZE, seed=0)  # its last map has one place
    export(coarse, root / "coarse" / "cnn", trained={"method": "supervised"})
    return root


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(seg_linear, "PIXELS", 1000)
    monkeypatch.setattr(seg_linear, "PER_CLASS", 100)


def forget() -> None:
    features._recent_maps.clear()
    images._recent.clear()


def work(
    store: Path, folder: Path, *, data: str = "squares", pretrained: str = "pretrain", **changes: Any
) -> Work:
    settings = {"epochs": 2, "batch_size": 4, "lr": 3e-3, "head_width": 16, "augment": "light"}
    settings |= changes.pop("settings", {})
    arch = changes.get("arch", "cnn")
    given = {
        "dataset": data,
        "label": "supervised",
        "arch": arch,
        "backbone": BACKBONES[arch],
        "protocol": "seg_linear",
        "fraction": 1.0,
        "seed": 0,
        "settings": FinetuneSettings(**settings),
    }
    spec = FinetuneSpec(**(given | changes))
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {
        stage: [done(stage, store / where)] for stage, where in (("shard", data), ("pretrain", pretrained))
    }
    task = Task("finetune/one", "finetune", spec.model_dump(mode="json"), (), "0" * 64)
    return Work(task=task, folder=folder, inputs=inputs)


def run(store: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    outcome = finetune.run(work(store, folder, **changes))
    json.dumps(outcome.metrics, allow_nan=False)  # what a receipt can hold
    return outcome.metrics


def done(stage: str, folder: Path) -> Done:
    receipt = Receipt("0" * 64, f"{stage}/x", stage, {}, {}, "", "", 1.0, [], 1)
    return Done(Task(f"{stage}/x", stage, {}, (), "0" * 64), folder, receipt)


def predictions(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "predictions.npz") as stored:
        return dict(stored)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("arch", ["cnn", "vit"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_learns_bright_squares(store: Path, tmp_path: Path, protocol: str, arch: str) -> None:
    metrics = run(store, tmp_path, protocol=protocol, arch=arch, settings={"epochs": 12, "image_size": 64})
    index = shards.Index.open(store / "squares")
    rows = index.rows("test", labelled=True)
    found = predictions(tmp_path)
    assert set(found) == {"confusion", "rows"}
    np.testing.assert_array_equal(found["rows"], rows)
    assert found["confusion"].dtype == np.uint32
    pixels = [np.bincount(index.mask(int(row)).ravel(), minlength=256)[:3] for row in rows]
    np.testing.assert_array_equal(found["confusion"].sum(axis=2), pixels)  # all but the outlines
    assert metrics["num_labels"] == COUNTS["train"] - 2
    chance = np.sum(pixels, axis=0)[0] / np.sum(pixels) / 3  # all of it ground
    assert metrics["test"]["miou"] > 1.4 * chance
    assert set(metrics["val"]) == {"miou", "mean_dice", "mean_accuracy", "pixel_accuracy"}
    assert metrics["best_epoch"] >= 1 if protocol == "seg_fpn" else metrics["weight_decay"] > 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_result_does_not_depend_on_what_ran_before(store: Path, tmp_path: Path, protocol: str) -> None:
    alone = run(store, tmp_path / "alone", protocol=protocol, fraction=0.3)
    assert alone["num_labels"] == 5
    forget()
    torch.manual_seed(123)
    for other in ({"fraction": 1.0}, {"fraction": 0.3, "seed": 5}, {"arch": "vit"}):
        run(store, tmp_path / "other", **({"protocol": protocol} | other))
    packed = run(store, tmp_path / "packed", protocol=protocol, fraction=0.3)
    assert packed == alone
    first, second = predictions(tmp_path / "alone"), predictions(tmp_path / "packed")
    np.testing.assert_array_equal(first["confusion"], second["confusion"])


def test_another_seed_gives_another_training(store: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(store, tmp_path / str(seed), protocol="seg_fpn", seed=seed, settings={"epochs": 1})
    first, second = (predictions(tmp_path / str(seed))["confusion"] for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize("arch", ["cnn", "vit"])
def test_the_linear_probe_leaves_the_backbone_as_it_is(store: Path, tmp_path: Path, arch: str) -> None:
    def state() -> list[str]:
        files = sorted((store / "pretrain" / arch).iterdir())
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    before = state()
    net = load_exported(store / "pretrain" / arch, num_classes=0).eval()
    run(store, tmp_path, arch=arch)
    assert state() == before
    for maps in features._recent_maps.values():
        assert not any(one.requires_grad for one in maps)
    used = next(iter(features._recent_maps.values()))[0]  # of the training images, in the split's order
    index = shards.Index.open(store / "squares")
    rows = index.rows("train")
    seen = images.ImageSet(index, rows, image_size=SIZE).batch(np.arange(len(rows)))
    with torch.no_grad():
        maps = net.feature_map((seen.float() / 255).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(used, maps, atol=1e-5, rtol=1e-4)


def test_a_class_that_validation_lacks_is_learned_all_the_same(store: Path, tmp_path: Path) -> None:
    index = shards.Index.open(store / "squares")
    assert (index.targets(index.rows("val"))[:, 2] == 0).all()
    run(store, tmp_path, arch="vit")
    confusion = predictions(tmp_path)["confusion"].sum(axis=0)
    assert confusion[2, 2] > confusion[2].sum() / 2


@pytest.mark.parametrize(
    ("pretrained", "arch"), [("pretrain", "vit"), ("pretrain", "cnn"), ("coarse", "cnn")]
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_labelled_image_is_enough_to_train_on(
    store: Path, tmp_path: Path, protocol: str, pretrained: str, arch: str
) -> None:
    which = {"protocol": protocol, "arch": arch, "pretrained": pretrained}
    metrics = run(store, tmp_path, data="plain", fraction=0.01, **which)
    assert metrics["num_labels"] == 1
    assert metrics["test"]["miou"] > 0


@pytest.mark.parametrize(
    "changes", [{"fit": "pad"}, {"fit": "crop"}, {"loss": "focal"}, {"class_weights": "none"}]
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_settings_are_heeded(store: Path, tmp_path: Path, protocol: str, changes: dict[str, Any]) -> None:
    run(store, tmp_path / "plain", protocol=protocol)
    forget()
    run(store, tmp_path / "changed", protocol=protocol, settings=changes)
    first, second = (predictions(tmp_path / name)["confusion"] for name in ("plain", "changed"))
    np.testing.assert_array_equal(first.sum(axis=2), second.sum(axis=2))
    same = (
        changes == {"loss": "focal"} and protocol == "seg_linear"
    )  # a linear probe is a logistic regression
    assert (first != second).any() != same


def test_the_best_epoch_is_kept(store: Path, tmp_path: Path) -> None:
    metrics = run(store, tmp_path, protocol="seg_fpn", settings={"epochs": 6, "patience": 2})
    scores = [line["val"]["miou"] for line in log(tmp_path)]
    assert metrics["best_epoch"] == int(np.argmax(scores)) + 1
    assert metrics["val"]["miou"] == max(scores)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_test_split_is_predicted_once(
    store: Path, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    module = {"seg_linear": seg_linear, "seg_fpn": seg_fpn}[protocol]
    count = module.confusions
    monkeypatch.setattr(
        module,
        "confusions",
        lambda problem, split, *a, **k: asked.append(split) or count(problem, split, *a, **k),
    )
    run(store, tmp_path, protocol=protocol)
    test = shards.Index.open(store / "squares").rows("test", labelled=True)
    touched = [np.array_equal(split.rows, test) for split in asked]
    assert touched == [False] * (len(touched) - 1) + [True]


def test_features_are_standardised_by_every_train_image(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labelled or not: with one labelled image, its few pixels would say little of the others."""
    seen = []
    span = seg_linear.SampleSpan
    monkeypatch.setattr(
        seg_linear, "SampleSpan", lambda features, every: seen.append(every) or span(features, every)
    )
    for name, fraction in (("all", 1.0), ("one", 0.05)):
        forget()
        run(store, tmp_path / name, data="squares", fraction=fraction)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert len(seen[0]) >= COUNTS["train"]


def test_maps_of_some_images_are_those_of_all(store: Path, tmp_path: Path) -> None:
    """What is remembered of every train image serves for the labelled ones, in the same bits."""
    given = work(store, tmp_path, data="squares", fraction=0.3)
    problem = finetune.make_problem(given, FinetuneSpec.model_validate(given.task.spec))
    alone = torch.cat(list(features.maps_of(problem, problem.train)))
    forget()
    whole = list(features.maps_of(problem, features.every_train_image(problem)))
    after = torch.cat(list(features.maps_of(problem, problem.train)))
    assert len(features._recent_maps) == 1 and len(torch.cat(whole)) > len(alone)
    torch.testing.assert_close(after, alone, rtol=0, atol=0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_stop_is_heeded(store: Path, tmp_path: Path, protocol: str) -> None:
    given = work(store, tmp_path, protocol=protocol)
    given = Work(task=given.task, folder=tmp_path, inputs=given.inputs, stop_requested=lambda: True)
    with pytest.raises(Interrupted):
        finetune.run(given)
    assert not (tmp_path / "predictions.npz").exists()


def test_maps_that_do_not_fit_in_memory_are_made_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(store, tmp_path / "kept")
    forget()
    monkeypatch.setattr(features, "available_memory", lambda: 0)
    assert run(store, tmp_path / "made") == kept
    assert not features._recent_maps


def test_a_metric_of_another_kind_is_refused_in_one_line(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="select_by: no metric 'mio' for segmentation data, did you mean"):
        run(store, tmp_path, settings={"select_by": "mio"})
