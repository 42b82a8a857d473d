"""Segmentation sets: which value is which class, and the mask lies beside its image, pixel for pixel."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import IGNORE, CsvSource, Index, InputError, MaskSource, ShardOptions, parallel, verify, write
from shards.__main__ import main
from shards.masks import MaskValues, settle

SPLITS = ("train", "val", "test")


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def blocks(seed: int, values: list[int], width: int = 24, height: int = 16) -> np.ndarray:
    """A mask of 8-pixel blocks; every third mask lacks the last value."""
    rng = np.random.default_rng(seed)
    allowed = values if seed % 3 else values[:-1]
    return np.kron(rng.choice(allowed, (height // 8, width // 8)), np.ones((8, 8))).astype(np.uint8)


def put(path: Path, image: Image.Image | np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)


def like_nuclei(root: Path, values: list[int], count: int = 8) -> Path:
    """images/<split>/ and masks/<split>/ of the same names."""
    for place, split in enumerate(SPLITS):
        for number in range(count):
            seed = 100 * place + number
            put(root / "images" / split / f"{number}.png", picture(seed))
            put(root / "masks" / split / f"{number}.png", blocks(seed, values))
    return root


def flat(root: Path, values: list[int], count: int = 30) -> Path:
    for number in range(count):
        put(root / "images" / f"{number}.jpg", picture(number), quality=95)
        put(root / "masks" / f"{number}.png", blocks(number, values))
    return root


def masks_of(index: Index) -> dict[str, np.ndarray]:
    return {path: index.mask(row) for row, path in enumerate(index.samples["path"])}


def test_folders_as_nuclei_has_them(tmp_path):
    root = like_nuclei(tmp_path / "in", [0, 255])
    source = MaskSource(root, mask_classes={"nucleus": 255, "background": 0})
    index = write(source, tmp_path / "out", ShardOptions(shard_samples=5))
    assert index.task == "segmentation" and index.classes == ["background", "nucleus"]
    assert {split: len(index.rows(split)) for split in SPLITS} == dict.fromkeys(SPLITS, 8)
    for path, mask in masks_of(index).items():
        _, split, name = path.split("/")
        expected = np.asarray(Image.open(root / "masks" / split / name)) // 255
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected)
    targets = index.targets(np.arange(len(index)))
    expected = [[float((mask == number).any()) for number in (0, 1)] for mask in masks_of(index).values()]
    assert targets.dtype == np.float32 and targets.tolist() == expected
    assert verify(index.folder) == [] and index.warnings == []
    assert index.report["annotations"]["ignored_pixels"] == 0
    pixels = index.report["annotations"]["pixels"]
    assert sum(pixels["val"].values()) == 8 * 24 * 16
    assert pixels["val"]["nucleus"] == sum(int(index.mask(row).sum()) for row in index.rows("val"))


def test_mask_lies_in_the_tar_as_a_grey_png_beside_its_image(tmp_path):
    import webdataset

    index = write(MaskSource(like_nuclei(tmp_path / "in", [0, 255])), tmp_path / "out")
    tars = [str(index.folder / shard["name"]) for shard in index.meta["shards"]]
    for row, sample in enumerate(webdataset.WebDataset(tars, shardshuffle=False)):
        image = Image.open(io.BytesIO(sample["mask.png"]))
        assert sample["__key__"] == index.samples["key"][row] and image.mode == "L"
        assert np.array_equal(np.asarray(image), index.mask(row))
        assert sample["png"] == index.read(row)


def test_same_input_gives_same_bytes_whatever_the_processes(tmp_path, monkeypatch):
    source = MaskSource(flat(tmp_path / "in", [0, 1, 2]))
    write(source, tmp_path / "one", ShardOptions(processes=1, shard_samples=20, resize=8))
    monkeypatch.setattr(parallel, "EACH", 1)
    monkeypatch.setattr(parallel, "CHUNK", 7)
    write(source, tmp_path / "two", ShardOptions(processes=2, shard_samples=20, resize=8))
    one, two = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two and "samples.csv" in one


def test_splits_are_stratified_by_what_occurs(tmp_path):
    root = tmp_path / "in"
    for number in range(100):
        put(root / "images" / f"{number}.png", picture(number))
        mask = np.zeros((16, 24), np.uint8)
        mask[:4] = 1
        mask[8:12] = 2 if number < 10 else 0
        put(root / "masks" / f"{number}.png", mask)
    index = write(MaskSource(root), tmp_path / "out")
    rare = [int(index.targets(index.rows(split))[:, 2].sum()) for split in SPLITS]
    assert [len(index.rows(split)) for split in SPLITS] == [70, 10, 20] and rare == [7, 1, 2]


def test_resizing_takes_the_mask_along(tmp_path):
    root = tmp_path / "in"
    for number in range(12):
        mask = blocks(number, [0, 100, 200], 64, 48)
        put(root / "images" / f"{number}.png", Image.fromarray(np.stack([mask + number] * 3, -1)))
        put(root / "masks" / f"{number}.png", mask)
    index = write(MaskSource(root), tmp_path / "out", ShardOptions(resize=18))
    nearest = ((np.arange(24) + 0.5) * 8 / 3).astype(int)
    for row in range(len(index)):
        image, mask = index.decode(row), index.mask(row)
        assert image.size == (24, 18) and mask.shape == (18, 24)
        number = int(index.samples["path"][row].split("/")[1][:-4])
        assert np.array_equal(mask, blocks(number, [0, 100, 200], 64, 48)[nearest[:18]][:, nearest] // 100)
        centres = np.asarray(image)[1::3, 1::3, 0].astype(int) - number  # of the blocks, now 3 pixels wide
        assert np.array_equal(np.rint(centres / 100), mask[1::3, 1::3])


@pytest.mark.parametrize(
    ("found", "named", "ignored", "classes", "table"),
    [
        ([0, 255], None, None, ["0", "255"], {0: 0, 255: 1}),
        ([1, 255], None, None, ["1", "255"], {1: 0, 255: 1}),
        ([0, 1, 255], None, None, ["0", "1"], {0: 0, 1: 1, 255: IGNORE}),
        ([0, 1, 255], None, [], ["0", "1", "255"], {0: 0, 1: 1, 255: 2}),
        ([0, 128, 255], None, [], ["0", "128", "255"], {0: 0, 128: 1, 255: 2}),
        ([0, 128, 255], None, [128], ["0", "255"], {0: 0, 128: IGNORE, 255: 1}),
        ([0, 5, 7], None, None, ["0", "5", "7"], {0: 0, 5: 1, 7: 2}),
        ([0, 255], {"cell": 255, "rest": 0}, None, ["rest", "cell"], {0: 0, 255: 1}),
        ([0, 1, 255], {"a": 0, "b": 1}, None, ["a", "b"], {0: 0, 1: 1, 255: IGNORE}),
        ([0, 3, 9], {"a": 0, "b": 9}, [3], ["a", "b"], {0: 0, 3: IGNORE, 9: 1}),
    ],
)
def test_values_become_classes(found, named, ignored, classes, table):
    decided = settle(MaskValues(named, ignored), dict.fromkeys(found, "m.png"))
    assert decided.classes == classes and {value: decided.table[value] for value in found} == table


@pytest.mark.parametrize(
    ("found", "named", "ignored", "message"),
    [
        ([0, 128, 255], None, None, "hold the values 0, 128, 255: is 255 a class, or to be ignored"),
        ([0, 7], {"a": 0, "b": 1}, None, r"mask m.png holds the value 7, .* mask_classes \(0, 1\)"),
        ([0, 1, 255], {"a": 0, "b": 1}, [], "m.png holds the value 255"),
        ([0, 9, 255], {"a": 0, "b": 9}, None, "m.png holds the value 255"),
        ([0], None, None, "masks hold only the value 0: at least two classes"),
        ([0, 255], None, [255], "masks hold only the value 0"),
        (list(range(256)), None, [], "masks hold 256 values, each a class: at most 255"),
        ([0, 1], {"a": 0, "b": 0}, None, "mask value 0 is named twice"),
        ([0, 1], {"a": 0, "b": 300}, None, "mask value 300 is not within 0 to 255"),
        ([0, 1], {"a": 0, "b": 1}, [1], "mask value 1 is named twice"),
        ([0, 1], {"a": 0}, None, "fewer than two classes"),
    ],
)
def test_values_that_leave_it_open_are_named(found, named, ignored, message):
    with pytest.raises(InputError, match=message):
        settle(MaskValues(named, ignored), dict.fromkeys(found, "m.png"))


def test_what_was_assumed_of_the_values_is_said(tmp_path):
    index = write(MaskSource(flat(tmp_path / "in", [0, 1, 255])), tmp_path / "out")
    assert index.classes == ["0", "1"]
    assert {255} <= set(np.unique(np.concatenate([mask.ravel() for mask in masks_of(index).values()])))
    assert any("value 255 are ignored" in line for line in index.warnings)
    assert any("values 0, 1 is a class" in line for line in index.warnings)
    assert index.report["annotations"]["ignored_pixels"] > 0


def test_palette_index_counts_and_not_its_colour(tmp_path):
    root = flat(tmp_path / "in", [0, 1, 2])
    for path in (root / "masks").iterdir():
        image = Image.fromarray(np.asarray(Image.open(path)), "P")
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
        image.save(path)
    index = write(MaskSource(root), tmp_path / "out")
    assert index.classes == ["0", "1", "2"]
    assert np.array_equal(masks_of(index)["images/4.jpg"], blocks(4, [0, 1, 2]))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_one_bit_and_grey_rgb_masks_are_binary(tmp_path, suffix):
    root = flat(tmp_path / "in", [0, 255])
    for path in (root / "masks").iterdir():
        mask = Image.open(path)
        path.unlink()
        mask.convert("1" if int(path.stem) % 2 else "RGB", dither=0).save(path.with_suffix(suffix))
    index = write(MaskSource(root), tmp_path / "out")
    assert index.classes == ["0", "255"]
    assert np.array_equal(masks_of(index)["images/5.jpg"], blocks(5, [0, 255]) // 255)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.fromarray(np.zeros((16, 24), np.uint16)), r"mask masks/7.png is 16-bit: expected 8-bit grey"),
        (picture(1), r"mask masks/7.png is in colour \(RGB\): expected 8-bit grey or a palette"),
        (Image.new("RGBA", (24, 16), (0, 0, 0, 9)), r"masks/7.png is in colour \(RGBA\)"),
        (
            Image.new("L", (16, 24)),
            r"images/7.jpg has 24 x 16 pixels, but its mask masks/7.png is of 16 x 24",
        ),
    ],
)
def test_mask_that_cannot_be_one_is_named(tmp_path, mask, message):
    root = flat(tmp_path / "in", [0, 1])
    put(root / "masks" / "7.png", mask)
    with pytest.raises(InputError, match=message):
        write(MaskSource(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_image_without_a_mask_is_unlabelled_and_counted(tmp_path):
    root = flat(tmp_path / "in", [0, 1])
    (root / "masks" / "3.png").unlink()
    put(root / "masks" / "99.png", blocks(1, [0, 1]))
    for name in ("3.jpg", "4.jpg", "README"):
        (root / "masks" / name).write_bytes(b"")
    index = write(MaskSource(root), tmp_path / "out")
    (row,) = index.rows("train", labelled=False)
    assert index.samples["path"][row] == "images/3.jpg" and np.isnan(index.targets([row])).all()
    assert "1 images have no mask, e.g. images/3.jpg: they are unlabelled" in index.warnings
    assert "1 mask files belong to no image, e.g. masks/99.png" in index.warnings
    assert "files among the annotations that were not read as mask files: 2 .jpg, 1 README" in index.warnings
    assert index.meta["counts"]["train"]["unlabelled"] == 1 and verify(index.folder) == []
    with pytest.raises(InputError, match=r"3-[0-9a-f]{8}.mask.png .* the sample is unlabelled"):
        index.mask(int(row))
    with pytest.raises(InputError, match=r"is a segmentation set, it has no boxes.json"):
        index.boxes(int(row))


def test_mask_that_cannot_be_read_rejects_its_image(tmp_path):
    root = flat(tmp_path / "in", [0, 1])
    (root / "masks" / "3.png").write_bytes((root / "masks" / "3.png").read_bytes()[:45])
    (root / "masks" / "4.png").write_bytes(b"")
    index = write(MaskSource(root), tmp_path / "out", ShardOptions(max_rejected=0.1))
    reasons = (index.folder / "rejected.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in reasons] == ["images/3.jpg", "images/4.jpg"]
    assert all("mask masks/" in line for line in reasons)


def test_no_readable_mask_and_class_that_is_in_none_are_named(tmp_path):
    root = flat(tmp_path / "in", [0, 1])
    with pytest.raises(InputError, match="no readable mask holds the value 2 of 'rare': they hold 0, 1"):
        write(MaskSource(root, mask_classes={"a": 0, "b": 1, "rare": 2}), tmp_path / "out")
    for path in (root / "masks").iterdir():
        path.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"no readable image among 30 \(images/0.jpg: mask masks/0.png: not an"
    ):
        write(MaskSource(root), tmp_path / "out")


def test_mask_of_ignored_pixels_only_is_labelled_with_nothing(tmp_path):
    root = flat(tmp_path / "in", [0, 1])
    put(root / "masks" / "3.png", np.full((16, 24), 255, np.uint8))
    index = write(MaskSource(root), tmp_path / "out")
    row = index.samples["path"].tolist().index("images/3.jpg")
    assert index.samples["labels"][row] == "" and index.samples["labelled"][row]
    assert (index.mask(row) == IGNORE).all() and index.targets([row]).tolist() == [[0, 0]]


@pytest.mark.parametrize(("ignored", "why"), [(None, "was taken as ignored"), ([255], "is in mask_ignore")])
def test_masks_of_0_and_255_whose_classes_are_named_0_and_1(tmp_path, ignored, why):
    source = MaskSource(
        flat(tmp_path / "in", [0, 255]), mask_classes={"bg": 0, "obj": 1}, mask_ignore=ignored
    )
    with pytest.raises(InputError) as refused:
        write(source, tmp_path / "out")
    assert (
        str(refused.value) == f"no readable mask holds the value 1 of 'obj'; 255, found in masks/1.png, {why}"
    )


@pytest.mark.parametrize(
    ("orientation", "size", "stored"), [(6, (16, 24), True), (6, (24, 16), False), (3, (24, 16), False)]
)
def test_exif_rotation_is_taken_only_where_the_shape_tells(tmp_path, orientation, size, stored):
    root = flat(tmp_path / "in", [0, 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(root / "images" / "3.jpg", picture(3), exif=exif)
    put(root / "masks" / "3.png", np.resize(np.uint8([0, 1]), (size[1], size[0])))
    index = write(MaskSource(root), tmp_path / "out")
    if stored:
        mask = masks_of(index)["images/3.jpg"]
        assert mask.shape == (24, 16) and np.array_equal(mask, np.resize([0, 1], (24, 16)))
    else:
        assert "images/3.jpg,has an EXIF rotation" in (index.folder / "rejected.csv").read_text()


def test_names_by_split_suffix_or_in_one_folder(tmp_path):
    for number in range(40):
        split = ("Train", "valid", "test", "test")[number % 4]
        put(tmp_path / "a" / split / "x" / f"{number}.jpg", picture(number))
        put(tmp_path / "a" / split / "y" / f"{number}_mask.png", blocks(number, [0, 1]))
        put(tmp_path / "b" / f"{number}.png", picture(number))
        put(tmp_path / "b" / f"{number}_m.png", blocks(number, [0, 1]))
    listing = MaskSource(tmp_path / "a", "{split}/x", "{split}/y", mask_suffix="_mask").listing()
    assert {one.path.split("/")[0]: one.split for one in listing.samples} == {
        "Train": "train",
        "valid": "val",
        "test": "test",
    }
    assert all(one.labelled for one in listing.samples) and not listing.notes
    beside = MaskSource(tmp_path / "b", ".", ".", mask_suffix="_m").listing()
    assert len(beside.samples) == 40 and all(one.labelled for one in beside.samples) and not beside.notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "images/0.jpg"}, r"images: there is no folder .*images/0.jpg"),
        ({"masks": "nothing"}, "masks: there is no .*nothing"),
        ({"images": "../elsewhere"}, "images is '../elsewhere', expected a path below"),
        ({"masks": "/etc"}, "masks is '/etc', expected a path below"),
        ({"images": "{split}"}, "images is '{split}', but masks 'masks' has no {split}"),
        ({"masks": "{split}/masks"}, "masks: there is no .*for {split}, one of 'train'"),
        ({"masks": "images"}, "are one folder, .*images: mask_suffix must tell them apart"),
        (
            {"mask_suffix": "_seg"},
            r"no image in .* has a mask in .*images/0.jpg, the same name with _seg.png",
        ),
        ({"mask_classes": {"a|b": 0, "c": 1}}, "class name 'a|b'"),
    ],
)
def test_wrong_folders_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        MaskSource(flat(tmp_path, [0, 1], 3), **options).listing()


def test_two_folders_of_one_split_are_named(tmp_path):
    for name in ("val", "valid"):
        put(tmp_path / "images" / name / "1.png", picture(1))
        put(tmp_path / "masks" / name / "1.png", blocks(1, [0, 1]))
    with pytest.raises(InputError, match=r"masks/val and .*masks/valid are both the val split"):
        MaskSource(tmp_path).listing()


@pytest.mark.parametrize("paths", [{}, {"images": "images/{split}", "masks": "masks/{split}"}])
def test_images_beside_the_folders_of_splits_are_counted(tmp_path, paths):
    root = like_nuclei(tmp_path, [0, 1], 2)
    for number in range(5):
        put(root / "images" / "holdout" / "deep" / f"{number}.png", picture(number))
    put(root / "images" / "loose.png", picture(9))
    put(root / "images" / "more" / "10.png", picture(10))
    source = MaskSource(root, **paths)
    (note,) = source.listing(exclude=[root / "images" / "more"]).notes
    assert note == "6 images lie in no split's folder and were not read, e.g. images/holdout/deep/0.png"
    assert source.listing().notes == [note.replace("6", "7")]


def test_masks_lie_beside_folders_of_images_by_split_without_a_word(tmp_path):
    root = like_nuclei(tmp_path, [0, 1], 2)
    for path in (root / "images").iterdir():
        path.rename(root / path.name)
    assert MaskSource(root, "{split}", "masks/{split}").listing().notes == []


@pytest.mark.parametrize("paths", [{}, {"images": "images/{split}", "masks": "masks/{split}"}])
def test_split_without_masks_serves_for_pretraining_and_another_is_made(tmp_path, paths):
    root = like_nuclei(tmp_path / "in", [0, 1])
    shutil.rmtree(root / "masks" / "test")
    index = write(MaskSource(root, **paths), tmp_path / "out")
    unlabelled = index.samples["path"].iloc[index.rows("train", labelled=False)]
    assert sorted(unlabelled) == [f"images/test/{number}.png" for number in range(8)]
    made = index.samples["path"].iloc[index.rows("test")]
    assert len(made) and made.str.startswith("images/train").all()
    assert (
        "no image of the test split is labelled: its 8 images serve for pretraining, and another test split"
        " is made out of train" in index.warnings
    )


def test_masks_of_a_split_without_images_are_named(tmp_path):
    root = like_nuclei(tmp_path, [0, 1], 2)
    shutil.rmtree(root / "images" / "val")
    with pytest.raises(InputError, match=r"no folder .*images/val, though there is .*masks/val"):
        MaskSource(root).listing()


def table(root: Path) -> Path:
    flat(root, [0, 1], 60)
    rows = ["path,mask,patient,part"]
    for number in range(60):
        mask = {5: "", 6: "masks/none.png"}.get(number, f"masks/{number}.png")
        rows.append(f"images/{number}.jpg,{mask},p{number // 3},{SPLITS[number // 3 % 3]}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


def test_missing_suffix_of_a_mask_is_found_on_disk_as_that_of_an_image_is(tmp_path):
    flat(tmp_path, [0, 1], 4)
    rows = "".join(f"images/{number},masks/{number}\n" for number in (0, 1, 2))
    (tmp_path / "labels.csv").write_text(f"path,mask\n{rows}images/3,masks/none\n")
    listing = CsvSource(tmp_path, mask_column="mask").listing()
    assert [one.annotation and one.annotation.path for one in listing.samples] == [
        *("masks/0.png", "masks/1.png", "masks/2.png", None)
    ]
    assert any("1 masks that labels.csv names do not exist, e.g. masks/none" in x for x in listing.notes)


def test_csv_with_a_mask_column_keeps_groups_and_splits(tmp_path):
    options = {"mask_column": "mask", "group_column": "patient", "split_column": "part"}
    index = write(CsvSource(table(tmp_path / "in"), **options), tmp_path / "out")
    assert index.task == "segmentation" and len(index) == 60
    assert index.samples.groupby("group")["split"].nunique().max() == 1
    unlabelled = index.samples["path"][~index.samples["labelled"]].tolist()
    assert sorted(unlabelled) == ["images/5.jpg", "images/6.jpg"]
    assert any("1 masks that labels.csv names do not exist" in line for line in index.warnings)
    assert np.array_equal(masks_of_labelled(index)["images/7.jpg"], blocks(7, [0, 1]))


def masks_of_labelled(index: Index) -> dict[str, np.ndarray]:
    rows = np.flatnonzero(index.samples["labelled"])
    return {index.samples["path"][row]: index.mask(row) for row in rows}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,mask\n1.png,../x.png\n", {}, "line 2: column 'mask' is '../x.png', expected a file below"),
        ("path,mask\n1.png,/etc/passwd\n", {}, "line 2: column 'mask' is '/etc/passwd'"),
        ("path,mask\n1.png,\n", {}, "labels.csv has no mask in column 'mask'"),
        ("path,mask\n1.png,x.png\n", {}, r"no mask in column 'mask' \(x.png does not exist\)"),
        ("path,masks\n1.png,x.png\n", {}, "no column 'mask', did you mean 'masks'"),
        ("path,mask\n1.png,x.png\n", {"classes": ["a", "b"]}, "mask_classes names their values"),
    ],
)
def test_wrong_mask_column_is_named(tmp_path, text, options, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        CsvSource(tmp_path, mask_column="mask", **options).listing()


def test_identical_images_with_two_masks_are_reported(tmp_path):
    root = flat(tmp_path / "in", [0, 1])
    for number in (100, 101):
        put(root / "images" / f"{number}.png", picture(500))
        put(root / "masks" / f"{number}.png", blocks(number, [0, 1]))
    report = write(MaskSource(root), tmp_path / "out").report
    assert report["duplicates"]["within_splits"] + report["duplicates"]["across_splits"] == 1
    assert report["duplicates"]["with_different_labels"] == 1


def test_mask_that_changes_while_sharding_is_named(tmp_path):
    root = flat(tmp_path / "in", [0, 1])

    def meddle(done: int, total: int, text: str) -> None:
        if done == total and text == "reading images":
            put(root / "masks" / "7.png", 1 - blocks(7, [0, 1]))

    with pytest.raises(InputError, match=r"mask masks/7.png changed while"):
        write(MaskSource(root), tmp_path / "out", progress=meddle)


def test_one_changed_byte_in_a_mask_is_found(tmp_path):
    index = write(MaskSource(flat(tmp_path / "in", [0, 1])), tmp_path / "out")
    first = index.samples.iloc[0]
    path = index.folder / first["shard"]
    content = bytearray(path.read_bytes())
    content[first["annotation_offset"] + first["annotation_length"] // 2] ^= 1
    path.write_bytes(content)
    (problem,) = verify(index.folder)
    assert problem.startswith(f"{first['shard']} was changed")


def test_masks_are_read_in_another_process_and_by_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    index = write(MaskSource(flat(tmp_path / "in", [0, 1])), tmp_path / "out")
    expected = [index.mask(row) for row in range(len(index))]
    copy = pickle.loads(pickle.dumps(index))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(copy.mask, range(len(index))))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected))


def test_masks_from_the_command_line(tmp_path, capsys):
    root = like_nuclei(tmp_path / "in", [0, 255])
    options = ["--mask-classes", "background=0", "nucleus=255"]
    assert main(["write", "masks", str(root), str(tmp_path / "out"), *options]) == 0
    assert "24 samples, segmentation, 2 classes" in capsys.readouterr().out
    assert Index.open(tmp_path / "out").classes == ["background", "nucleus"]


def several(
    root: Path, *, together: bool = True, names: tuple[str, ...] = ("_mask", "_mask_1", "_mask_2")
) -> Path:
    """20 images with a mask of 0 and 255 for each of some lesions, as sets of ultrasound images have them."""
    for number in range(20):
        put(root / f"{number}.png", picture(number))
        for place, name in enumerate(names[: 1 + number % len(names)]):
            mask = np.zeros((16, 24), np.uint8)
            mask[:8, 8 * place : 8 * place + 8] = 255
            put((root if together else root / "masks") / f"{number}{name}.png", mask)
    return root


@pytest.mark.parametrize("names", [("_mask", "_mask_1", "_mask_2"), ("_mask1", "_mask2", "_mask3")])
def test_several_masks_of_an_image_are_merged(tmp_path, names):
    root = several(tmp_path / "in", names=names)
    index = write(MaskSource(root, images=".", masks=".", mask_suffix="_mask"), tmp_path / "out")
    assert len(index) == 20 and index.samples["labelled"].all()
    for path, mask in masks_of(index).items():
        expected = np.zeros((16, 24), bool)
        expected[:8, : 8 * (1 + int(path.split(".")[0]) % 3)] = True
        np.testing.assert_array_equal(mask == 1, expected)
    assert any(line.startswith("13 images have several masks, which are merged") for line in index.warnings)


def test_masks_of_another_image_are_not_merged_into_this_one(tmp_path):
    for number in range(12):
        put(tmp_path / "in" / "images" / f"scan_{number}.png", picture(number))
        put(tmp_path / "in" / "masks" / f"scan_{number}_mask.png", blocks(number, [0, 255]))
    put(tmp_path / "in" / "images" / "scan.png", picture(50))
    index = write(MaskSource(tmp_path / "in", mask_suffix="_mask"), tmp_path / "out")
    assert not any("several masks" in line for line in index.warnings)
    assert index.samples["labelled"].sum() == 12


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [(100, (16, 24), "overlap with different values"), (255, (8, 8), "have 24 x 16 and 8 x 8 pixels")],
)
def test_masks_that_contradict_each_other_are_named(tmp_path, value, shape, message):
    root = several(tmp_path / "in", names=("_mask",))
    put(root / "0_mask_1.png", np.full(shape, value, np.uint8))
    with pytest.raises(InputError, match=rf"0_mask.png and .*0_mask_1.png of one image {message}"):
        write(MaskSource(root, images=".", masks=".", mask_suffix="_mask"), tmp_path / "out")


def test_masks_of_the_same_name_with_another_suffix(tmp_path):
    for number in range(20):
        put(tmp_path / "in" / f"{number:03}.bmp", picture(number))
        put(tmp_path / "in" / f"{number:03}.png", blocks(number, [0, 255]))
    index = write(MaskSource(tmp_path / "in", images=".", masks=".", mask_suffix=".png"), tmp_path / "out")
    assert sorted(index.samples["path"]) == [f"{number:03}.bmp" for number in range(20)]
    for path, mask in masks_of(index).items():
        np.testing.assert_array_equal(mask * 255, blocks(int(path[:3]), [0, 255]))


def test_a_mask_of_several_pages_is_named(tmp_path):
    root = flat(tmp_path / "in", [0, 255], count=12)
    pages = [Image.fromarray(blocks(number, [0, 255])) for number in range(2)]
    (root / "masks" / "3.png").unlink()
    pages[0].save(root / "masks" / "3.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=r"masks/3.tif has 2 pages: expected one"):
        write(MaskSource(root), tmp_path / "out")
