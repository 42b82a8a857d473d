"""Files whose content decides a result and is part of a key: tables of labels, and initial weights."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.experiment import Experiment
from pipeline.manifest import sha256_file
from pipeline.specs import Architecture, Backbone, Dataset

WEIGHTS = "model.safetensors"  # of a folder with an exported net


def read_contents(experiment: Experiment) -> dict[str, str]:
    """SHA-256 of the files that an experiment names, by absolute path.

    A file that cannot be read from here (data on compute nodes only) is left out: its path alone counts.
    """
    paths = {path for dataset in experiment.all_datasets for path in label_tables(dataset).values()}
    for label in experiment.methods:
        for backbone in experiment.backbones_of(label).values():
            paths |= set(weights_files([backbone]).values())
    found = {}
    for path in sorted(paths):
        try:
            found[str(path)] = sha256_file(path)
        except (OSError, ValueError):  # a NUL in a path: refused where it is read
            continue
    return found


def label_tables(dataset: Dataset) -> dict[str, Path]:
    """Name below the root → absolute path of the tables that a data set's labels are in."""
    if dataset.root is None:
        return {}
    root = Path(os.path.abspath(Path(dataset.root).expanduser()))
    if dataset.source == "csv":
        return {dataset.csv: Path(os.path.join(root, dataset.csv))}
    if dataset.source == "coco":
        name = dataset.annotations or "annotations.json"
        found = sorted(glob.glob(glob.escape(os.path.join(root, name)).replace("{split}", "*")))
        return {os.path.relpath(path, root): Path(path) for path in found}
    return {}


def weights_files(backbones: Iterable[Backbone]) -> dict[str, Path]:
    """Weights as a backbone names them → the absolute path of the file that they are in."""
    found = {}
    for backbone in backbones:
        if backbone.weights not in ("random", "imagenet"):
            path = Path(os.path.abspath(Path(backbone.weights).expanduser()))
            found[backbone.weights] = path / WEIGHTS if path.is_dir() else path
    return found


def of_dataset(dataset: Dataset, contents: Mapping[str, str]) -> dict[str, str]:
    """Name below the root → SHA-256 of the tables that are known."""
    tables = label_tables(dataset)
    return {name: contents[str(path)] for name, path in tables.items() if str(path) in contents}


def of_weights(backbones: Mapping[Architecture, Backbone], contents: Mapping[str, str]) -> dict[str, str]:
    """Architecture → SHA-256 of the initial weights that are a known file."""
    found: dict[str, str] = {}
    for arch, backbone in backbones.items():
        path = weights_files([backbone]).get(backbone.weights)
        if path is not None and str(path) in contents:
            found[arch] = contents[str(path)]
    return found
