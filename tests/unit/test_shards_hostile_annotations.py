"""Masks, XML and JSON made to do harm: refused in one line, in bounded time and memory."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_shards_boxes import FILE, like_bccd, one_file, xml
from test_shards_hostile import bounds, changed, corpus, everything  # noqa: F401  (bounds: for every test)
from test_shards_masks import flat

from shards import CocoSource, Index, InputError, MaskSource, ShardOptions, VocSource, stream, verify, write
from shards.boxes import MOST_OBJECTS
from shards.segments import MOST_POINTS, Polygons, Runs, drawn

LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
DOCUMENT_TYPES = {
    "billion laughs": f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>',
    "quadratic": f'<!DOCTYPE a [<!ENTITY x "{"x" * 100_000}">]><annotation>{"&x;" * 50_000}</annotation>',
    "external entity": '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
    "parameter entity": '<!DOCTYPE a [<!ENTITY % x SYSTEM "http://localhost:1/x"> %x;]><annotation/>',
    "external type": '<!DOCTYPE a SYSTEM "file:///dev/zero"><annotation/>',
}


def refused(source: Any) -> str:
    with pytest.raises(InputError) as caught:
        source.listing()
    assert str(caught.value).isprintable()
    return str(caught.value)


def voc(root: Path) -> VocSource:
    return VocSource(root, "images", "annotations_voc")


def first_xml(root: Path) -> Path:
    return like_bccd(root, 2) / "annotations_voc" / "train" / "1.xml"


@pytest.mark.parametrize("kind", DOCUMENT_TYPES)
def test_xml_with_a_document_type_is_refused(tmp_path, kind):
    path = first_xml(tmp_path)
    path.write_text(DOCUMENT_TYPES[kind])
    assert "annotations_voc/train/1.xml has a document type" in refused(voc(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<a>" * 1_000_000, "nested deeper than 100 elements"),
        (b"<annotation>&unknown;</annotation>", "is no XML: undefined entity"),
        (b"\x00" * 1000, "is no XML"),
        (b'<?xml version="1.0" encoding="no-such"?><a/>', "is no XML: unknown encoding"),
        (b"<annotation>" + b"<object><name>a</name></object>" * 9, "xmin is ''"),
        (xml(1, "<part><bndbox/></part>").encode()[:-20], "is no XML"),
    ],
)
def test_xml_that_is_none_is_refused(tmp_path, content, message):
    first_xml(tmp_path).write_bytes(content + (b"</annotation>" if message.startswith("xmin") else b""))
    assert message in refused(voc(tmp_path))


def test_xml_with_too_many_objects_is_refused(tmp_path):
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>"
    first_xml(tmp_path).write_text(xml(1, f"<object><name>a</name>{box}</object>" * (MOST_OBJECTS + 1)))
    assert f"more than {MOST_OBJECTS}" in refused(voc(tmp_path))


@pytest.mark.parametrize("kind", ["xml", "json"])
@pytest.mark.parametrize("special", ["pipe", "holes", "device", "nowhere"])
def test_special_file_in_the_place_of_an_annotation_is_refused(tmp_path, kind, special):
    path = first_xml(tmp_path) if kind == "xml" else one_file(tmp_path) / FILE
    path.unlink()
    if special == "pipe":
        os.mkfifo(path)
    elif special == "holes":
        with open(path, "wb") as file:
            file.truncate(corpus.TIB)
    else:
        path.symlink_to("/dev/zero" if special == "device" else "nothing")
    said = refused(voc(tmp_path) if kind == "xml" else CocoSource(tmp_path))
    assert path.name in said
    assert special != "holes" or "larger than" in said


@pytest.mark.parametrize(
    "text", ["[" * 1_000_000, '{"images": [' * 100_000, "[]", "1" * 10_000, "\ud800", ""]
)
def test_json_that_is_no_coco_file_is_refused(tmp_path, text):
    one_file(tmp_path)
    (tmp_path / FILE).write_text(text, errors="surrogatepass")
    assert FILE in refused(CocoSource(tmp_path))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([[1.5, 2] * (MOST_POINTS + 1)], f"more than {MOST_POINTS}"),
        ([[0, 0, 1, 0, 1, 1] * 100] * (MOST_POINTS // 300 + 1), f"more than {MOST_POINTS}"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "expected numbers|run lengths of 1000000000 x"),
        ({"size": [30000, 30000], "counts": [900_000_000]}, "run lengths of 30000 x 30000"),
        ({"size": [30, 40], "counts": "o" * 3_000_000}, "more run lengths than 40 x 30"),
        (
            {"size": [30, 40], "counts": [0] * 2_000_000 + [1200]},
            "more run lengths than 40 x 30 pixels can have",
        ),
        ({"size": [10**400, 1], "counts": "0"}, "run lengths of"),
        ([[10**400, 0, 1, 0, 1, 1]], "expected numbers"),
    ],
)
def test_outline_without_end_is_refused(tmp_path, segment, message):
    said = refused(CocoSource(one_file(tmp_path, segmentation=segment)))
    assert re.search(message, said) and FILE in said


def test_many_long_outlines_of_one_image_are_refused_together(tmp_path):
    file = json.loads((one_file(tmp_path) / FILE).read_text())
    first = file["annotations"][0]
    polygon = [[0, 0, *[1, 1] * (MOST_POINTS // 20)]]
    file["annotations"] += [{**first, "id": 1000 + n, "segmentation": polygon} for n in range(21)]
    (tmp_path / FILE).write_text(json.dumps(file))
    assert f"more than {MOST_POINTS}" in refused(CocoSource(tmp_path))


def test_polygon_of_many_points_is_drawn_in_bounded_memory():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 500, (100_000, 2))
    assert drawn(Polygons((points,)), (500, 500), 500, 500).shape == (500, 500)


@pytest.mark.parametrize(
    "name", ["bomb.png", "bomb.tif", "bomb.bmp", "claims.png", "text_bomb.png", "cut.png"]
)
def test_mask_that_is_a_bomb_rejects_its_image(tmp_path, name):
    root = flat(tmp_path / "in", [0, 1])
    (root / "masks" / "3.png").unlink()
    (root / "masks" / f"3{Path(name).suffix}").write_bytes(corpus.images()[name])
    index = write(MaskSource(root), tmp_path / "out")
    (line,) = (index.folder / "rejected.csv").read_text().splitlines()[1:]
    assert line.startswith("images/3.jpg,") and "mask masks/3" in line


@pytest.mark.parametrize("special", ["pipe.png", "endless.png", "holes.png"])
def test_special_file_in_the_place_of_a_mask_rejects_its_image(tmp_path, special):
    root = flat(tmp_path / "in", [0, 1])
    (root / "special").mkdir()
    corpus.special_files(root / "special")
    os.replace(root / "special" / special, root / "masks" / "3.png")
    index = write(MaskSource(root), tmp_path / "out")
    assert list(index.report["rejected"].values()) == [1]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """A dataset with masks, and one with boxes and outlines; a tar holds one sample."""
    root = tmp_path_factory.mktemp("sets")
    options = ShardOptions(shard_samples=1)
    write(MaskSource(flat(root / "m", [0, 1, 2], 12)), root / "masks", options)
    polygon = [[1, 1, 9, 1, 9, 9]]
    write(CocoSource(one_file(root / "b", segmentation=polygon)), root / "boxes", options)
    return {"masks": root / "masks", "boxes": root / "boxes"}


@pytest.fixture
def copy_of(sets, tmp_path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(sets[name], tmp_path / "a" / "b" / "dataset"))


def row_changed(dataset: Path, row: int, **values: Any) -> None:
    """A row of samples.csv with other values."""
    with open(dataset / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[row].update(values)
    with open(dataset / "samples.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def with_annotation(dataset: Path, content: bytes) -> int:
    """The first labelled sample's annotation replaced by one from the hand that made the index; its row."""
    index = Index.open(dataset)
    row = int(index.rows("train", labelled=True)[0])
    shard = next(one for one in index.meta["shards"] if one["name"] == index.samples["shard"][row])
    members = corpus.members_of((dataset / shard["name"]).read_bytes())
    members[1][0].size = len(content)
    members[1] = (members[1][0], content)
    tar = corpus.packed(members)
    (dataset / shard["name"]).write_bytes(tar)
    row_changed(dataset, row, annotation_length=len(content))
    meta = json.loads((dataset / "index.json").read_text())
    for one in meta["shards"]:
        if one["name"] == shard["name"]:
            one.update(bytes=len(tar), sha256=hashlib.sha256(tar).hexdigest())
    table = (dataset / "samples.csv").read_bytes()
    meta["files"]["samples.csv"] = hashlib.sha256(table).hexdigest()
    (dataset / "index.json").write_text(json.dumps(meta))
    return row


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(np.zeros((16, 23), np.uint8)), "L, 23 x 16 pixels, expected 8-bit grey of 24 x 16"),
        (png(np.zeros((16, 24, 3), np.uint8)), "RGB, 24 x 16 pixels, expected 8-bit grey"),
        (png(np.zeros((16, 24), np.uint16)), "I;16, 24 x 16 pixels"),
        (png(np.full((16, 24), 3, np.uint8)), "class number 3, but there are 3 classes"),
        (corpus.images()["bomb.png"], "decompression bomb"),
        (corpus.images()["text_bomb.png"], "."),
        (corpus.images()["cut.jpg"], "not an image in a known format"),
        (b"", None),
    ],
)
def test_stored_mask_that_does_not_fit_is_refused(copy_of, content, message):
    dataset = copy_of("masks")
    row = with_annotation(dataset, content)
    with pytest.raises(InputError, match=message or "annotation_length is '0'") as caught:
        Index.open(dataset).mask(row)
    assert str(caught.value).isprintable()


