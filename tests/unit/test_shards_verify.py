"""``verify`` finds every change; the command line writes, checks and fails in one line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from shards import Index, InputError, verify
from shards.__main__ import main


@pytest.fixture
def dataset(tmp_path) -> Path:
    for number in range(24):
        folder = tmp_path / "in" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (number * 10, 0, 9)).save(folder / f"{number}.png")
    assert main(["write", "folder", str(tmp_path / "in"), str(tmp_path / "out"), "--shard-samples", "5"]) == 0
    return tmp_path / "out"


def test_sound_dataset_has_no_problems(dataset, capsys):
    assert verify(dataset) == []
    assert main(["verify", str(dataset)]) == 0
    assert "is sound" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["train-000001.tar", "samples.csv", "rejected.csv", "duplicates.csv", "data_report.json"]
)
def test_one_changed_byte_is_found(dataset, name):
    content = bytearray((dataset / name).read_bytes())
    content[len(content) // 2] ^= 1
    (dataset / name).write_bytes(content)
    (problem,) = verify(dataset)
    assert problem.startswith(f"{name} was changed")


def test_missing_and_foreign_files_are_found(dataset, capsys):
    (dataset / "val-000000.tar").rename(dataset / "val-000009.tar")
    assert verify(dataset) == ["val-000000.tar is missing", "val-000009.tar is not in index.json"]
    assert main(["verify", str(dataset)]) == 1
    assert "val-000000.tar is missing" in capsys.readouterr().out


def test_table_that_points_elsewhere_is_found_though_hashes_fit(dataset):
    index = Index.open(dataset)
    text = (dataset / "samples.csv").read_text()
    key, offset = index.samples["key"][3], index.samples["offset"][3]
    text = text.replace(
        f"{key},{index.samples['shard'][3]},{offset}", f"{key},{index.samples['shard'][3]},{offset + 512}"
    )
    (dataset / "samples.csv").write_text(text)
    meta = json.loads((dataset / "index.json").read_text())
    meta["files"]["samples.csv"] = hashlib.sha256(text.encode()).hexdigest()
    (dataset / "index.json").write_text(json.dumps(meta))
    (problem,) = verify(dataset)
    assert f"does not hold sample {key}" in problem


def test_no_dataset_is_a_problem(tmp_path):
    (problem,) = verify(tmp_path)
    assert "no dataset of shards" in problem


def test_info_names_counts(dataset, capsys):
    assert main(["info", str(dataset)]) == 0
    told = capsys.readouterr().out
    assert "24 samples, multiclass, 2 classes" in told and "train: 17 (a 9, b 8" in told


def test_csv_from_the_command_line(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    lines = ["file,kind,who"]
    for number in range(30):
        Image.new("RGB", (4, 4), (number * 8, 1, 2)).save(root / f"{number}.png")
        lines.append(f"{number}.png,{'x' if number % 2 else 'y'},p{number // 2}")
    (root / "t.csv").write_text("\n".join(lines))
    columns = ["--path-column", "file", "--label-columns", "kind", "--group-column", "who"]
    assert main(["write", "csv", str(root), str(tmp_path / "out"), "--csv", "t.csv", *columns]) == 0
    index = Index.open(tmp_path / "out")
    assert index.classes == ["x", "y"] and index.samples.groupby("group")["split"].nunique().max() == 1


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "shards",
        "write",
        "folder",
        str(tmp_path / "none"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: folder {tmp_path / 'none'} does not exist\n"


def test_error_passes_between_processes():
    import pickle

    assert str(pickle.loads(pickle.dumps(InputError("one line")))) == "one line"
