"""Fine-tuned models are kept, and say of images what the tables' predictions say, to the bit."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from kept_models import launch
from PIL import Image

from shards import Index


def predicted(root: Path, net: str, *arguments: str) -> pd.DataFrame:
    ran = launch(root, "predict", "kept", "--net", net, *arguments)
    assert ran.returncode == 0, ran.stderr
    return pd.read_csv(io.StringIO(ran.stdout), keep_default_na=False).set_index("path")


def stored(root: Path, protocol: str, seed: int) -> tuple[list[str], np.ndarray]:
    """Paths of the test images, and the probabilities behind the tables."""
    index = Index.open(next((root / "store" / "shard").iterdir()))
    folder = next((root / "store" / "finetune").glob(f"kept-supervised-cnn-{protocol}-50pc-s{seed}-*"))
    with np.load(folder / "predictions.npz") as found:
        return index.samples["path"].to_numpy()[found["rows"]].tolist(), found["probabilities"]


def scores(table: pd.DataFrame) -> np.ndarray:
    return table[["score_a", "score_b"]].to_numpy(np.float32)


def seed_kept(root: Path, protocol: str) -> int:
    models = (root / "store" / "finetune").glob(f"kept-supervised-cnn-{protocol}-*/model/config.json")
    (seed,) = [int(path.parts[-3].split("-s")[-1][0]) for path in models]
    return seed


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_predictions_of_the_test_images_have_the_tables_bits_in_any_company(
    tried: Path, protocol: str, tmp_path: Path
) -> None:
    seed = seed_kept(tried, protocol)
    paths, expected = stored(tried, protocol, seed)
    every = predicted(tried, protocol, "--images", str(tried / "images"))
    assert len(every) == 80 and np.array_equal(scores(every.loc[paths]), expected)
    some = tmp_path / "some.csv"
    some.write_text("path\n" + "".join(f"{tried / 'images' / name}\n" for name in paths[3:6]))
    few = predicted(tried, protocol, "--images", str(some))
    assert np.array_equal(scores(few), expected[3:6])
    best = np.array(["a", "b"])[expected.argmax(axis=1)]
    assert every.loc[paths, "predicted"].tolist() == best.tolist()


def test_knn_votes_have_the_tables_bits_in_any_company(tried: Path) -> None:
    paths, expected = stored(tried, "knn", 0)
    every = predicted(tried, "knn s0", "--images", str(tried / "images"))
    assert np.array_equal(scores(every.loc[paths]), expected)
    assert "above_threshold" in every
    one = predicted(tried, "knn s0", "--images", str(tried / "images" / paths[4]))
    assert np.array_equal(scores(one), expected[4:5])


@pytest.mark.parametrize("protocol", ["finetune", "linear"])
def test_timm_alone_loads_the_model_and_says_the_same(tried: Path, protocol: str) -> None:
    """``create_model`` and ``create_transform`` on a file: the table's probabilities but for rounding."""
    paths, expected = stored(tried, protocol, seed_kept(tried, protocol))
    table = pd.read_csv(tried / "runs" / "kept" / "tables" / "models.csv").set_index("protocol")
    folder = tried / "store" / table.loc[protocol, "model"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    assert model.pretrained_cfg["label_names"] == ["a", "b"]
    for path, probabilities in zip(paths, expected):
        with Image.open(tried / "images" / path) as image:
            if image.getexif().get(0x0112, 1) != 1 or min(image.size) > 24:
                continue  # stored turned, or scaled down
            pixels = transform(image.convert("RGB"))
        with torch.no_grad():
            found = model(pixels[None]).softmax(dim=1)[0].numpy()
        assert np.abs(found - probabilities).max() < 0.002


def test_of_a_cells_seeds_the_best_by_validation_is_kept(tried: Path) -> None:
    table = pd.read_csv(tried / "runs" / "kept" / "tables" / "models.csv", keep_default_na=False)
    folders = list((tried / "store" / "finetune").iterdir())
    for row in table.itertuples():
        scores = {}
        for folder in folders:
            receipt = json.loads((folder / "receipt.json").read_text())
            if f"-{row.protocol}-" in folder.name:
                scores[int(folder.name.split("-s")[-1][0])] = receipt["metrics"]["val"]["macro_f1"]
        assert scores[row.seed] == max(scores.values()) == pytest.approx(row.val)
        assert bool(row.model) == (row.protocol != "knn")
    kept = [folder for folder in folders if (folder / "model").is_dir()]
    assert sorted(f"finetune/{folder.name}/model" for folder in kept) == sorted(set(table["model"]) - {""})
    ran = launch(tried, "verify", "kept")
    assert ran.returncode == 0 and " 0 damaged files" in ran.stdout


def test_what_cannot_be_read_has_its_row_and_reason(tried: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), (200, 100, 0)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    ran = launch(
        tried, "predict", "kept", "--images", str(tmp_path), "--out", str(tmp_path / "out" / "table.csv")
    )
    assert ran.returncode == 1 and "1 of 2 images could not be read, such as bad.png" in ran.stderr
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        bad, good = csv.DictReader(file)
    assert bad["path"] == "bad.png" and not bad["score_a"] and "not an image" in bad["error"]
    assert good["predicted"] in ("a", "b") and float(good["score_a"]) > 0 and not good["error"]
    assert good["predicted"] in good["above_threshold"] or good["above_threshold"] in ("", "a", "b", "a|b")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--net", "vitt"], "no model is of 'vitt'"),
        (["--net", "linear s0 s1"], "no model is of all of linear, s0, s1"),
        (["--images", "/nowhere"], "there is no folder or table /nowhere"),
    ],
)
def test_a_mistake_is_one_line(tried: Path, arguments: list[str], said: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "one.png")
    ran = launch(tried, "predict", "kept", "--images", str(tmp_path), *arguments)
    assert ran.returncode == 2 and said in ran.stderr and len(ran.stderr.splitlines()) == 1


def test_a_damaged_model_is_not_used(tried: Path) -> None:
    folder = next((tried / "store" / "finetune").glob("kept-supervised-cnn-linear-*/model"))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        ran = launch(tried, "predict", "kept", "--net", "linear", "--images", str(tried / "images"))
        assert ran.returncode == 2 and "its model is damaged" in ran.stderr
    finally:
        weights.write_bytes(content)