SOUND: dict[str, Any] = {"boxes": [[1, 2, 3, 4]], "labels": [0], "crowd": [False], "area": [4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 1_000_000, "is not valid JSON"),
        (b"[]", "boxes.json in .* cannot be read"),
        (b"\xff", "is not valid JSON"),
        (json.dumps(SOUND | {"boxes": [[1, 2, 41, 4]]}).encode(), "a box is not within the image of 40 x 30"),
        (json.dumps(SOUND | {"boxes": [[3, 2, 3, 4]]}).encode(), "a box is not within"),
        (json.dumps(SOUND | {"boxes": [[1, 2, float("nan"), 4]]}).encode(), "boxes.0.2"),
        (json.dumps(SOUND | {"boxes": [[1, 2, 1e300, 4]]}).encode(), "boxes.0.2"),
        (json.dumps(SOUND | {"boxes": [[1, 2, 3, 4]] * 2}).encode(), "not of one length"),
        (json.dumps(SOUND | {"labels": [99]}).encode(), "class number 99, but there are"),
        (json.dumps(SOUND | {"labels": [-1]}).encode(), "labels.0"),
        (json.dumps(SOUND | {"labels": [2**70]}).encode(), "labels.0"),
        (json.dumps(SOUND | {"crowd": ["yes"]}).encode(), "crowd.0"),
        (json.dumps(SOUND | {"area": [-1]}).encode(), "area.0"),
        (json.dumps(SOUND | {"segments": []}).encode(), "not of one length"),
        (json.dumps(SOUND | {"segments": [[[1, 2]]]}).encode(), "segments.0: a polygon is not three"),
        (
            json.dumps(SOUND | {"segments": [[[1, 2] * (MOST_POINTS + 1)]]}).encode(),
            f"more than {MOST_POINTS}",
        ),
        (json.dumps({name: [SOUND[name][0]] * 10_001 for name in SOUND}).encode(), "boxes: .*10000"),
        (json.dumps(SOUND).encode() + b" " * (17 << 20), "annotation_length is .*expected 1 to"),
        (b'{"boxes": [' + b"[]," * 2_000_000 + b"[]]}", "boxes"),
    ],
)
def test_stored_boxes_that_do_not_fit_are_refused(copy_of, content, message):
    dataset = copy_of("boxes")
    row = with_annotation(dataset, content)
    with pytest.raises(InputError, match=message) as caught:
        Index.open(dataset).boxes(row)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("runs", [Runs(30, 40, "!"), Runs(10**6, 10**6, "0"), Runs(3, 4, "444")])
