"""gains.csv: what its intervals, p-values and notes are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from aggregate_cases import CLASSES, build, run, write_patients

from pipeline.evaluate.metrics import evaluate
from pipeline.manifest import Task
from pipeline.report import plots
from pipeline.report.statistics import holm
from pipeline.specs import Backbone


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patients(tmp_path_factory.mktemp("data"))


def by_seed(folder: Path, of: Task, rows: np.ndarray, targets: np.ndarray, skill: float) -> dict[str, float]:
    """Right on exactly one image in five more with each seed, whichever the method; the baseline on none."""
    right = 0 if of.spec["label"] == "supervised" else len(targets) // 5 * (1 + of.spec["seed"])
    rank = np.argsort(np.random.default_rng(0).random(len(targets)))
    said = np.where(rank < right, targets, (targets + 1) % CLASSES)
    probabilities = (0.05 + 0.85 * np.eye(CLASSES)[said]).astype(np.float32)
    np.savez(folder / "predictions.npz", probabilities=probabilities, targets=targets, rows=rows)
    return evaluate(probabilities, targets)


def test_interval_of_a_gain_is_over_seeds_too_and_the_other_over_test_samples_alone(
    shard_folder: Path, tmp_path: Path
) -> None:
    """Gains of .2, .4 and .6 on the same test images: the first interval reaches from seed to seed."""
    entries = build(tmp_path / "store", shard_folder, seeds=(0, 1, 2), each_seed=True, predict=by_seed)
    gains = pd.read_csv(run(entries, tmp_path / "tables", metric="accuracy") / "gains.csv")
    assert len(gains) == 8 and (gains.n == 3).all()
    assert gains.gain.tolist() == pytest.approx([0.4] * 8)
    # of 20 patients a share of .4 stands up to ±.08 or so, over the mean of three seeds
    assert ((gains.gain_test_low > 0.25) & (gains.gain_test_high < 0.55)).all()
    # over seeds alone it would be .4 ± 4.3 · .2 / √3
    assert ((gains.gain_low < 0.15) & (gains.gain_high > 0.65)).all()
    assert (gains.pretrainings == 3).all() and (gains.test_groups == 20).all()
    assert gains.note.tolist() == ["3 pretrainings; 20 test groups: wide intervals"] * 8


def test_one_seed_has_an_interval_over_test_samples_and_says_so(shard_folder: Path, tmp_path: Path) -> None:
    entries = build(tmp_path / "store", shard_folder, seeds=(0,))
    gains = pd.read_csv(run(entries, tmp_path / "tables") / "gains.csv")
    assert (gains.n == 1).all() and gains.p_value.isna().all() and gains.p_holm.isna().all()
    assert gains[["gain_low", "gain_high", "smallest_gain"]].isna().all(axis=None)
    assert (gains.gain_test_low < gains.gain_test_high).all()
    assert gains.note.str.startswith("one seed").all()


def test_p_values_are_adjusted_over_the_comparisons_that_are_named(
    shard_folder: Path, tmp_path: Path
) -> None:
    entries = build(tmp_path / "store", shard_folder, seeds=(0, 1, 2), each_seed=True)
    folder = run(entries, tmp_path / "tables")
    gains = pd.read_csv(folder / "gains.csv")
    assert gains.p_value.notna().all()
    np.testing.assert_allclose(gains.p_holm, holm(gains.p_value))  # dino and cass, both nets, both fractions
    assert len(gains) == 8
    gains = pd.read_csv(run(entries, tmp_path / "one", compare=["dino"]) / "gains.csv")
    named = gains.method == "dino"
    np.testing.assert_allclose(gains.p_holm[named], holm(gains.p_value[named]))
    assert gains.p_holm[~named].isna().all()
    gains = pd.read_csv(run(entries, tmp_path / "none", compare_protocols=["knn"]) / "gains.csv")
    assert gains.p_holm.isna().all()
    report = (folder / "report.md").read_text()
    assert (
        "| net | protocol | method | labels | gain | smallest gain | p | adjusted p | seeds | note |"
        in report
    )


@pytest.mark.parametrize("each_seed", [False, True])
def test_seeds_of_one_pretraining_have_no_p_value_and_say_that_its_variance_is_missing(
    shard_folder: Path, tmp_path: Path, each_seed: bool
) -> None:
    entries = build(tmp_path / "store", shard_folder, each_seed=each_seed)
    gains = pd.read_csv(run(entries, tmp_path / "tables") / "gains.csv")
    assert gains.note.str.contains("one pretraining").tolist() == [not each_seed] * len(gains)
    assert gains.gain_low.notna().tolist() == [each_seed] * len(gains)
    report = (tmp_path / "tables" / "report.md").read_text()
    assert (report.count("share one pretraining") == 0) == each_seed
    for column in ("p_value", "p_holm"):  # what the one pretraining gave is no gain of the method
        assert gains[column].between(0, 1).tolist() == [each_seed] * len(gains)


def test_a_method_with_its_own_backbone_is_compared_with_the_baseline_of_its_architecture(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    legends: list[set[str]] = []

    def note_legend(figure: Any, axes: Any) -> None:
        legends.append({label for axis in axes for label in axis.get_legend_handles_labels()[1]})

    monkeypatch.setattr(plots, "_legend", note_legend)
    monkeypatch.setattr("pipeline.report.parallel.workers", lambda: 1)  # so that it is noted here
    own = {
        "dino": {"cnn": Backbone(name="scatnet8")},
        "cass": {"vit": Backbone(name="deit_tiny", args={"depth": 3})},  # another net of the same name
    }
    entries = build(tmp_path / "store", shard_folder, own=own)
    folder = run(entries, tmp_path / "tables")
    gains = pd.read_csv(folder / "gains.csv").set_index(["method", "arch"])
    assert (gains.n == 2).all() and gains.gain_test_low.notna().all()
    other = gains.note.str.contains("another backbone than the baseline's")
    assert set(other[other].index) == {("dino", "cnn"), ("cass", "vit")}
    results = pd.read_csv(folder / "results.csv").set_index(["method", "arch", "fraction", "seed"])
    results = results.macro_f1.sort_index()
    difference = (results["dino"] - results["supervised"]).loc["cnn", 0.1]
    assert gains.loc[("dino", "cnn")].query("fraction == .1").gain.item() == pytest.approx(difference.mean())
    report = (folder / "report.md").read_text()
    methods = [line.split(" | ")[2] for line in report.splitlines() if line.startswith("| CNN | linear | ")]
    assert methods[:3] == ["supervised", "dino", "cass"]  # side by side, whatever their nets
    assert "| CNN | linear | dino | scatnet8 |" in report
    assert {"supervised", "dino", "cass", "dino (scatnet8)"} in legends
