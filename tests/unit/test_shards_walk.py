"""What lies in a folder is taken or told of: by content, whatever it is called."""

from __future__ import annotations

import gzip
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from shards import CsvSource, FolderSource, Index, InputError, ShardOptions, write
from shards.gather import all_samples
from shards.kinds import READ, kind_of

SAVED = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "GIF": ".gif",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "JPEG2000": ".jp2",
}


def picture(path: Path, number: int, format: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path, format=format)
    return path


def classes(root: Path, *names: str, count: int = 8) -> Path:
    for place, name in enumerate(names):
        for number in range(count):
            picture(root / name / f"{number:02}.png", 100 * place + number)
    return root


def written(root: Path, tmp_path: Path, **options: object) -> Index:
    return write(FolderSource(root), tmp_path / "out", ShardOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", SAVED)
@pytest.mark.parametrize("suffix", ["", ".12", ".JFIF", ".img", ".dat"])
def test_an_image_is_known_by_its_content(format: str, suffix: str, tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    picture(root / "a" / f"odd{suffix}", 999, format)
    index = written(root, tmp_path)
    assert f"a/odd{suffix}" in set(index.samples["path"]) and len(index) == 17
    assert not [line for line in index.warnings if "passed over" in line]


def test_files_passed_over_are_counted_by_kind_for_every_folder(tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    picture(tmp_path / "more" / "1.png", 5)
    for number in range(3):
        (root / "a" / f"{number}.txt").write_text("no image")
    (root / "b" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "more" / "notes.doc").write_bytes(b"\xd0\xcf\x11\xe0")
    index = written(root, tmp_path, unlabelled=[str(tmp_path / "more")])
    assert "5 files passed over: 3 .txt, 1 .db, 1 .doc" in index.warnings


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"8BPS", "Photoshop"),
        (b"\x93NUMPY", "NumPy"),
        (b"NRRD0004", "NRRD"),
        (bytes(344) + b"n+1\0", "NIfTI"),
    ],
)
def test_images_of_a_kind_that_is_not_read_are_rejected_by_its_name(
    head: bytes, kind: str, tmp_path: Path
) -> None:
    root = classes(tmp_path / "in", "a", "b")
    (root / "a" / "odd.xyz").write_bytes(head + bytes(300))
    assert kind_of((head + bytes(300))[:512]) == kind
    with pytest.raises(InputError, match=f"{kind} is not read"):
        written(root, tmp_path, max_rejected=0.0)
    index = written(root, tmp_path, max_rejected=0.2)
    assert f"a/odd.xyz,{kind} is not read" in (tmp_path / "out" / "rejected.csv").read_text()
    assert any("1 unreadable images" in line for line in index.warnings)


def test_texts_are_no_images() -> None:
    for head in (b"", b"BM", b"path,label\n", b"\x08\x00", b"<html>", b"PK\x03\x04", b"%PDF-1.7"):
        assert kind_of(head) != READ and not kind_of(head)


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", ".ipynb_checkpoints"])
def test_what_storages_leave_behind_is_no_data(name: str, tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    shutil.copytree(root / "a", root / "a" / name)
    shutil.copytree(root / "b", root / name)
    (root / "a" / "._00.png").write_bytes(b"\0\5\x16\7")
    index = written(root, tmp_path)
    assert index.classes == ["a", "b"] and len(index) == 16


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = classes(tmp_path / "in", "a", "b")
    scandir = os.scandir

    def refuse(path: str | Path) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"folder .*/b cannot be read: Permission denied"):
        FolderSource(root).listing()


