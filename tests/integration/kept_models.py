"""A small finished experiment whose fine-tuned models are kept."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.launch import main

EXPERIMENT = """
name: kept
dataset: {source: csv, root: ROOT, split_column: split, group_column: patient, resize: 24}
backbones: {cnn: {name: test_resnet}}
methods: {supervised: {}}
seeds: [0, 1]
pretrain: {epochs: 0.1, batch_size: 8, image_size: 16, probe_epochs: null}
finetune: {protocols: [linear, finetune, knn], fractions: [0.5], max_steps: 2, epochs: 1, batch_size: 8}
report: {bootstrap: 20}
"""


def make_experiment(root: Path) -> None:
    """Run it on 80 images of two classes, two a patient: JPEG, PNG, turned by EXIF, of unequal shapes."""
    rng = np.random.default_rng(0)
    lines = ["path,label,split,patient"]
    (root / "images").mkdir()
    for number in range(80):
        pixels = rng.normal((90, 150)[number % 2], 60, (20 + number % 17, 33 - number % 5, 3))
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        name = f"{number:02}.{'jpg' if number % 3 else 'png'}"
        exif = image.getexif()
        exif[0x0112] = 6 if number % 9 == 1 else 1
        image.save(root / "images" / name, exif=exif)
        split = ("train", "train", "val", "test")[number // 2 % 4]
        lines.append(f"{name},{'ab'[number % 2]},{split},p{number // 2}")
    (root / "images" / "labels.csv").write_text("\n".join(lines) + "\n")
    (root / "kept.yaml").write_text(EXPERIMENT.replace("ROOT", str(root / "images")))
    ran = launch(root, "all", str(root / "kept.yaml"), "--cluster", "local", "--store", str(root / "store"))
    assert ran.returncode == 0, ran.stderr


def here(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """:func:`launch` in this process, which has imported everything."""
    said, told, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        try:
            main([*arguments, "--runs", str(root / "runs")])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), told.getvalue())


def launch(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.launch", *arguments, "--runs", str(root / "runs")]
    return subprocess.run(command, capture_output=True, text=True, check=False)