def test_stored_run_lengths_that_do_not_fit_are_refused(copy_of, runs):
    dataset = copy_of("boxes")
    segment = {"size": [runs.height, runs.width], "counts": runs.counts}
    row = with_annotation(dataset, json.dumps(SOUND | {"segments": [segment]}).encode())
    boxes = Index.open(dataset).boxes(row)
    with pytest.raises(InputError, match="run lengths"):
        boxes.masks(30, 40)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("annotation_offset", "-512", "annotation_offset is '-512'"),
        ("annotation_offset", "0", "annotation_offset is '0'"),
        ("annotation_offset", str(2**62), "annotation_offset is"),
        ("annotation_length", str(2**62), "annotation_length is"),
        ("annotation_length", "0", "annotation_length is '0'"),
        ("annotation_length", "x", "cannot be read"),
        ("labelled", "0", "expected 0 for a sample without annotation"),
    ],
)
@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_table_that_points_out_of_its_shards_is_refused(copy_of, kind, column, value, message):
    dataset = copy_of(kind)
    row_changed(dataset, 0, **{column: value})
    with pytest.raises(InputError, match=message) as refused:
        Index.open(dataset)
    assert "samples.csv" in str(refused.value)


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_table_without_its_two_columns_is_refused(copy_of, kind):
    dataset = copy_of(kind)
    changed(dataset / "samples.csv", "annotation_length", "something")
    with pytest.raises(InputError, match="no column 'annotation_length'"):
        Index.open(dataset)


