"""Sources list what is there, and say in one line what is wrong with it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import CsvSource, DigitsSource, FolderSource, InputError


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), len(str(path)) % 256).save(path)


def folders(root: Path, *names: str) -> Path:
    for name in names:
        put(root / name)
    return root


def table(root: Path, text: str, name: str = "labels.csv") -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_text(text)
    return root


def test_class_folders_without_splits(tmp_path):
    root = folders(tmp_path, "b/1.png", "a/deep/er/2.png", "a/3.PNG")
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / ".hidden.png").write_text("no image")
    listing = FolderSource(root).listing()
    assert listing.classes == ["a", "b"] and listing.task == "multiclass"
    assert [(one.path, one.labels, one.split) for one in listing.samples] == [
        ("a/3.PNG", ("a",), ""),
        ("a/deep/er/2.png", ("a",), ""),
        ("b/1.png", ("b",), ""),
    ]
    assert listing.ignored[".txt"] == 1


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "valid", "testing"), ("TRAIN", "validation", "test")]
)
def test_split_folders_by_their_usual_names(tmp_path, names):
    root = folders(tmp_path, *(f"{name}/{label}/1.png" for name in names for label in "ab"), "extra/x/1.png")
    listing = FolderSource(root).listing()
    assert {one.path.split("/")[0]: one.split for one in listing.samples} == dict(
        zip(names, ("train", "val", "test"))
    )
    assert any("extra" in note for note in listing.notes)


def test_loose_image_beside_split_folders_is_counted(tmp_path):
    root = folders(
        tmp_path, *(f"{name}/{label}/1.png" for name in ("train", "test") for label in "ab"), "1.png"
    )
    (note,) = FolderSource(root).listing().notes
    assert note == f"1 images lie in no class folder and were not read, e.g. {root / '1.png'}"


def test_class_order_can_be_given(tmp_path):
    assert FolderSource(folders(tmp_path, "a/1.png", "b/1.png"), ["b", "a"]).listing().classes == ["b", "a"]


def test_linked_class_folder_is_followed_and_a_loop_ends(tmp_path):
    folders(tmp_path / "elsewhere", "1.png")
    root = folders(tmp_path / "root", "a/1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root / "a")
    assert [one.path for one in FolderSource(root).listing().samples] == ["a/1.png", "b/1.png"]


def test_folders_nested_deeper_than_the_stack_are_walked(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    monkeypatch.chdir(tmp_path / "cat")
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    put(Path("1.png"))
    monkeypatch.chdir(tmp_path)
    (sample,) = FolderSource(tmp_path).listing().samples
    assert sample.path.count("/d") == 1200
    monkeypatch.chdir(tmp_path / "cat")
    for _ in range(1200):  # pytest's own clean-up recurses
        os.chdir("d")
    os.unlink("1.png")
    for _ in range(1200):
        os.chdir("..")
        os.rmdir("d")


def test_name_that_is_not_utf8_is_listed(tmp_path):
    root = folders(tmp_path, "a/1.png")
    (root / "a" / "1.png").rename(root / "a" / b"\xff2.png".decode(errors="surrogateescape"))
    (sample,) = FolderSource(root).listing().samples
    assert sample.path.encode("utf-8") and sample.read()


@pytest.mark.parametrize(
    ("names", "classes", "message"),
    [
        ((), None, "no class folders"),
        (("1.png",), None, "no class folders"),
        (("a/1.png", "c/1.png"), ["a", "b"], "label 'c' of c/1.png is not .*expected 'a', 'b'"),
        (("train/a/1.png", "training/a/1.png"), None, "both the train split"),
        (("a|b/1.png",), None, "class name 'a\\|b'"),
    ],
)
def test_wrong_folders_are_named(tmp_path, names, classes, message):
    with pytest.raises(InputError, match=message):
        FolderSource(folders(tmp_path, *names), classes).listing()


def test_empty_class_folder_is_named(tmp_path):
    root = folders(tmp_path, "a/1.png")
    (root / "hollow").mkdir()
    with pytest.raises(InputError, match="hollow holds no image"):
        FolderSource(root).listing()


def test_missing_root_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        FolderSource(tmp_path / "nowhere").listing()


def test_single_label_csv_with_split_and_group(tmp_path):
    text = "file,kind,who,part\nx/1.png,a,p1,Training\nx\\2.png,b,p2,valid\n./x/3.png,,p3,TEST\n"
    source = CsvSource(
        table(tmp_path, text, "my.csv"), "my.csv", "file", ["kind"], split_column="part", group_column="who"
    )
    listing = source.listing()
    assert listing.classes == ["a", "b"]
    assert [(one.path, one.labels, one.labelled, one.split, one.group) for one in listing.samples] == [
        ("x/1.png", ("a",), True, "train", "p1"),
        ("x/2.png", ("b",), True, "val", "p2"),
        ("x/3.png", (), False, "test", "p3"),
    ]


def test_multi_label_by_separator(tmp_path):
    listing = CsvSource(
        table(tmp_path, "path,label\n1.png,b|a\n2.png,b\n3.png,\n"), label_separator="|"
    ).listing()
    assert listing.task == "multilabel" and listing.classes == ["a", "b"]
    assert [(one.labels, one.labelled) for one in listing.samples] == [
        (("a", "b"), True),
        (("b",), True),
        ((), False),
    ]


def test_multi_label_by_columns_knows_nothing_found_from_unlabelled(tmp_path):
    text = "path,z,y\n1.png,1,0\n2.png,0.0,1.0\n3.png,0,0\n4.png,,\n"
    listing = CsvSource(table(tmp_path, text), label_columns=["z", "y"]).listing()
    assert listing.classes == ["z", "y"]
    assert [(one.labels, one.labelled) for one in listing.samples] == [
        (("z",), True),
        (("y",), True),
        ((), True),
        ((), False),
    ]


def test_missing_suffix_is_found_on_disk(tmp_path):
    folders(tmp_path, "images/one.png")
    (sample,) = CsvSource(table(tmp_path, "path,label\nimages/one,a\n")).listing().samples
    assert sample.read().startswith(b"\x89PNG")


HEAD = "path,label,split\n"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (HEAD, {}, "has no rows"),
        (HEAD + "1.png,a,train\n1.png,b,train\n", {}, "lists '1.png' twice, in lines 2 and 3"),
        (HEAD + "1.png,a,train\n./1.png,b,train\n", {}, "lists '1.png' twice"),
        (HEAD + ",a,train\n", {}, "line 2: column 'path' is empty"),
        (HEAD + "1.png,,train\n", {}, "has no label"),
        (
            HEAD + "1.png,a,holdout\n",
            {"split_column": "split"},
            "line 2: column 'split' is 'holdout' .*'val'",
        ),
        (
            HEAD + "1.png,a,train\n",
            {"label_columns": ["lable"]},
            "no column 'lable', did you mean 'label'.*'path'",
        ),
        (HEAD + "1.png,a,train\n", {"group_column": "patient"}, "no column 'patient'"),
        (
            HEAD + "1.png,a,train\n",
            {"label_columns": ["label", "split"]},
            "column 'label' is 'a' .expected 0 or 1",
        ),
        (HEAD + "1.png,cat,x\n", {"classes": ["cats", "dog"]}, "label 'cat' of 1.png .*did you mean 'cats'"),
        (HEAD + "1.png,a,x\n", {"classes": ["a", "b"]}, "class 'b' has no sample"),
        (HEAD + "1.png,a,x\n", {"classes": ["a", "a"]}, "class 'a' is named twice"),
        (HEAD + "1.png,a,x\n", {"csv": "other.csv"}, "other.csv does not exist"),
        ("path,path,label\n1,2,a\n", {}, "two columns 'path'"),
    ],
)
def test_wrong_csv_is_named(tmp_path, text, options, message):
    with pytest.raises(InputError, match=message) as caught:
        CsvSource(table(tmp_path, text), **options).listing()
    assert "\n" not in str(caught.value)


def test_csv_with_a_nul_or_a_name_without_end_is_named(tmp_path):
    table(tmp_path, "path,label\na\0.jpg,cat\n")
    with pytest.raises(InputError, match=r"labels\.csv.*NUL"):
        CsvSource(tmp_path).listing()
    for source in (CsvSource(tmp_path, csv="x" * 300), FolderSource("x" * 300), FolderSource("a\0b")):
        with pytest.raises(InputError, match="does not exist"):
            source.listing()


def test_csv_that_is_not_text_is_named(tmp_path):
    (tmp_path / "labels.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(InputError, match=r"labels.csv is not UTF-8"):
        CsvSource(tmp_path).listing()


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    listing = DigitsSource().listing()
    assert len(listing.samples) == 1797 and listing.classes == list("0123456789")
    sample = listing.samples[0]
    number = int(sample.path.split("/")[1].split(".")[0])
    pixels = np.asarray(Image.open(io.BytesIO(sample.read()))).astype(int)
    assert np.abs(pixels / 255 * 16 - load_digits().images[number]).max() < 0.05
    assert sample.labels == (str(load_digits().target[number]),) and not sample.group