def test_pipes_and_broken_links_do_not_hang(tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    os.mkfifo(root / "a" / "pipe")
    (root / "a" / "gone").symlink_to("/nowhere/1.png")
    (root / "b" / "gone.png").symlink_to("/nowhere/2.png")
    index = written(root, tmp_path, max_rejected=0.2)
    assert len(index) == 16 and "b/gone.png,no such file" in (tmp_path / "out" / "rejected.csv").read_text()


def test_excluded_images_are_left_out_of_every_source(tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    index = written(root, tmp_path, exclude=["b/0[01].png", "07.png"])
    assert set(index.samples["path"]) == {f"{c}/{n:02}.png" for c in "ab" for n in range(7)} - {
        "b/00.png",
        "b/01.png",
    }
    assert "exclude: 'b/0[01].png' leaves out 2 images" in index.warnings
    (root / "labels.csv").write_text(
        "path,label\n" + "".join(f"{c}/{n:02}.png,{c}\n" for c in "ab" for n in range(8))
    )
    index = write(CsvSource(root), tmp_path / "table", ShardOptions(exclude=["*/07.png"]))
    assert len(index) == 14
    with pytest.raises(InputError, match="leaves out every image"):
        written(root, tmp_path, exclude=["*"])


@pytest.mark.parametrize("names", [("valid", "invalid"), ("test", "negative", "positive"), ("dev", "ops")])
def test_folders_called_like_splits_are_classes_where_there_is_no_train(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    index = written(classes(tmp_path / "in", *names), tmp_path)
    assert index.classes == sorted(names)
    assert any("taken for classes" in line for line in index.warnings)


def test_split_folders_stay_split_folders(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for split in ("Train", "VALID"):
        classes(root / split, "a", "b")
    for number, path in enumerate(sorted((root / "VALID").rglob("*.png"))):
        picture(path, 5000 + number)
    assert {s.split for s in FolderSource(root).listing().samples} == {"train", "val"}


def busi(root: Path, *, ending: str = "_mask", second: bool = True) -> Path:
    """Ultrasound images beside their masks, some with two, as a well-known set has them."""
    for place, name in enumerate(("benign", "malignant", "normal")):
        for number in range(8):
            picture(root / name / f"{name} ({number}).png", 100 * place + number)
            mask = np.zeros((16, 16), np.uint8)
            mask[number : number + 4, place:9] = 255
            Image.fromarray(mask).save(root / name / f"{name} ({number}){ending}.png")
            if second and number == 3:
                Image.fromarray(mask.T).save(root / name / f"{name} ({number}){ending}_1.png")
    return root


@pytest.mark.parametrize("ending", ["_mask", "-mask", "_seg", "_segmentation", "_gt", "_Label"])
def test_masks_beside_images_are_no_images_of_a_class(ending: str, tmp_path: Path) -> None:
    root = busi(tmp_path / "in", ending=ending)
    with pytest.raises(InputError, match=r"look like masks of others, such as .*exclude: .*source: masks"):
        written(root, tmp_path)
    index = written(root, tmp_path, exclude=[f"*{ending}*"])
    assert len(index) == 24 and index.classes == ["benign", "malignant", "normal"]


@pytest.mark.parametrize("given", [[], ["normal (7).png"], ["*_mask.png"]])
@pytest.mark.parametrize("second", [False, True])
def test_the_way_out_that_is_named_works(second: bool, given: list[str], tmp_path: Path) -> None:
    root = busi(tmp_path / "in", second=second)
    if given == ["*_mask.png"] and not second:
        assert len(all_samples(FolderSource(root), ShardOptions(exclude=given))[1]) == 24
        return
    with pytest.raises(InputError) as refused:
        all_samples(FolderSource(root), ShardOptions(exclude=given))
    patterns = yaml.safe_load(re.search(r"exclude: (\[.*?\])", str(refused.value))[1])
    assert set(given) <= set(patterns)
    left = all_samples(FolderSource(root), ShardOptions(exclude=patterns))[1]
    assert len(left) == (23 if given == ["normal (7).png"] else 24)


def test_masks_of_the_same_names_with_another_suffix_are_no_images(tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    for path in sorted(root.rglob("*.png")):
        picture(path.with_suffix(".bmp"), len(path.name) + int(path.stem))
    with pytest.raises(InputError, match=r"exclude: \[\"\*\.png\"\].*mask_suffix: \.png"):
        written(root, tmp_path)
    assert len(written(root, tmp_path, exclude=["*.bmp"])) == 16
    for path in sorted(root.rglob("*.bmp"))[2:]:
        path.rename(path.with_stem(f"other{path.stem}"))
    assert any(
        "2 names of images are there with several suffixes" in line
        for line in written(root, tmp_path).warnings
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (
            "x.nii.gz",
            gzip.compress(bytes(344) + b"n+1\0" + bytes(600)),
            "NIfTI compressed by gzip is not read",
        ),
        ("x.heif", b"\0\0\0\x18ftypheim" + bytes(100), "HEIC is not read"),
        ("x.hif", b"\0\0\0\x18ftyphevc" + bytes(100), "HEIC is not read"),
        ("x.ppm", b"P6\n# made by hand\n4 4\n255\n" + bytes(48), "Netpbm is not read"),
        ("x.pgm", b"P2 4 4 255\n" + b"0 " * 16, "Netpbm is not read"),
        ("x.ico", b"\0\0\1\0\1\0\x10\x10" + bytes(100), "Icon is not read"),
        ("x.tga", b"\0\0\2" + bytes(100), "not an image"),
        ("x.qoi", b"qoif" + bytes(100), "QOI is not read"),
    ],
)
def test_images_that_are_not_read_are_rejected_by_name(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    root = classes(tmp_path / "in", "a", "b")
    (root / "a" / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"1 of 17 images are unreadable.*{reason}"):
        written(root, tmp_path, max_rejected=0.01)
    for other in ("notes.gz", "P1 is a patient"):
        (root / "a" / other).write_bytes(gzip.compress(b"text") if other.endswith("gz") else b"P1 is ill")
    written(root, tmp_path, max_rejected=0.07)
    with open(tmp_path / "out" / "rejected.csv", encoding="utf-8") as file:
        assert len(file.read().splitlines()) == 2  # what is no image is passed over


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled", "no_label"])
def test_a_folder_of_unlabelled_images_is_no_class(name: str, tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b", name)
    with pytest.raises(InputError, match=rf"folder '{name}' .*unlabelled: \[{name}\]"):
        written(root, tmp_path)
    index = written(root, tmp_path, unlabelled=[name])
    assert index.classes == ["a", "b"] and (~index.samples["labelled"]).sum() == 8
    named = write(FolderSource(root, classes=["a", "b", name]), tmp_path / "named")
    assert named.classes == ["a", "b", name]
    alone = classes(tmp_path / "alone", name)
    assert FolderSource(alone).listing().classes == [name]


def test_a_few_masks_among_images_are_told_of(tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    shutil.copy(root / "a" / "01.png", root / "a" / "00_mask_1.png")
    picture(root / "a" / "00_mask_1.png", 77)
    assert any(
        "1 of 17 images look like masks of others, such as a/00_mask_1.png" in line
        for line in written(root, tmp_path).warnings
    )


def test_a_pattern_that_no_image_matches_is_an_error(tmp_path: Path) -> None:
    root = classes(tmp_path / "in", "a", "b")
    with pytest.raises(InputError, match=r"exclude: 'a/0\*.jpg' matches no image"):
        written(root, tmp_path, exclude=["a/0*.jpg"])
    index = written(root, tmp_path, exclude=["a/00.png", "*/00.png"])
    assert "exclude: '*/00.png' leaves out 1 images" in index.warnings


def test_masks_in_a_folder_beside_are_no_images(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name in ("a", "b"):
        for number in range(6):
            picture(root / name / "images" / f"{number}.png", number)
            picture(root / name / "masks" / f"{number}.png", 50 + number)
    with pytest.raises(InputError, match="look like masks of others"):
        all_samples(FolderSource(root), ShardOptions())


def test_names_that_only_sound_like_masks_are_images(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for number in range(8):
        picture(root / "face" / f"face_{number}.png", number)
        picture(root / "masked" / f"face_mask_{100 + number}.png", 50 + number)
    assert len(all_samples(FolderSource(root), ShardOptions())[1]) == 16
