"""Detection sets: COCO and VOC say the same, and boxes and outlines follow their image."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import CocoSource, Index, InputError, ShardOptions, VocSource, parallel, verify, write
from shards.__main__ import main
from shards.segments import to_runs

SPLITS = ("train", "val", "test")
NAMES = {1: "RBC", 5: "WBC", 7: "Platelets"}
FILE = "annotations.json"
WIDTH, HEIGHT = 40, 30


def put(path: Path, seed: int, width: int = WIDTH, height: int = HEIGHT, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def objects(seed: int) -> list[tuple[int, list[int]]]:
    """Category and whole-pixel box (x, y, width, height) of each object; none in every fifth image."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 4)) if seed % 5 else 0
    return [
        (int(rng.choice(list(NAMES), p=[0.6, 0.3, 0.1])), [int(v) for v in (*rng.integers(0, 20, 2), 9, 7)])
        for _ in range(count)
    ]


def content(names: dict[int, str]) -> dict[str, Any]:
    """The JSON file of some images, seed → file name."""
    annotations = [
        {"id": 0, "image_id": seed, "category_id": category, "bbox": box, "area": 50.5, "iscrowd": 0}
        for seed in names
        for category, box in objects(seed)
    ]
    for number, one in enumerate(annotations):
        one["id"] = number + 1
    return {
        "images": [
            {"id": seed, "file_name": name, "width": WIDTH, "height": HEIGHT} for seed, name in names.items()
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
    }


def xml(seed: int, extra: str = "") -> str:
    found = "".join(
        f"<object><name>{NAMES[category]}</name><pose>Unspecified</pose><difficult>0</difficult><bndbox>"
        f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox>"
        "</object>"
        for category, (x, y, width, height) in objects(seed)
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
    return f"<annotation><filename>other.jpg</filename>{size}{found}{extra}</annotation>\n"


def like_bccd(root: Path, count: int = 10) -> Path:
    """images/<split>/, annotations_voc/<split>/ and instances_<split>.json."""
    for place, split in enumerate(SPLITS):
        names = {100 * place + number: f"{number}.jpg" for number in range(1, count + 1)}
        for seed, name in names.items():
            put(root / "images" / split / name, seed)
            path = (root / "annotations_voc" / split / name).with_suffix(".xml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(xml(seed))
        (root / f"instances_{split}.json").write_text(json.dumps(content(names)))
    return root


def coco_of(root: Path) -> CocoSource:
    return CocoSource(root, "images/{split}", "instances_{split}.json")


def one_file(root: Path, **changes: Any) -> Path:
    """30 images and one JSON file; its first annotation changed."""
    names = {seed: f"{seed}.png" for seed in range(1, 31)}
    for seed, name in names.items():
        put(root / "images" / name, seed)
    file = content(names)
    file["annotations"][0].update(changes)
    (root / FILE).write_text(json.dumps(file))
    return root


def found(index: Index, row: int) -> set[tuple[Any, ...]]:
    boxes = index.boxes(row)
    labels = [index.classes[number] for number in boxes.labels]
    return set(zip(labels, map(tuple, boxes.boxes.tolist()), boxes.crowd.tolist()))


def row_of(index: Index, path: str) -> int:
    return index.samples["path"].tolist().index(path)


def test_coco_and_voc_of_one_set_agree(tmp_path):
    root = like_bccd(tmp_path / "in")
    coco = write(coco_of(root), tmp_path / "coco", ShardOptions(shard_samples=4))
    classes = ["RBC", "WBC", "Platelets"]
    voc = write(VocSource(root, "images", "annotations_voc", classes), tmp_path / "voc")
    assert coco.task == voc.task == "detection" and coco.classes == voc.classes == classes
    assert {split: len(coco.rows(split)) for split in SPLITS} == dict.fromkeys(SPLITS, 10)
    assert coco.samples["path"].tolist() == voc.samples["path"].tolist()
    assert coco.samples["labels"].tolist() == voc.samples["labels"].tolist()
    for row, path in enumerate(coco.samples["path"]):
        _, split, name = path.split("/")
        seed = 100 * SPLITS.index(split) + int(name[:-4])
        expected = {
            (NAMES[c], (float(x), float(y), float(x + w), float(y + h)), False)
            for c, (x, y, w, h) in objects(seed)
        }
        assert found(coco, row) == found(voc, row) == expected
        assert coco.boxes(row).area.tolist() == [50.5] * len(expected)
        assert voc.boxes(row).area.tolist() == [63] * len(expected)
        targets = coco.targets([row])[0]
        assert targets.tolist() == [float(name in {label for label, *_ in expected}) for name in classes]
    assert verify(coco.folder) == verify(voc.folder) == [] and coco.warnings == voc.warnings
    total = sum(map(len, (objects(100 * place + n) for place in range(3) for n in range(1, 11))))
    counted = coco.report["annotations"]
    assert sum(sum(table.values()) for table in counted["boxes"].values()) == total
    assert (counted["clipped"], counted["dropped"], counted["outlined"]) == (0, 0, 0) and not coco.outlined


def test_arrays_have_the_promised_types_also_where_nothing_is(tmp_path):
    index = write(coco_of(like_bccd(tmp_path / "in")), tmp_path / "out")
    for path, count in (("images/train/5.jpg", 0), ("images/train/1.jpg", len(objects(1)))):
        boxes = index.boxes(row_of(index, path))
        assert len(boxes) == count and boxes.boxes.shape == (count, 4) and boxes.boxes.dtype == np.float32
        assert boxes.labels.dtype == np.int64 and boxes.crowd.dtype == bool and boxes.area.dtype == np.float32
        assert boxes.masks(10, 10) is None
    row = row_of(index, "images/train/5.jpg")
    assert index.samples["labels"][row] == "" and index.samples["labelled"][row]
    with pytest.raises(InputError, match=r"is a detection set, it has no mask.png"):
        index.mask(row)


def test_boxes_lie_in_the_tar_as_json_beside_their_image(tmp_path):
    import tarfile

    index = write(coco_of(like_bccd(tmp_path / "in")), tmp_path / "out")
    with tarfile.open(index.folder / "train-000000.tar") as tar:
        for row in index.rows("train"):
            stored = json.load(tar.extractfile(f"{index.samples['key'][row]}.boxes.json"))
            assert stored["boxes"] == index.boxes(row).boxes.tolist()
            assert stored["labels"] == index.boxes(row).labels.tolist() and "segments" not in stored


def test_same_input_gives_same_bytes_whatever_the_processes(tmp_path, monkeypatch):
    source = coco_of(like_bccd(tmp_path / "in"))
    write(source, tmp_path / "one", ShardOptions(processes=1, resize=20))
    monkeypatch.setattr(parallel, "EACH", 1)
    monkeypatch.setattr(parallel, "CHUNK", 7)
    write(source, tmp_path / "two", ShardOptions(processes=2, resize=20))
    one, two = (
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_resizing_takes_boxes_and_outlines_along(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:20, 4:24] = True
    polygon = [[4, 10, 24, 10, 24, 20, 4, 20]]
    runs = {"size": [HEIGHT, WIDTH], "counts": to_runs(mask).counts}
    root = one_file(tmp_path / "in", bbox=[4, 10, 20, 10], area=200, segmentation=polygon)
    file = json.loads((root / FILE).read_text())
    first = file["annotations"][0]
    file["annotations"].append({**first, "id": 999, "segmentation": runs})
    file["annotations"] = [one for one in file["annotations"] if one["id"] in (1, 999) or one["image_id"] > 1]
    (root / FILE).write_text(json.dumps(file))
    whole = write(CocoSource(root), tmp_path / "whole")
    half = write(CocoSource(root), tmp_path / "half", ShardOptions(resize=15))
    row = row_of(half, "images/1.png")
    assert half.decode(row).size == (20, 15)
    boxes = half.boxes(row)
    assert boxes.boxes.tolist() == [[2, 5, 12, 10]] * 2 and boxes.area.tolist() == [50, 50]
    small = boxes.masks(15, 20)
    assert small.dtype == bool and small.shape == (2, 15, 20)
    assert np.array_equal(small[0], mask[::2, ::2]) and np.array_equal(small[1], mask[::2, ::2])
    full = whole.boxes(row_of(whole, "images/1.png"))
    assert np.array_equal(full.masks(HEIGHT, WIDTH), np.stack([mask, mask]))
    assert np.array_equal(full.masks(15, 20), small) and not whole.outlined
    assert whole.boxes(row_of(whole, "images/2.png")).masks(15, 20) is None
    assert whole.boxes(row_of(whole, "images/5.png")).masks(15, 20).shape == (0, 15, 20)


def test_every_form_of_an_outline_is_the_same_mask(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:20, 4:24] = True
    counts = [4 * HEIGHT + 10, *[10, 20] * 19, 10, 10 + 16 * HEIGHT]
    forms = [
        [[4, 10, 24, 10, 24, 20, 4, 20]],
        {"size": [HEIGHT, WIDTH], "counts": to_runs(mask).counts},
        {"size": [HEIGHT, WIDTH], "counts": counts},
    ]
    root = tmp_path / "in"
    names = {seed: f"{seed}.png" for seed in range(1, 13)}
    file = content(names)
    file["annotations"] = []
    for seed, name in names.items():
        put(root / "images" / name, seed)
        one = {"id": seed, "image_id": seed, "category_id": 1, "segmentation": forms[seed % 3]}
        if seed % 3:
            one |= {"bbox": [4, 10, 20, 10], "iscrowd": 1}
        file["annotations"].append(one)
    (root / FILE).write_text(json.dumps(file))
    index = write(CocoSource(root), tmp_path / "out")
    assert index.outlined and index.report["annotations"]["outlined"] == 12
    for row in range(len(index)):
        boxes = index.boxes(row)
        assert np.array_equal(boxes.masks(HEIGHT, WIDTH)[0], mask)
        assert boxes.boxes.tolist() == [[4, 10, 24, 20]] and boxes.area.tolist() == [200]


def test_boxes_are_clipped_and_those_without_area_dropped(tmp_path):
    root = one_file(tmp_path / "in", bbox=[-5, 20, 15, 90])
    file = json.loads((root / FILE).read_text())
    first = file["annotations"][0]
    for number, box in enumerate(([5, 5, 0, 9], [50, 5, 9, 9], [9, 9, -4, 3])):
        file["annotations"].append({**first, "id": 900 + number, "bbox": box})
    (root / FILE).write_text(json.dumps(file))
    index = write(CocoSource(root), tmp_path / "out")
    assert [0, 20, 10, 30] in index.boxes(row_of(index, f"images/{first['image_id']}.png")).boxes.tolist()
    counted = index.report["annotations"]
    assert (counted["clipped"], counted["dropped"]) == (1, 3)
    assert "1 boxes reached beyond their images and are clipped" in index.warnings
    assert "3 boxes without any area in their images are left out" in index.warnings


def test_crowds_are_cocos_iscrowd_and_vocs_difficult(tmp_path):
    coco = write(CocoSource(one_file(tmp_path / "in", iscrowd=1)), tmp_path / "coco")
    assert coco.report["annotations"]["crowd"] == 1
    root = like_bccd(tmp_path / "bccd")
    box = "<xmin>3</xmin><ymin>4</ymin><xmax>9.5</xmax><ymax>8</ymax>"
    hard = f"<object><name>WBC</name><difficult>1</difficult><bndbox>{box}</bndbox></object>"
    (root / "annotations_voc" / "train" / "5.xml").write_text(xml(5, hard))
    voc = write(VocSource(root, "images", "annotations_voc"), tmp_path / "voc")
    assert found(voc, row_of(voc, "images/train/5.jpg")) == {("WBC", (2.0, 3.0, 9.5, 8.0), True)}


def test_what_no_file_annotates_is_unlabelled_and_counted(tmp_path):
    root = like_bccd(tmp_path / "in")
    put(root / "images" / "train" / "extra.png", 999)
    put(root / "images" / "test" / "extra.png", 998)
    (root / "annotations_voc" / "val" / "lonely.xml").write_text(xml(1))
    coco, voc = (
        write(coco_of(root), tmp_path / "coco"),
        write(VocSource(root, "images", "annotations_voc"), tmp_path / "voc"),
    )
    for index in (coco, voc):
        rows = [row_of(index, f"images/{split}/extra.png") for split in ("train", "test")]
        assert [index.samples["split"][row] for row in rows] == ["train", "test"]
        assert not index.samples["labelled"][rows].any() and np.isnan(index.targets(rows)).all()
        with pytest.raises(InputError, match=r"extra-[0-9a-f]{8}.boxes.json .* the sample is unlabelled"):
            index.boxes(rows[0])
        assert verify(index.folder) == []
    assert any(line.startswith("2 images have no annotation, e.g. images/t") for line in coco.warnings)
    assert any(line.startswith("2 images have no XML") for line in voc.warnings)
    idle = "1 images of the test split are unlabelled and serve for nothing: pretraining takes train images"
    assert idle in coco.warnings and idle in voc.warnings
    assert any(
        "1 XML files belong to no image, e.g. annotations_voc/val/lonely.xml" in x for x in voc.warnings
    )


def test_split_that_no_file_annotates_serves_for_pretraining_and_another_is_made(tmp_path):
    root = like_bccd(tmp_path / "in", 12)
    (root / "instances_test.json").unlink()
    shutil.rmtree(root / "annotations_voc" / "test")
    voc = VocSource(root, "images", "annotations_voc")
    for name, source in (("coco", coco_of(root)), ("voc", voc)):
        index = write(source, tmp_path / name)
        unlabelled = index.samples["path"].iloc[index.rows("train", labelled=False)]
        assert set(unlabelled) == {f"images/test/{number}.jpg" for number in range(1, 13)}
        assert index.samples["path"].iloc[index.rows("test")].str.startswith("images/train").all()
        assert any(
            "no image of the test split is labelled: its 12 images serve" in line for line in index.warnings
        )


def test_images_beside_the_folders_of_splits_are_counted(tmp_path):
    root = like_bccd(tmp_path)
    put(root / "images" / "holdout" / "1.jpg", 999)
    note = "1 images lie in no split's folder and were not read, e.g. images/holdout/1.jpg"
    assert note in coco_of(root).listing().notes
    assert note in VocSource(root, "images", "annotations_voc").listing().notes


def test_splits_are_made_and_stratified_by_what_occurs(tmp_path):
    root = tmp_path / "in"
    names = {seed: f"{seed}.png" for seed in range(100)}
    file = content(names)
    file["annotations"] = [
        {"id": seed, "image_id": seed, "category_id": 7 if seed < 10 else 1, "bbox": [1, 1, 5, 5]}
        for seed in names
    ]
    for seed, name in names.items():
        put(root / "images" / name, seed)
    (root / FILE).write_text(json.dumps(file))
    index = write(CocoSource(root), tmp_path / "out")
    assert index.classes == ["RBC", "Platelets"]
    assert "categories without any object are left out: WBC" in index.warnings
    rare = [int(index.targets(index.rows(split))[:, 1].sum()) for split in SPLITS]
    assert [len(index.rows(split)) for split in SPLITS] == [70, 10, 20] and rare == [7, 1, 2]


def test_file_that_is_listed_but_not_there_is_rejected(tmp_path):
    root = one_file(tmp_path / "in")
    (root / "images" / "3.png").unlink()
    index = write(CocoSource(root), tmp_path / "out")
    assert len(index) == 29 and index.report["rejected"] == {"no such file": 1}


def test_box_of_an_image_of_another_size_is_named(tmp_path):
    root = like_bccd(tmp_path / "in")
    put(root / "images" / "val" / "2.jpg", 2, 20, 10)
    where = r"images/val/2.jpg has 20 x 10 pixels, but "
    with pytest.raises(InputError, match=where + r"instances_val.json \(image 2.jpg\) is of 40 x 30"):
        write(coco_of(root), tmp_path / "out")
    with pytest.raises(InputError, match=where + r"annotations_voc/val/2.xml is of 40 x 30"):
        write(VocSource(root, "images", "annotations_voc"), tmp_path / "out")


@pytest.mark.parametrize(("orientation", "taken"), [(6, True), (3, False)])
def test_exif_rotation_is_taken_only_where_the_shape_tells(tmp_path, orientation, taken):
    root = like_bccd(tmp_path / "in")
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(
        root / "images" / "train" / "2.jpg",
        2,
        HEIGHT if taken else WIDTH,
        WIDTH if taken else HEIGHT,
        exif=exif,
    )
    index = write(coco_of(root), tmp_path / "out")
    if taken:
        row = row_of(index, "images/train/2.jpg")
        assert index.decode(row).size == (WIDTH, HEIGHT) and len(index.boxes(row)) == len(objects(2))
    else:
        assert "images/train/2.jpg,has an EXIF rotation" in (index.folder / "rejected.csv").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 99}, "annotation 1: image_id is 99, which is not in the file"),
        ({"category_id": 99}, "annotation 1: category_id is 99, which is not in the file"),
        ({"category_id": [1]}, r"annotation 1: category_id is \[1\]"),
        ({"bbox": [1, 2, 3]}, r"annotation 1: bbox is \[1, 2, 3\], expected 4 numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotation 1: bbox is .*nan.*expected 4 numbers"),
        ({"bbox": [1, 2, 3, 1e300]}, "annotation 1: bbox is .*expected 4 numbers"),
        ({"bbox": None}, "annotation 1: bbox is missing"),
        ({"area": "large"}, r"annotation 1: area is \['large'\]"),
        ({"iscrowd": 2}, "annotation 1: iscrowd is 2, expected 0 or 1"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon has 3 numbers, expected pairs"),
        ({"segmentation": [[1, 2, "x", 4]]}, "a polygon is .*expected numbers"),
        ({"segmentation": "x"}, "segmentation is 'x', expected polygons or run lengths"),
        ({"segmentation": {"size": [30]}}, r"size is \[30\], expected \[height, width\]"),
        ({"segmentation": {"size": [30, 40], "counts": [5, 5]}}, "do not add up to 40 x 30 pixels"),
        ({"segmentation": {"size": [30, 40], "counts": [-5, 1205]}}, "not whole numbers"),
        ({"segmentation": {"size": [30, 40], "counts": "!"}}, "not in COCO's form"),
        ({"segmentation": {"size": [30, 40]}}, "counts is None, expected"),
    ],
)
def test_wrong_annotation_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as refused:
        CocoSource(one_file(tmp_path, **changes)).listing()
    assert str(refused.value).startswith(f"{FILE}: annotation 1: ")


def test_run_lengths_of_another_size_than_the_image_are_named(tmp_path):
    runs = to_runs(np.zeros((5, 6), bool))
    root = one_file(tmp_path / "in", segmentation={"size": [5, 6], "counts": runs.counts})
    with pytest.raises(
        InputError, match=rf"{FILE} \(image 1.png\): run lengths of 6 x 5 pixels on .* 40 x 30"
    ):
        write(CocoSource(root), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["images"].append(file["images"][0]), "two of its images have the id 1"),
        (
            lambda file: file["images"].append({**file["images"][0], "id": 99}),
            "lists images/1.png, .* already",
        ),
        (
            lambda file: file["categories"].append({"id": 9, "name": "RBC"}),
            "categories 1 and 9 are both 'RBC'",
        ),
        (lambda file: file["images"][0].pop("file_name"), "image 1: file_name is None, expected a text"),
        (
            lambda file: file["images"][0].update(file_name="../x.png"),
            r"file_name is '../x.png', expected a path",
        ),
        (lambda file: file["images"][0].update(file_name="/etc/passwd"), "file_name is '/etc/passwd'"),
        (lambda file: file["images"][0].update(width="wide"), "image 1: width or height is 'wide'"),
        (lambda file: file["images"][0].pop("id"), "images have the id None"),
        (lambda file: file.pop("annotations"), "no COCO file: it has no list of annotations"),
        (lambda file: file.update(categories={}), "no COCO file: it has no list of categories"),
        (lambda file: file["annotations"].clear(), "no annotation holds any object"),
    ],
)
def test_wrong_file_is_named(tmp_path, change, message):
    file = json.loads((one_file(tmp_path) / FILE).read_text())
    change(file)
    (tmp_path / FILE).write_text(json.dumps(file))
    with pytest.raises(InputError, match=message):
        CocoSource(tmp_path).listing()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no XML", "1.xml is no XML: "),
        ("<annotation><object></object></annotation>", "1.xml: an object has no name"),
        (
            "<annotation><object><name>a</name></object></annotation>",
            "1.xml: a: xmin is '', expected a number",
        ),
        (xml(1).replace("<xmin>", "<xmin>x"), "xmin is 'x.*', expected a number"),
        (xml(1).replace("<xmin>", "<xmin>1e300"), "xmin is '1e300.*', expected a number"),
    ],
)
def test_wrong_xml_is_named(tmp_path, text, message):
    root = like_bccd(tmp_path, 2)
    (root / "annotations_voc" / "train" / "1.xml").write_text(text)
    with pytest.raises(InputError, match=message):
        VocSource(root, "images", "annotations_voc").listing()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["RBC", "WBC", "Platelet"], "class 'Platelets' of instances_.*did you mean 'Platelet'"),
        (["RBC", "WBC", "Platelets", "x"], "class 'x' has no object"),
    ],
)
def test_classes_that_do_not_fit_are_named(tmp_path, classes, message):
    with pytest.raises(InputError, match=message):
        CocoSource(like_bccd(tmp_path), "images/{split}", "instances_{split}.json", classes).listing()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotations": "other.json"}, "annotations: there is no .*other.json"),
        ({"annotations": "../x.json"}, "annotations is '../x.json', expected a path below"),
        ({"annotations": "x_{split}.json"}, "annotations: there is no .*for {split}, one of 'train'"),
        ({"images": "{split}"}, "images is '{split}', but annotations 'annotations.json' has no {split}"),
        ({"images": "pictures"}, "images: there is no .*pictures"),
    ],
)
def test_wrong_paths_are_named(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        CocoSource(one_file(tmp_path), **options).listing()


def test_coordinates_that_count_from_0_are_said(tmp_path):
    root = like_bccd(tmp_path)
    path = root / "annotations_voc" / "train" / "1.xml"
    path.write_text(re.sub(r"<xmin>\d+", "<xmin>0", xml(1), count=1))
    notes = VocSource(root, "images", "annotations_voc").listing().notes
    assert any("1 boxes begin at 0, though VOC counts from 1" in note for note in notes)


@pytest.mark.parametrize("source", ["coco", "voc"])
def test_boxes_from_the_command_line(tmp_path, capsys, source):
    root = like_bccd(tmp_path / "in")
    options = {
        "coco": ["--images", "images/{split}", "--annotations", "instances_{split}.json"],
        "voc": ["--images", "images", "--annotations", "annotations_voc"],
    }
    assert main(["write", source, str(root), str(tmp_path / "out"), *options[source]]) == 0
    assert "30 samples, detection, 3 classes" in capsys.readouterr().out
