"""Copies of images, altered or not, and other images of evaluated patients, are found and kept apart."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps

from benchmarks.copies import KINDS, entries_of, found_pairs, recompressed, synthetic, with_copies
from shards import CsvSource, FolderSource, Index, InputError, ShardOptions, verify, write


def photographs(count: int, seed: int = 0, side: int = 64) -> list[Image.Image]:
    return synthetic(count, np.random.default_rng(seed), side)


def saved(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def folders(root: Path, images: list[Image.Image], *, split: str = "") -> Path:
    for number, image in enumerate(images):
        saved(image, root / split / "ab"[number % 2] / f"{number:03}.png")
    return root


def copies(index: Index) -> pd.DataFrame:
    return pd.read_csv(index.folder / "duplicates.csv", keep_default_na=False)


def split_of(index: Index) -> dict[str, str]:
    return dict(zip(index.samples["path"], index.samples["split"]))


@pytest.mark.parametrize("seed", [0, 1])
def test_altered_copies_are_found_in_a_set_of_one_kind(seed: int) -> None:
    images = photographs(240, seed, side=128)
    everything, truth = with_copies(images, 80, random.Random(seed))
    found = found_pairs(entries_of(everything))
    assert len(found - set(truth)) <= 0.05 * len(found)
    for kind in KINDS:
        mine = {pair for pair, name in truth.items() if name == kind}
        assert len(mine & found) >= 0.9 * len(mine), kind  # 9 of 10; the benchmark has 50 a kind


def test_flat_images_and_those_of_other_colours_are_no_copies() -> None:
    rng = np.random.default_rng(0)
    flat = [
        Image.fromarray(np.clip(rng.normal(level, 0.2, (48, 48)), 0, 255).astype(np.uint8))
        for level in range(60, 70)
    ]
    shape = np.asarray(photographs(1)[0].convert("L"), np.float32) / 255
    coloured = [
        Image.fromarray((shape[..., None] * np.array(colour)).astype(np.uint8))
        for colour in ((255, 60, 60), (60, 255, 60), (60, 60, 255))
    ]
    assert found_pairs(entries_of([image.convert("RGB") for image in flat] + coloured)) == set()


def test_copies_stay_in_one_split_that_is_made(tmp_path: Path) -> None:
    images = photographs(60)
    root = folders(tmp_path / "in", images)
    for number, kind in zip(range(0, 60, 2), list(KINDS) * 4):
        saved(KINDS[kind](images[number], random.Random(number)), root / "a" / f"copy{number:03}.png")
    grouped = write(FolderSource(root), tmp_path / "grouped")
    table = copies(grouped)
    assert len(table) >= 24 and set(table["kind"]) == {"near"} and not table["two_splits"].any()
    assert (table["split_1"] == table["split_2"]).all() and set(table["split_1"]) > {"train"}
    assert grouped.report["near_duplicates"]["pairs"] == len(table)
    assert any("altered copies" in line for line in grouped.warnings)
    warned = write(FolderSource(root), tmp_path / "warned", ShardOptions(near_duplicates="warn"))
    apart = copies(warned)["two_splits"].sum()
    assert apart > 0 and len(warned) == len(grouped) == 90
    assert any(
        line.startswith(f"{apart} pairs of altered copies are in two splits") for line in warned.warnings
    )
    assert verify(grouped.folder) == []


def test_every_pair_across_given_splits_is_in_the_file(tmp_path: Path) -> None:
    images = photographs(140)
    root = folders(tmp_path / "in", images, split="train")
    folders(root, [recompressed(ImageOps.mirror(image), 80) for image in images[:120]], split="test")
    folders(root, photographs(8, 9), split="val")
    index = write(FolderSource(root), tmp_path / "out")
    table = copies(index)
    assert table["two_splits"].sum() == len(table) == 120
    assert any("120 pairs of altered copies are in two splits" in line for line in index.warnings)
    assert len(index.report["near_duplicates"]["examples"]) == 50
    dropping = write(FolderSource(root), tmp_path / "dropped", ShardOptions(near_duplicates="drop"))
    assert len(dropping) == 148 and len(dropping.rows("train")) == 20 and len(dropping.rows("test")) == 120
    assert set(copies(dropping)["split_1"]) | set(copies(dropping)["split_2"]) == {"dropped", "test"}
    assert any("120 images are left out as altered copies" in line for line in dropping.warnings)


def test_different_labels_of_copies_are_listed(tmp_path: Path) -> None:
    images = photographs(30)
    root = folders(tmp_path / "in", images)
    saved(images[0], root / "b" / "same.bmp")
    saved(images[2].transpose(Image.Transpose.ROTATE_90), root / "b" / "turned.png")
    saved(images[4].transpose(Image.Transpose.ROTATE_90), root / "a" / "right.png")
    index = write(FolderSource(root), tmp_path / "out")
    table = copies(index)
    assert sorted(table["kind"]) == ["identical", "near", "near"]
    conflicts = table[table["label_conflict"] == 1]
    assert {(*sorted(row),) for row in conflicts[["path_1", "path_2"]].to_numpy().tolist()} == {
        ("a/000.png", "b/same.bmp"),
        ("a/002.png", "b/turned.png"),
    }
    assert sum("different labels" in line for line in index.warnings) == 2
    assert all("duplicates.csv" in line for line in index.warnings if "different labels" in line)


def test_unlabelled_copies_of_test_images_are_left_out(tmp_path: Path) -> None:
    images = photographs(30)
    for place, split in enumerate(("train", "val", "test")):
        folders(tmp_path / "in", images[10 * place : 10 * place + 10], split=split)
    for number in (0, 12, 25):
        saved(ImageOps.flip(images[number]), tmp_path / "more" / f"{number}.png")
    source = FolderSource(tmp_path / "in")
    index = write(source, tmp_path / "out", ShardOptions(unlabelled=[tmp_path / "more"]))
    assert set(split_of(index)) & {f"unlabelled/more/{number}.png" for number in (0, 12, 25)} == {
        "unlabelled/more/0.png"
    }
    assert any(line.startswith("2 images are left out as altered copies") for line in index.warnings)


def with_patients(root: Path, *, named: bool = True) -> CsvSource:
    """Patients p01 to p12 with two images each; the last four are the test split."""
    rows = ["path,label,patient,split"]
    for number, image in enumerate(photographs(24)):
        patient = f"p{number // 2 + 1:02}"
        name = f"{patient}_{number % 2}.png" if named else f"image{number}.png"
        saved(image, root / name)
        split = "test" if number >= 16 else "val" if number >= 12 else "train"
        rows.append(f"{name},{'ab'[number % 2]},{patient},{split}")
    (root / "labels.csv").write_text("\n".join(rows))
    return CsvSource(root, group_column="patient", split_column="split")


@pytest.mark.parametrize("named", [True, False])
def test_unlabelled_images_of_test_patients_are_left_out_where_names_tell(
    tmp_path: Path, named: bool
) -> None:
    source = with_patients(tmp_path / "in", named=named)
    extra = ["p02_7.png", "P12_2.png", "scan_p11_3.png", "other.png"]
    for name, image in zip(extra, photographs(4, 5)):
        saved(image, tmp_path / "more" / name)
    index = write(source, tmp_path / "out", ShardOptions(unlabelled=[tmp_path / "more"]))
    unlabelled = index.samples[~index.samples["labelled"]]
    there = {path.rpartition("/")[2]: group for path, group in zip(unlabelled["path"], unlabelled["group"])}
    if named:  # at the place where the labelled ones have it
        assert there == {"p02_7.png": "p02", "scan_p11_3.png": "", "other.png": ""}
        assert any(line.startswith("1 unlabelled images are left out") for line in index.warnings)
    else:
        assert set(there) == set(extra) and not any(there.values())


def test_an_unlabelled_row_of_a_test_patient_is_left_out(tmp_path: Path) -> None:
    source = with_patients(tmp_path / "in")
    saved(photographs(1, 5)[0], tmp_path / "in" / "more.png")
    with open(tmp_path / "in" / "labels.csv", "a") as file:
        file.write("\nmore.png,,p12,train\n")
    index = write(source, tmp_path / "out")
    assert "more.png" not in split_of(index)


def dicom(image: Image.Image, patient: str) -> bytes:
    pydicom: Any = pytest.importorskip("pydicom")
    data = pydicom.dataset.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = data.file_meta.MediaStorageSOPClassUID, "1.2.3"
    data.Rows, data.Columns, data.SamplesPerPixel = image.height, image.width, 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PatientID = patient
    data.PixelData = image.convert("L").tobytes()
    data["PixelData"].VR = "OB"
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    return out.getvalue()


def dicom_folders(root: Path, patients: list[str], *, splits: list[str] | None = None) -> Path:
    for number, (image, patient) in enumerate(zip(photographs(len(patients)), patients)):
        path = root / (splits[number] if splits else "") / "ab"[number % 2] / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dicom(image, patient))
    return root


def test_dicom_patients_are_groups_and_their_names_are_not_kept(tmp_path: Path) -> None:
    patients = [f"Miller^{number // 4}" for number in range(40)]
    index = write(FolderSource(dicom_folders(tmp_path / "in", patients)), tmp_path / "out")
    samples = index.samples
    assert samples["group"].nunique() == 10 and not samples["group"].str.contains("Miller").any()
    assert (samples.groupby("group")["split"].nunique() == 1).all()
    assert any("of 10 patients by their DICOM PatientID" in line for line in index.warnings)
    anonymous = write(FolderSource(dicom_folders(tmp_path / "same", ["ANON"] * 40)), tmp_path / "same_out")
    assert (anonymous.samples["group"] == "").all()


def test_dicom_patients_in_two_given_splits_are_told_of(tmp_path: Path) -> None:
    splits = ["train"] * 24 + ["val"] * 8 + ["test"] * 8
    patients = [f"P{number // 4}" for number in range(36)] + ["P0"] * 4
    index = write(FolderSource(dicom_folders(tmp_path / "in", patients, splits=splits)), tmp_path / "out")
    assert any(line.startswith("1 DICOM patients") and "given splits" in line for line in index.warnings)


def test_a_set_of_one_picture_is_refused_with_the_way_out(tmp_path: Path) -> None:
    image = photographs(1)[0]
    root = folders(tmp_path / "in", [recompressed(image, quality) for quality in range(50, 62)])
    with pytest.raises(InputError, match="altered copies: near_duplicates: warn"):
        write(FolderSource(root), tmp_path / "out")


def test_names_with_commas_are_read_back_from_the_table(tmp_path: Path) -> None:
    images = photographs(30)
    root = folders(tmp_path / "in", images)
    saved(ImageOps.mirror(images[0]), root / "a" / 'odd, "name"\n.png')
    index = write(FolderSource(root), tmp_path / "out")
    with open(index.folder / "duplicates.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert {row["path_1"], row["path_2"]} == {"a/000.png", 'a/odd, "name"\n.png'}
