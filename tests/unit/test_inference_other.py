"""Another data set as a test set: which of its images, in whose classes, grey scale and groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards
from pipeline.inference.other import OtherSource
from pipeline.inference.unseen import write_like
from shards import CsvSource, FolderSource, Index


def grey16(path: Path, *, greatest: int) -> None:
    """A ramp of 16-bit values from 0 to the greatest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, greatest, 400).reshape(20, 20).astype(np.uint16)
    Image.fromarray(ramp + np.uint16(len(path.stem))).save(path)


def colours(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)).save(path)


def learned(root: Path, folder: Path, header: str = "path,x,y,z") -> Index:
    """Of a set with several labels an image."""
    rows = [header]
    for number in range(30):
        colours(root / f"{number}.png", number)
        rows.append(f"{number}.png,{number % 2},{number // 2 % 2},{number // 4 % 2}")
    (root / "labels.csv").write_text("\n".join(rows))
    return shards.write(CsvSource(root, label_columns=["x", "y", "z"]), folder)


def test_black_and_white_are_those_of_the_training(tmp_path: Path) -> None:
    for number in range(20):
        grey16(tmp_path / f"train/{'ab'[number % 2]}/{'x' * (number + 1)}.png", greatest=1000)
        grey16(tmp_path / f"other/{'ab'[number % 2]}/{'x' * (number + 1)}.png", greatest=500)
    like = shards.write(
        FolderSource(tmp_path / "train"), tmp_path / "like", shards.ShardOptions(near_duplicates="warn")
    )
    source = OtherSource(FolderSource(tmp_path / "other"), "other", like)
    index = write_like(source, tmp_path / "found", like)
    assert index.meta["intensity"] == like.meta["intensity"]
    brightest = max(np.asarray(index.decode(row)).max() for row in range(len(index)))
    assert 110 < brightest < 145  # half of the training's range, not the whole of its own


def test_of_several_labels_those_unsaid_are_not_scored(tmp_path: Path) -> None:
    like = learned(tmp_path / "train", tmp_path / "like")
    colours(tmp_path / "other/0.png", 100)
    colours(tmp_path / "other/1.png", 101)
    colours(tmp_path / "other/2.png", 102)
    (tmp_path / "other/labels.csv").write_text(
        "path,z,x,set\n0.png,1,0,test\n1.png,1,0,test\n2.png,0,1,train\n"
    )
    given = CsvSource(tmp_path / "other", label_columns=["z", "x"], split_column="set")
    source = OtherSource(given, "other", like)
    index = write_like(source, tmp_path / "found", like)
    assert index.classes == ["x", "y", "z"] and source.scored == ["x", "z"]
    assert index.targets(np.arange(2)).tolist() == [[0, 0, 1], [0, 0, 1]]
    assert any("says nothing of 'y'" in note for note in source.notes)
    assert any("no image with 'x'" in note for note in source.notes)


def test_only_the_test_split_counts_and_patterns_leave_out(tmp_path: Path) -> None:
    for number in range(20):
        for split in ("train", "test"):
            colours(tmp_path / f"images/{split}/{'ab'[number % 2]}/{number}.png", number + 100 * len(split))
    like = shards.write(FolderSource(tmp_path / "images/train"), tmp_path / "like")
    source = OtherSource(FolderSource(tmp_path / "images"), "other", like, ["test/b/1?.png"])
    index = write_like(source, tmp_path / "found", like)
    assert source.taken == "its test split, 15 of 35 labelled images"
    assert set(index.samples["split"]) == {"test"} and len(index) == 15
    source = OtherSource(FolderSource(tmp_path / "images"), "other", like, ["*.jpg"])
    with pytest.raises(shards.InputError, match=r"exclude: '\*.jpg' matches no image of other"):
        source.listing()


def test_labels_of_another_kind_are_refused(tmp_path: Path) -> None:
    like = learned(tmp_path / "train", tmp_path / "like")
    colours(tmp_path / "other/x/0.png", 1)
    colours(tmp_path / "other/y/0.png", 2)
    source = OtherSource(FolderSource(tmp_path / "other"), "other", like)
    with pytest.raises(shards.InputError, match="other are multiclass, those that the models learned mult"):
        source.listing()


def test_dicom_images_are_grouped_by_patient(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from test_shards_copies import dicom

    for number in range(20):
        colours(tmp_path / f"train/{'ab'[number % 2]}/{number}.png", number)
        file = tmp_path / f"other/{'ab'[number % 2]}/{number}.dcm"
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(tmp_path / f"train/{'ab'[number % 2]}/{number}.png") as image:
            file.write_bytes(dicom(image, f"P{number // 4}"))
    like = shards.write(FolderSource(tmp_path / "train"), tmp_path / "like")
    index = write_like(OtherSource(FolderSource(tmp_path / "other"), "other", like), tmp_path / "found", like)
    groups = index.samples["group"].fillna("")
    assert len(index) == 20 and groups.nunique() == 5 and (groups != "").all()
