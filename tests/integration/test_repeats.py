"""Repeated splits, from the experiment file to pooled tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.report.statistics import score_of_repeats

EXPERIMENT = """name: few
dataset: {source: csv, root: ROOT, group_column: patient, near_duplicates: warn, splits: {repeats: 2}}
backbones: {cnn: {name: test_resnet}}
methods: {supervised: {}, bn_refresh: {}}
seeds: [0, 1]
pretrain: {seeds: first, epochs: 0.5, batch_size: 4, image_size: 32, probe_epochs: null}
finetune: {protocols: [knn], fractions: [0.5, 1.0], fractions_by: group}
report: {bootstrap: 20}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repeats")
    rng = np.random.default_rng(0)
    (root / "data").mkdir()
    lines = ["path,label,patient"]
    for number in range(48):
        pixels = np.clip(rng.normal([90, 120][number % 2], 60, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "data" / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]},p{number // 4}")
    (root / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    (root / "few.yaml").write_text(EXPERIMENT.replace("ROOT", str(root / "data")))
    command = [sys.executable, "-m", "pipeline.launch", "all", str(root / "few.yaml"), "--cluster", "local"]
    command += ["--store", str(root / "store"), "--runs", str(root / "runs")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return root


@pytest.mark.slow
def test_splits_differ_and_tables_pool_over_them(ran: Path) -> None:
    tables = ran / "runs" / "few" / "tables"
    samples = [pd.read_csv(path) for path in sorted(ran.glob("store/shard/*/samples.csv"))]
    assert len(samples) == 2
    tested = [set(one[one.split == "test"].group) for one in samples]
    assert tested[0] != tested[1]
    results = pd.read_csv(tables / "results.csv")
    assert set(results.dataset) == {"few"} and (results.status == "done").all()
    assert len(results) == 2 * 2 * 2 * 2  # methods, fractions, repeats, seeds
    assert results.groupby(["method", "fraction"]).repeat.value_counts().eq(2).all()
    summary = pd.read_csv(tables / "summary.csv")
    assert (summary.repeats == 2).all() and (summary.n == 4).all()
    assert (summary.test_groups == len(tested[0] | tested[1])).all()
    assert (summary.num_groups < 12).all() and summary.fraction_drawn.between(0, 1).all()
    ratio = np.mean(
        [len(test) / one[one.split == "train"].group.nunique() for test, one in zip(tested, samples)]
    )
    row = summary.query("method == 'supervised' and fraction == 1").iloc[0]
    base, means = (
        results.query(f"method == '{method}' and fraction == 1").groupby("repeat").macro_f1.mean()
        for method in ("supervised", "bn_refresh")
    )
    assert row.macro_f1 == pytest.approx(base.mean())
    interval = score_of_repeats(
        base, ratio=float(ratio), units=12, test_units=len(tested[0] | tested[1]), confidence=0.95
    )
    assert (row.macro_f1_low, row.macro_f1_high) == pytest.approx(interval)
    assert (summary.macro_f1_low < summary.macro_f1_high).all()
    gains = pd.read_csv(tables / "gains.csv").query("fraction == 1").iloc[0]
    assert gains.gain == pytest.approx((means - base).mean()) and gains.repeats == 2 and gains.n == 4
    assert "2 repeated splits" in gains.note
    report = (tables / "report.md").read_text()
    assert "Mean over 2 splits of the same 12 groups" in report and "Nadeau and Bengio" in report
    manifest = json.loads((ran / "runs" / "few" / "manifest.json").read_text())
    assert "shard/few-r2" in json.dumps(manifest)
