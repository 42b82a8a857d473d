"""Kept models on another data set: the tables' numbers on their own test split; what another set may lack."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kept_models import here
from PIL import Image

CELL = ["protocol", "fraction", "seed"]


def evaluate(root: Path, dataset: str, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it on a data set whose file lies in ``out``."""
    out.mkdir(exist_ok=True)
    file = out / "other.yaml"
    file.write_text(dataset)
    return here(root, "evaluate", "kept", "--dataset", str(file), "--out", str(out / "found"), *arguments)


def read(out: Path, name: str = "external") -> pd.DataFrame:
    return pd.read_csv(out / "found" / f"{name}.csv", keep_default_na=name == "external")


def own(root: Path, **keys: str) -> str:
    said = {"source": "csv", "root": str(root / "images"), "split_column": "split", "group_column": "patient"}
    return "".join(f"{key}: {value}\n" for key, value in (said | keys).items() if value)


def images(folder: Path, labels: list[str], *, header: str = "path,label") -> str:
    """A data set of noise with these labels, 30 images each; returns its file."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    lines = [header]
    for number in range(30 * len(labels)):
        pixels = rng.integers(0, 256, (21, 26, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{labels[number % len(labels)]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return f"source: csv\nroot: {folder}\n"


def test_the_own_test_split_gives_the_tables_numbers_and_predictions(tried: Path, tmp_path: Path) -> None:
    ran = evaluate(tried, own(tried), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "its test split, 20 of 80 labelled images" in ran.stdout
    found = read(tmp_path)
    results = pd.read_csv(tried / "runs/kept/tables/results.csv").set_index(CELL)
    plain = found[found["class"].isna()]
    assert set(plain["metric"]) == {"accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "macro_auroc"}
    for row in plain.to_dict("records"):
        expected = results.loc[tuple(row[key] for key in CELL), row["metric"]]
        assert row["value"] == row["test"] == expected
    assert set(plain["groups"]) == {10} and set(plain["images"]) == {20}
    assert (plain["low"] <= plain["value"]).all() and (plain["value"] <= plain["high"]).all()
    predictions = read(tmp_path, "predictions")
    for protocol, some in predictions.groupby("protocol"):
        seed = some["seed"].iloc[0]
        folder = next((tried / "store/finetune").glob(f"kept-supervised-cnn-{protocol}-50pc-s{seed}-*"))
        samples = pd.read_csv(next((tried / "store/shard").iterdir()) / "samples.csv")
        with np.load(folder / "predictions.npz") as stored:
            paths = samples["path"].to_numpy()[stored["rows"]]
            scores = some.set_index("path").loc[paths, ["score_a", "score_b"]].to_numpy(np.float32)
            assert np.array_equal(scores, stored["probabilities"])


def test_thresholds_of_validation_give_sensitivity_and_specificity(tried: Path, tmp_path: Path) -> None:
    assert evaluate(tried, own(tried), tmp_path, "--net", "linear").returncode == 0
    found, predictions = read(tmp_path), read(tmp_path, "predictions")
    (config,) = (tried / "store/finetune").glob("kept-supervised-cnn-linear-*/model/config.json")
    thresholds = json.loads(config.read_text())["training"]["thresholds"]
    for name, threshold in zip("ab", thresholds):
        above = predictions[f"score_{name}"].to_numpy(np.float32) > threshold
        truth = (predictions["label"] == name).to_numpy()
        rows = found[found["class"] == name].set_index("metric")
        assert rows.loc["sensitivity", "threshold"] == threshold
        assert rows.loc["sensitivity", "value"] == pytest.approx(above[truth].mean())
        assert rows.loc["specificity", "value"] == pytest.approx((~above[~truth]).mean())
        assert rows.loc["sensitivity", "value"] == rows.loc["sensitivity", "test"]


def test_every_labelled_image_counts_where_no_test_split_is_given(tried: Path, tmp_path: Path) -> None:
    ran = evaluate(tried, own(tried, split_column=""), tmp_path, "--net", "linear")
    assert ran.returncode == 0, ran.stderr
    assert "every labelled image, 80 images" in ran.stdout
    assert "60 images are those of the training's train and val split" in ran.stdout


def test_a_class_without_images_is_told_and_left_out_of_means(tried: Path, tmp_path: Path) -> None:
    ran = evaluate(tried, images(tmp_path / "images", ["b"]), tmp_path / "out", "--net", "linear")
    assert ran.returncode == 0, ran.stderr
    assert "other has no image of 'a'" in ran.stdout
    found = read(tmp_path / "out")
    values = found[found["class"].isna()].set_index("metric")["value"]
    share = (read(tmp_path / "out", "predictions")["predicted"] == "b").mean()
    assert values["accuracy"] == values["balanced_accuracy"] == pytest.approx(share)
    assert np.isnan(values["macro_auroc"])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "B"], "has classes that the models do not know: 'B', did you mean 'b'? (known: 'a', 'b')"),
        (["a", "b", "c"], "has classes that the models do not know: 'c' (known: 'a', 'b')"),
    ],
)
def test_unknown_classes_are_refused_by_name(
    tried: Path, tmp_path: Path, labels: list[str], said: str
) -> None:
    ran = evaluate(tried, images(tmp_path / "images", labels), tmp_path / "out")
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1
    assert said in ran.stderr
    assert not list((tmp_path / "out" / "found").glob("*"))


def test_unreadable_images_are_told_and_too_many_are_refused(tried: Path, tmp_path: Path) -> None:
    said = images(tmp_path / "images", ["a", "b"])
    (tmp_path / "images" / "7.png").write_bytes(b"no image")
    ran = evaluate(tried, said, tmp_path / "out", "--net", "linear")
    assert ran.returncode == 0, ran.stderr
    assert "1 images could not be read and count nowhere (rejected.csv), such as 7.png" in ran.stdout
    assert read(tmp_path / "out")["images"].max() == 59
    assert (tmp_path / "out" / "found" / "rejected.csv").read_text().startswith("path,reason\n7.png,")
    ran = evaluate(tried, f"{said}max_rejected: 0.01\n", tmp_path / "out", "--net", "linear")
    assert ran.returncode == 2 and "1 of 60 images are unreadable" in ran.stderr


def test_few_groups_have_no_interval(tried: Path, tmp_path: Path) -> None:
    said = images(tmp_path / "images", ["a,p1", "b,p2", "a,p3"], header="path,label,patient")
    ran = evaluate(tried, f"{said}group_column: patient\n", tmp_path / "out", "--net", "linear")
    assert ran.returncode == 0 and "3 groups or images are too few for intervals" in ran.stdout
    found = read(tmp_path / "out")
    assert found["groups"].max() == 3 and found["images"].max() == 90
    assert found["low"].isna().all() and found["high"].isna().all() and found["value"].notna().all()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (
            "source: csv\nroot: /x\nsplit_colum: split\n",
            "other.yaml:3: split_colum: unknown key, did you mean",
        ),
        ("dataset:\n  source: csv\n  root: 7\n", "other.yaml:3: dataset.root: "),
        (
            "dataset: {source: folder, root: /x}\nseeds: [1]\n",
            "other.yaml:2: seeds: unknown key beside dataset",
        ),
        ("- a\n", "other.yaml: expected a data set"),
        ("source: csv\nroot: /nowhere/at/all\n", "/nowhere/at/all"),
        ("dataset: {source: folder, root: /x}\nmethods: {byoll: {}}\n", "backbones: missing"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(
    tried: Path, tmp_path: Path, file: str, said: str
) -> None:
    ran = evaluate(tried, file, tmp_path)
    assert ran.returncode == 2 and said in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_whole_experiment_gives_its_data_set(tried: Path) -> None:
    ran = here(tried, "evaluate", "kept", "--dataset", str(tried / "kept.yaml"), "--net", "linear")
    assert ran.returncode == 0, ran.stderr
    folder = tried / "runs/kept/evaluate/kept"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["external.csv", "external.md", "predictions.csv"]
    text = (folder / "external.md").read_text()
    assert "| net | protocol | method | labels | seed | macro_f1 [95 %] | own test split |" in text
    assert "without effect here, as the models have their own: resize" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "gpu"], "--device: 'gpu' is no device (expected auto, cpu, cuda, or cuda:1)"),
        (["--device", "cuda:99"], "--device: cuda:99: "),
        (["--net", "vitt"], "no model is of 'vitt'"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(
    tried: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    ran = evaluate(tried, own(tried), tmp_path, *arguments)
    assert ran.returncode == 2 and said in ran.stderr and len(ran.stderr.splitlines()) == 1
