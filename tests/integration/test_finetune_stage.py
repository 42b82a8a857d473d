"""The fine-tune stage on real shards and exported nets, small enough for one core."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import shards
from pipeline.errors import UserError
from pipeline.evaluate import features, images, linear
from pipeline.evaluate.problem import Split
from pipeline.evaluate.select import gains_beyond_chance
from pipeline.manifest import Receipt, Task
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export
from pipeline.specs import Backbone, FinetuneSettings, FinetuneSpec
from pipeline.stages import finetune
from pipeline.stages.work import Done, Interrupted, Work

SIZE = 32
BACKBONES = {
    "cnn": Backbone(name="test_resnet"),
    "vit": Backbone(
        name="vit_tiny_patch16_224", args={"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    ),
}
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured noise in three classes, with single and with several labels, and two exported nets."""
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    single, several = ["path,label,split"], ["path,red,green,blue,split"]
    (root / "raw").mkdir()
    for number in range(150):
        label, other = number % 3, rng.integers(3)
        colour = (COLOURS[label] + (COLOURS[other] if number % 5 == 0 else COLOURS[label])) / 2
        pixels = np.clip(colour + rng.normal(0, 50, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "raw" / f"{number:03}.png")
        split = ("train", "train", "train", "val", "test")[number // 3 % 5]
        name = "" if number in (0, 1) else "rgb"[label]  # two images without a label
        single.append(f"{number:03}.png,{name},{split}")
        present = [int(k in (label, other if number % 5 == 0 else label)) for k in range(3)]
        several.append(f"{number:03}.png,{','.join(map(str, present))},{split}")
    for name, lines, columns in (
        ("single", single, ["label"]),
        ("several", several, ["red", "green", "blue"]),
    ):
        (root / "raw" / f"{name}.csv").write_text("\n".join(lines) + "\n")
        source = shards.CsvSource(
            root / "raw", csv=f"{name}.csv", label_columns=columns, split_column="split"
        )
        shards.write(source, root / name, shards.ShardOptions(processes=1, seed=0))
    for arch, backbone in BACKBONES.items():
        net = create_backbone(backbone, SIZE, seed=0, arch=arch)  # type: ignore[arg-type]
        export(net, root / "pretrain" / arch, trained={"method": "supervised"})
    return root


@pytest.fixture(autouse=True)
def forget() -> None:
    features._recent.clear()
    images._recent.clear()
    linear._newest = None


def run(store: Path, folder: Path, *, data: str = "single", **changes: Any) -> tuple[dict[str, Any], Path]:
    settings = {"epochs": 2, "batch_size": 16, "lr": 1e-3} | changes.pop("settings", {})
    arch = changes.get("arch", "cnn")
    given = {
        "dataset": data,
        "label": "supervised",
        "arch": arch,
        "backbone": BACKBONES[arch],
        "protocol": "linear",
        "fraction": 1.0,
        "seed": 0,
        "settings": FinetuneSettings(**settings),
    }
    spec = FinetuneSpec(**(given | changes))
    folder.mkdir(parents=True, exist_ok=True)
    inputs = {
        stage: [done(stage, store / where)] for stage, where in (("shard", data), ("pretrain", "pretrain"))
    }
    task = Task("finetune/one", "finetune", spec.model_dump(mode="json"), (), "0" * 64)
    outcome = finetune.run(Work(task=task, folder=folder, inputs=inputs))
    json.dumps(outcome.metrics, allow_nan=False)  # what a receipt can hold
    return outcome.metrics, folder


def done(stage: str, folder: Path) -> Done:
    receipt = Receipt("0" * 64, f"{stage}/x", stage, {}, {}, "", "", 1.0, [], 1)
    return Done(Task(f"{stage}/x", stage, {}, (), "0" * 64), folder, receipt)


def predictions(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "predictions.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("separator", [None, "|"])
def test_set_with_one_class_is_for_pretraining_not_for_fine_tuning(
    store: Path, tmp_path: Path, separator: str | None
) -> None:
    rows = "".join(f"{number:03}.png,only\n" for number in range(20))
    (store / "raw" / "one.csv").write_text(f"path,label\n{rows}")
    source = shards.CsvSource(store / "raw", csv="one.csv", label_separator=separator)
    index = shards.write(source, tmp_path / "one", shards.ShardOptions(processes=1))
    assert index.warnings == ["there is only one class, 'only': good for pretraining, not for fine-tuning"]
    with pytest.raises(UserError, match=r"only one class, 'only'; fine-tuning needs at least two"):
        run(store, tmp_path, data=str(tmp_path / "one"))


@pytest.mark.parametrize("arch", ["cnn", "vit"])
@pytest.mark.parametrize("protocol", ["finetune", "linear", "knn"])
@pytest.mark.parametrize("data", ["single", "several"])
def test_every_protocol_learns_colours(
    store: Path, tmp_path: Path, data: str, protocol: str, arch: str
) -> None:
    settings = {"epochs": 6, "lr": 3e-3, "augment": "none"}
    metrics, folder = run(store, tmp_path, data=data, protocol=protocol, arch=arch, settings=settings)
    index = shards.Index.open(store / data)
    found = predictions(folder)
    rows = index.rows("test", labelled=True)
    np.testing.assert_array_equal(found["rows"], rows)
    np.testing.assert_array_equal(found["targets"], index.targets(rows))
    assert found["rows"].dtype == np.int64 and found["probabilities"].dtype == np.float32
    assert found["targets"].dtype == (np.uint8 if data == "several" else np.int64)
    assert found["probabilities"].shape == (len(rows), 3)
    assert metrics["num_labels"] == len(index.rows("train", labelled=True))
    assert metrics["test"]["macro_auroc"] > 0.85
    assert ("map" in metrics["test"]) == (data == "several")
    assert metrics["best_epoch"] >= 0 if protocol == "finetune" else metrics["best_epoch"] == 0


def test_unlabelled_images_are_not_learned_from(store: Path, tmp_path: Path) -> None:
    metrics, _ = run(store, tmp_path, protocol="knn")
    assert metrics["num_labels"] == len(shards.Index.open(store / "single").rows("train")) - 2


@pytest.mark.parametrize("protocol", ["finetune", "linear", "knn"])
def test_result_does_not_depend_on_what_ran_before(store: Path, tmp_path: Path, protocol: str) -> None:
    alone, _ = run(store, tmp_path / "alone", protocol=protocol, fraction=0.3)
    features._recent.clear()
    images._recent.clear()
    linear._newest = None
    torch.manual_seed(123)
    for other in ({"fraction": 1.0}, {"fraction": 0.3, "seed": 5}, {"arch": "vit"}):
        run(store, tmp_path / "other", **({"protocol": protocol} | other))
    torch.rand(3)
    packed, _ = run(store, tmp_path / "packed", protocol=protocol, fraction=0.3)
    assert packed == alone
    first, second = predictions(tmp_path / "alone"), predictions(tmp_path / "packed")
    np.testing.assert_array_equal(first["probabilities"], second["probabilities"])


def test_the_callers_random_state_is_left_alone(store: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    run(store, tmp_path, protocol="finetune", settings={"epochs": 1})
    assert torch.equal(torch.rand(1), expected)


def test_another_seed_gives_another_training(store: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(store, tmp_path / str(seed), protocol="finetune", seed=seed, settings={"epochs": 1})
    first, second = (predictions(tmp_path / str(seed))["probabilities"] for seed in (0, 1))
    assert (first != second).any()


def test_packed_tasks_extract_and_decode_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted, decoded = [], []
    extract, decode = features._extract, shards.Index.decode
    monkeypatch.setattr(
        features, "_extract", lambda problem, split: extracted.append(1) or extract(problem, split)
    )
    monkeypatch.setattr(shards.Index, "decode", lambda self, row: decoded.append(row) or decode(self, row))
    for protocol in ("linear", "knn"):
        for seed in (0, 1):
            run(store, tmp_path, protocol=protocol, seed=seed)
    assert len(extracted) == 3  # train, val, test
    run(store, tmp_path, protocol="linear", fraction=0.1)
    assert len(extracted) == 3  # a part of them
    assert len(decoded) == len(set(decoded))


def test_equal_linear_fits_of_packed_seeds_are_made_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []
    fit = linear.fit_logistic
    monkeypatch.setattr(linear, "fit_logistic", lambda *a, **k: fits.append(1) or fit(*a, **k))
    run(store, tmp_path / "0")
    first = len(fits)
    run(store, tmp_path / "1", seed=1)
    assert len(fits) == first, "with all labels both seeds have the same images"
    results = [predictions(tmp_path / seed)["probabilities"] for seed in "01"]
    np.testing.assert_array_equal(*results)
    for other in ({"seed": 0, "fraction": 0.3}, {"seed": 1, "fraction": 0.3}, {"arch": "vit"}):
        before = len(fits)
        run(store, tmp_path / "other", **other)
        assert len(fits) > before, other


def test_feature_tables_are_forgotten_in_time(store: Path, tmp_path: Path) -> None:
    for seed in range(8):
        run(store, tmp_path, protocol="knn", fraction=0.2, seed=seed)
    assert len(features._recent) <= features.KEPT
    assert len(images._recent) <= images.KEPT


def test_fraction_of_the_validation_labels_where_asked(store: Path, tmp_path: Path) -> None:
    full, _ = run(store, tmp_path, protocol="knn", fraction=0.2, settings={"validation": "full"})
    part, _ = run(store, tmp_path, protocol="knn", fraction=0.2)
    assert full["num_val"] == 30
    assert part["num_val"] == 6
    assert part["test"] == full["test"]


def test_patience_stops_and_the_best_epoch_is_kept(store: Path, tmp_path: Path) -> None:
    settings = {"epochs": 12, "patience": 2, "lr": 3e-3, "augment": "none", "head": "random"}
    metrics, folder = run(store, tmp_path, protocol="finetune", arch="vit", settings=settings)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = [line["val"]["macro_f1"] for line in log]
    best = int(np.argmax(scores)) + 1
    assert metrics["best_epoch"] == best
    assert metrics["val"]["macro_f1"] == max(scores)
    worse = [epoch for epoch in range(best, len(scores)) if scores[epoch] < max(scores)]
    assert (len(worse) == 2 and worse[-1] == len(scores) - 1) or len(scores) == 12


def test_max_steps_ends_the_training_and_the_cosine(store: Path, tmp_path: Path) -> None:
    settings = {"epochs": 50, "max_steps": 8, "lr_min": 1e-5, "head": "random"}
    _, folder = run(store, tmp_path, protocol="finetune", settings=settings)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 8
    assert [line["step"] for line in log] == [6, 8]  # 88 labels in batches of at most 16
    assert log[-1]["lr"] == pytest.approx(1e-5)
    expected = 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * 6 / 8)) / 2
    assert log[0]["lr"] == pytest.approx(expected)


def test_the_test_split_is_predicted_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.evaluate import finetune as protocol

    asked = []
    predict = protocol.predict
    monkeypatch.setattr(
        protocol,
        "predict",
        lambda problem, split, *, net: asked.append(split) or predict(problem, split, net=net),
    )
    run(store, tmp_path, protocol="finetune", settings={"epochs": 3})
    test = shards.Index.open(store / "single").rows("test", labelled=True)
    touched = [np.array_equal(split.rows, test) for split in asked]
    assert touched == [False, False, False, False, True]  # before the first epoch, too


def test_stop_is_heeded_between_steps(store: Path, tmp_path: Path) -> None:
    spec = FinetuneSpec(
        dataset="single",
        label="supervised",
        arch="cnn",
        backbone=BACKBONES["cnn"],
        protocol="finetune",
        fraction=1,
        seed=0,
        settings=FinetuneSettings(epochs=3),
    )
    inputs = {"shard": [done("shard", store / "single")], "pretrain": [done("pretrain", store / "pretrain")]}
    task = Task("finetune/one", "finetune", spec.model_dump(mode="json"), (), "0" * 64)
    with pytest.raises(Interrupted):
        finetune.run(Work(task=task, folder=tmp_path, inputs=inputs, stop_requested=lambda: True))
    assert not (tmp_path / "predictions.npz").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "lineer"}, "no protocol 'lineer', did you mean 'linear'"),
        ({"settings": {"select_by": "map"}}, "select_by: no metric 'map' for single-label"),
    ],
)
def test_users_mistakes_get_one_line(
    store: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(store, tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_scores_that_fall_do_not_end_the_search_for_a_weight_decay() -> None:
    features, targets = torch.randn(40, 4), torch.arange(40) % 2
    scores = [0.5, 0.4, 0.3, 0.9, 0.1, 0.1, 0.1]
    given = iter(scores)
    _, decay, log = linear.pick_weight_decay(
        *(features, targets),
        num_classes=2,
        weights=None,
        score=lambda _: ({}, next(given)),
        tick=lambda *_: None,
    )
    assert len(log) == len(scores) and decay == linear.WEIGHT_DECAYS[3]


def test_scores_that_tie_do_not_end_the_search_for_a_weight_decay() -> None:
    """The strongest decays predict the common class alone and score alike: the grid goes on past them."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.zeros(60, dtype=torch.int64)
    targets[:3] = 1
    features = torch.randn(60, 8, generator=generator)
    features[targets == 1] += 1.5

    def score(solution: torch.Tensor) -> tuple[dict[str, float], float]:
        said = linear.predict_logits(features, solution).argmax(dim=1)
        hit = float(((said == 1) & (targets == 1)).sum())
        return {}, 2 * hit / max(1.0, float((said == 1).sum() + (targets == 1).sum()))

    _, decay, log = linear.pick_weight_decay(
        features, targets, num_classes=2, weights=None, score=score, tick=lambda *_: None
    )
    assert len(log) > 4 and decay < 1


def test_features_are_standardised_by_every_train_image(store: Path, tmp_path: Path) -> None:
    """With one image a class, its mean and variance would say nothing of the others."""
    metrics, _ = run(store, tmp_path, protocol="knn", fraction=0.01)
    assert metrics["num_labels"] == 3 and metrics["test"]["accuracy"] > 0.5


def test_few_validation_images_choose_with_the_labelled_ones_by_cross_validation(
    store: Path, tmp_path: Path
) -> None:
    _, folder = run(store, tmp_path, protocol="linear", fraction=0.2)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == len(linear.WEIGHT_DECAYS) and all("cross_validation" in line for line in log)


def test_a_linear_probe_does_not_depend_on_the_task_before_it(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all labels every seed has the same images, and one fit serves all: the folds must not differ."""
    for seed in (1, 2, 3):
        found = []
        for before in (False, True):
            monkeypatch.setattr(linear, "_newest", None)
            if before:
                run(store, tmp_path / f"before{seed}", arch="vit", seed=0)
            found.append(predictions(run(store, tmp_path / f"{before}{seed}", arch="vit", seed=seed)[1]))
        np.testing.assert_array_equal(found[0]["probabilities"], found[1]["probabilities"])


@pytest.mark.parametrize("several", [False, True])
def test_folds_spread_every_class(several: bool) -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, 50) if not several else (rng.random((50, 3)) < [0.5, 0.2, 0.1]).astype(float)
    folds = linear.folds_of(targets, np.full(50, ""))
    assert set(folds) == set(range(5)) and np.ptp(np.bincount(folds)) <= 2
    rare = targets == 0 if not several else targets[:, targets.sum(axis=0).argmin()] > 0
    spread = [int((folds[rare] == fold).sum()) for fold in range(5)]
    assert max(spread) - min(spread) <= 1


def test_images_of_one_patient_are_in_one_fold() -> None:
    rng = np.random.default_rng(0)
    groups = np.array([f"p{number}" for number in rng.integers(0, 20, 100)])
    groups[:10] = ""
    targets = rng.integers(0, 2, 100)
    folds = linear.folds_of(targets, groups)
    assert all(len(set(folds[groups == name])) == 1 for name in set(groups) - {""})
    assert len(set(folds[:10])) > 1 and np.ptp(np.bincount(folds)) <= 6
    assert np.bincount(folds[targets == 1], minlength=5).min() >= 6  # of about 10
    assert set(linear.folds_of(targets, np.full(100, "one"))) == set(range(5))


def test_the_start_is_left_only_for_a_gain_beyond_chance() -> None:
    """Of 40 images, 25 right are no better than 23 beyond chance, and 38 are; 10 of one patient are not."""
    truth = torch.arange(40) % 3

    def right(count: int, seed: int) -> np.ndarray:
        answers = truth.numpy().copy()
        wrong = np.random.default_rng(seed).permutation(40)[count:]
        answers[wrong] = (answers[wrong] + 1) % 3
        return np.eye(3)[answers]

    def gains(before: np.ndarray, after: np.ndarray, groups: list[str]) -> bool:
        problem: Any = SimpleNamespace(
            index=SimpleNamespace(samples=pd.DataFrame({"group": groups}), task="multiclass"),
            val=Split(np.arange(40), truth),
            settings=FinetuneSettings(select_by="accuracy"),
            seed=0,
        )
        return gains_beyond_chance(problem, before, after)

    alone = [""] * 40
    assert not gains(right(23, 0), right(25, 1), alone)
    assert gains(right(23, 0), right(38, 1), alone)
    assert not gains(right(38, 1), right(23, 0), alone)
    lucky = right(23, 0)
    lucky[:10] = np.eye(3)[truth[:10]]  # all of the gain in one patient of four
    assert not gains(right(23, 0), lucky, [f"p{place // 5}" for place in range(40)])
    for few in (1, 2, 5):  # where every draw may be alike
        assert not gains(right(23, 0), right(38, 1), [f"p{place % few}" for place in range(40)])
    assert gains(right(23, 0), right(38, 1), [f"p{place % 10}" for place in range(40)])


def test_steps_that_end_too_early_are_told_of(store: Path, tmp_path: Path) -> None:
    settings = {
        "epochs": 50,
        "max_steps": 6,
        "lr": 1e-3,
        "head": "random",
        "augment": "none",
        "patience": None,
    }
    short, _ = run(store, tmp_path / "short", protocol="finetune", arch="vit", settings=settings)
    assert short["best_epoch"] == 1 and short["steps_capped"] is True
    whole, _ = run(store, tmp_path / "whole", protocol="finetune", settings={"epochs": 2, "head": "random"})
    assert whole["steps_capped"] is False


@pytest.mark.parametrize("data", ["single", "several"])
def test_fine_tuning_that_learns_nothing_is_the_linear_probe(data: str, store: Path, tmp_path: Path) -> None:
    settings = {"lr": 1e-12, "epochs": 1, "augment": "none"}
    _, tuned = run(store, tmp_path / "tuned", data=data, arch="vit", protocol="finetune", settings=settings)
    _, probed = run(store, tmp_path / "probed", data=data, arch="vit", settings=settings)
    difference = predictions(tuned)["probabilities"] - predictions(probed)["probabilities"]
    assert np.abs(difference).max() < 1e-3
    log = [json.loads(line) for line in (tuned / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1]


def test_a_training_that_spoils_the_net_keeps_the_probe(store: Path, tmp_path: Path) -> None:
    settings = {"lr": 1.0, "optimizer": "sgd", "epochs": 1, "validation": "full"}
    metrics, _ = run(store, tmp_path / "tuned", protocol="finetune", arch="vit", settings=settings)
    probe, _ = run(store, tmp_path / "probed", arch="vit", settings=settings)
    assert metrics["best_epoch"] == 0
    assert metrics["test"]["macro_f1"] == pytest.approx(probe["test"]["macro_f1"], abs=0.02)


@pytest.fixture(scope="module")
def grouped(store: Path) -> str:
    """The same images as of ten patients a split and class at most, half of validation and test without."""
    lines = (store / "raw" / "single.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    table = [
        f"{path},{label},{split},{split}{label}{i % 9 // 3}" for i, (path, label, split) in enumerate(rows)
    ]
    (store / "raw" / "grouped.csv").write_text("\n".join(["path,label,split,patient", *table]) + "\n")
    source = shards.CsvSource(
        store / "raw",
        csv="grouped.csv",
        label_columns=["label"],
        split_column="split",
        group_column="patient",
    )
    shards.write(source, store / "grouped", shards.ShardOptions(processes=1, near_duplicates="warn"))
    return "grouped"


@pytest.mark.parametrize("protocol", ["knn", "linear"])
def test_a_fraction_by_group_learns_from_whole_patients(
    protocol: str, grouped: str, store: Path, tmp_path: Path
) -> None:
    settings = {"fractions_by": "group"}
    metrics, _ = run(store, tmp_path, data=grouped, protocol=protocol, fraction=0.3, settings=settings)
    index = shards.Index.open(store / grouped)
    rows = index.rows("train", labelled=True)
    sizes = index.samples.iloc[rows].groupby("group").size()
    assert metrics["num_groups"] == 3 < len(sizes)
    assert metrics["num_labels"] >= 3 * sizes.min()
    assert metrics["fraction_drawn"] == metrics["num_labels"] / len(rows)
    by_image, _ = run(store, tmp_path, data=grouped, protocol=protocol, fraction=0.3)
    assert by_image["num_groups"] > 3
    spec = {"dataset": grouped, "label": "x", "arch": "cnn", "backbone": BACKBONES["cnn"], "protocol": "knn"}
    problem = finetune.make_problem(
        Work(
            task=Task("finetune/x", "finetune", {}, (), "0" * 64),
            folder=tmp_path,
            inputs={
                stage: [done(stage, store / at)]
                for stage, at in (("shard", grouped), ("pretrain", "pretrain"))
            },
        ),
        FinetuneSpec(**spec, fraction=0.3, seed=0, settings=FinetuneSettings(**settings)),  # type: ignore[arg-type]
    )
    names = index.samples["group"].to_numpy()
    for split, name in ((problem.train, "train"), (problem.val, "val")):  # validation likewise
        drawn = np.flatnonzero(np.isin(names, names[split.rows]))
        np.testing.assert_array_equal(np.intersect1d(drawn, index.rows(name, labelled=True)), split.rows)
        assert len(split) < len(index.rows(name, labelled=True))


def test_without_groups_no_fraction_of_them_is_drawn(store: Path, tmp_path: Path) -> None:
    settings = {"fractions_by": "group"}
    with pytest.raises(UserError, match=r"fractions_by: group draws whole groups .* and single has none"):
        run(store, tmp_path, protocol="knn", fraction=0.2, settings=settings)
    metrics, _ = run(store, tmp_path, protocol="knn", fraction=1.0, settings=settings)  # nothing is drawn
    assert metrics["num_groups"] is None and metrics["fraction_drawn"] == 1