def test_more_classes_than_a_mask_can_hold_are_refused(copy_of):
    dataset = copy_of("masks")
    meta = json.loads((dataset / "index.json").read_text())
    meta["classes"] = [str(number) for number in range(256)]
    (dataset / "index.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match=r"index\.json: index: 256 classes, but a mask can hold only 255"):
        Index.open(dataset)


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_annotation_of_another_sample_is_found_by_verify(copy_of, kind):
    dataset = copy_of(kind)
    index = Index.open(dataset)
    shard = index.samples["shard"][0]
    members = corpus.members_of((dataset / shard).read_bytes())
    members[1][0].name = members[1][0].name.replace("-", "_", 1)
    content = corpus.packed(members)
    (dataset / shard).write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    changed(dataset / "index.json", index.meta["shards"][0]["sha256"], sha256)
    problems = verify(dataset)
    assert any(
        f"{index.samples['key'][0]}." in problem and "does not hold" in problem for problem in problems
    )
    assert any("files that samples.csv does not know" in problem for problem in problems)


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_stream_still_gives_the_images(sets, tmp_path, kind):
    index = Index.open(sets[kind])
    before = everything(tmp_path)
    found = dict(stream(sets[kind], "train", rank=0, world_size=1, epoch=0, seed=0))
    assert sorted(found) == index.rows("train").tolist()
    assert all(data == index.read(row) for row, data in found.items()) and everything(tmp_path) == before


def test_more_than_a_reader_takes_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.boxes.MOST_BYTES", 500)
    root = one_file(tmp_path / "in", segmentation=[[0, 0, *range(200)]])
    with pytest.raises(InputError, match=r"\(image 1.png\): its outlines take more than 500 bytes"):
        write(CocoSource(root), tmp_path / "out")
