"""Tables are read strictly: what cannot be meant is refused with its line, nothing is guessed."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards import CsvSource, FolderSource, Index, InputError, ShardOptions, write
from shards.names import canonical, nearly_equal
from shards.table import read_table


def images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path, format="PNG")
    return root


def table(root: Path, content: str | bytes, name: str = "labels.csv") -> Path:
    root.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    (root / name).write_bytes(data)
    return root / name


def cells(path: Path, *needed: str) -> list[tuple[int, list[str]]]:
    return [(row.line, list(row.cells.values())) for row in read_table(path, needed).rows]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "path,label,who\na.png,x\nb.png,y,p\n",
            "line 2 has too few cells: 2 where the header has 3",
        ),
        ("path,label,who\na.png,x,p\nb.png,carcinoma, basal cell,p\n", "line 3 has too many cells: 4 where"),
        ("path,label\n\n\na.png,x\nb.png\n", "line 5 has too few cells"),
        ('path,label,note\na.png,x,"one\ntwo"\nb.png\n', "line 4 has too few cells"),
        (
            'path,label,note\na.png,x,\nb.png,y,"see\nc.png,x,\n',
            "line 3 .*: a quote is not closed",
        ),
        (
            'path,label,note\na.png,x,"see\nb.png,y,\nc.png,x,"\n',
            "line 2: a quoted cell goes on to line 4",
        ),
        ('path,label\na.png,"x"y\n', "line 2 cannot be read"),
        ('path,label\n"a.png,x\nb.png,y\n', "line 2 cannot be read: a quote is not closed"),
        ("path,label\na.png,x\0\n", "line 2 holds a NUL"),
        ("path,label\na.png,x\nb.png,é\n".encode("latin-1"), "line 3 holds the byte 0xe9"),
        ("path,label,label\na.png,x,y\n", "two columns 'label'"),
        ("path,lable\na.png,x\n", "no column 'label', did you mean 'lable'"),
        ("path,label\n,\n , \n", "has no rows"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(
    content: str | bytes, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        read_table(table(tmp_path, content), ["path", "label"])


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("path,label\na.png,x\n", "t.csv"),
        ("\ufeffpath,label\r\na.png,x\r\n", "t.csv"),
        ("path;label\na.png;x\n", "t.csv"),
        ("path\tlabel\na.png\tx\n", "t.csv"),
        ("path\tlabel\na.png\tx\n", "T.TSV"),
        ("path\tlabel\na.png\tx\n".encode("utf-16"), "t.csv"),
        (" path , label \n a.png , x \n", "t.csv"),
        ("path,label,,\na.png,x,,\n,,,\n", "t.csv"),
        ('"path","label"\n"a.png","x"\n', "t.csv"),
        ("path,label\ra.png,x\r", "t.csv"),
    ],
)
def test_what_spreadsheets_write_is_read(content: str | bytes, name: str, tmp_path: Path) -> None:
    assert cells(table(tmp_path, content, name), "path", "label")[0][1][:2] == ["a.png", "x"]


def test_lines_count_in_the_file_whatever_comes_between(tmp_path: Path) -> None:
    content = 'path,note\na.png,"two\nlines"\n\n,\nb.png,"x, y"\n'
    assert [line for line, _ in cells(table(tmp_path, content), "path")] == [2, 6]


@pytest.mark.parametrize("word", ["nan", "NaN", "NA", "N/A", "n/a", "null", "None", "<NA>", "#N/A", "-", "?"])
def test_words_for_missing_are_no_class_and_are_counted(word: str, tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", word), ("c", "y"), ("d", word)]
    content = "path,label\n" + "".join(f"{name}.png,{label}\n" for name, label in rows)
    table(images(tmp_path, *(f"{name}.png" for name, _ in rows)), content)
    listing = CsvSource(tmp_path).listing()
    assert listing.classes == ["x", "y"] and [one.labelled for one in listing.samples] == [1, 0, 1, 0]
    (note,) = listing.notes
    assert f"column 'label' says '{word}' 2 times" in note and "unlabelled" in note
    named = CsvSource(tmp_path, classes=["x", "y", word]).listing()
    assert named.classes == ["x", "y", word] and not named.notes


def test_an_empty_label_is_unlabelled_without_a_word(tmp_path: Path) -> None:
    table(images(tmp_path, "a.png", "b.png"), "path,label\na.png,x\nb.png,\n")
    assert CsvSource(tmp_path).listing().notes == []


@pytest.mark.parametrize("word", ["nan", "NA", "unknown", "-"])
def test_a_missing_patient_is_a_unit_of_its_own(word: str, tmp_path: Path) -> None:
    table(
        images(tmp_path, "a.png", "b.png", "c.png"),
        f"path,label,who\na.png,x,{word}\nb.png,y,{word}\nc.png,x,p\n",
    )
    listing = CsvSource(tmp_path, group_column="who").listing()
    assert [one.group for one in listing.samples] == ["", "", "p"]
    assert "unit of its own" in listing.notes[0] and "2 times" in listing.notes[0]


def test_a_missing_split_or_path_is_refused_with_its_line(tmp_path: Path) -> None:
    table(images(tmp_path, "a.png"), "path,label,part\na.png,x,nan\n")
    with pytest.raises(InputError, match="line 2: column 'part' is 'nan'"):
        CsvSource(tmp_path, split_column="part").listing()
    table(tmp_path, "path,label\na.png,x\nNA,x\n")
    with pytest.raises(InputError, match="line 3: column 'path' is 'NA', expected the path of an image"):
        CsvSource(tmp_path).listing()


def test_indicators_that_are_missing_in_part_are_refused(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    table(tmp_path, "path,x,y\na.png,1,1\nb.png,nan,NaN\n")
    assert [s.labelled for s in CsvSource(tmp_path, label_columns=["x", "y"]).listing().samples] == [1, 0]
    table(tmp_path, "path,x,y\na.png,1,0\nb.png,1,nan\n")
    with pytest.raises(InputError, match="line 3: column 'y' is 'nan'"):
        CsvSource(tmp_path, label_columns=["x", "y"]).listing()


def test_paths_are_found_in_any_spelling_and_never_outside(tmp_path: Path) -> None:
    root = images(tmp_path / "root", "A/one.PNG", unicodedata.normalize("NFD", "é/Bär.png"), "two.Jpeg")
    images(tmp_path, "outside.png")
    content = f"path,label\nA/one,x\né/Bär.png,y\n{root}/two,x\n"
    table(root, content)
    found = {one.path: one.location for one in CsvSource(root).listing().samples}
    assert set(found) == {"A/one", "é/Bär.png", "two"}
    assert all(location is not None and location.is_file() for location in found.values())
    for outside in ("../outside.png", f"{tmp_path}/outside.png", "A/../../outside.png", "..\\outside.png"):
        table(root, f"path,label\n{outside},x\n")
        with pytest.raises(InputError, match=r"line 2: column 'path' is .* below the root"):
            CsvSource(root).listing()


def test_two_files_that_fit_one_name_are_refused(tmp_path: Path) -> None:
    table(images(tmp_path, "a.png", "a.JPG"), "path,label\na,x\n")
    with pytest.raises(InputError, match=r"several files fit: a\.JPG, a\.png"):
        CsvSource(tmp_path).listing()
    table(tmp_path, "path,label\na.png,x\na.JPG,x\n")
    assert len(CsvSource(tmp_path).listing().samples) == 2


def test_one_file_by_two_names_is_listed_twice(tmp_path: Path) -> None:
    table(images(tmp_path, "a.png", "b.png"), "path,label\na,x\nb.png,y\na.png,x\n")
    with pytest.raises(InputError, match=r"lists 'a\.png' twice, in lines 2 and 4"):
        CsvSource(tmp_path).listing()


def test_an_absolute_path_below_the_root_appears_nowhere(tmp_path: Path) -> None:
    names = [f"{number:02}.png" for number in range(12)]
    root = images(tmp_path / "root", *names)
    table(root, "path,label\n" + "".join(f"{root}/{n},{'xy'[i % 2]}\n" for i, n in enumerate(names)))
    index = write(CsvSource(root), tmp_path / "out")
    assert sorted(index.samples["path"]) == names
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Benign", "benign", True),
        ("1", "1.0", True),
        ("p07", "P7", True),
        ("a  b", "a\u00a0b", True),
        ("a_b", "a-b", True),
        ("Bär", unicodedata.normalize("NFD", "Bär"), True),
        ("x\u200b", "x", True),
        ("-1", "1", False),
        ("1.5", "15", False),
        ("10", "1", False),
        ("1.10", "1.1", False),
        ("p1", "p11", False),
        ("grade 1", "grade 2", False),
    ],
)
def test_spellings(one: str, other: str, same: bool) -> None:
    assert (canonical(one) == canonical(other)) == same
    assert nearly_equal([one, other]) == ([sorted([one, other])] if same else [])


def written(tmp_path: Path, rows: list[tuple[str, str, str]], **columns: str) -> Index:
    root = images(tmp_path / "root", *(f"{number:02}.png" for number in range(len(rows))))
    lines = [f"{number:02}.png,{label},{who},{part}\n" for number, (label, who, part) in enumerate(rows)]
    table(root, "path,label,who,part\n" + "".join(lines))
    return write(CsvSource(root, **columns), tmp_path / "out", ShardOptions(processes=1))  # type: ignore[arg-type]


def test_classes_that_differ_in_spelling_only_are_told_of(tmp_path: Path) -> None:
    rows = [(("Benign", "benign", "1", "1.0")[number % 4], "", "") for number in range(24)]
    warnings = written(tmp_path, rows).warnings
    assert "classes 'Benign', 'benign' differ in spelling only: are they one?" in warnings
    assert "classes '1', '1.0' differ in spelling only: are they one?" in warnings


def test_a_patient_in_two_spellings_is_kept_together_and_told_of(tmp_path: Path) -> None:
    rows = [("xy"[number % 2], f"{'pP'[number // 2 % 2]}{number // 4:02}", "") for number in range(60)]
    index = written(tmp_path, rows, group_column="who")
    splits: dict[str, set[str]] = {}
    for group, split in zip(index.samples["group"], index.samples["split"]):
        splits.setdefault(group.lower(), set()).add(split)
    assert all(len(of_one) == 1 for of_one in splits.values()) and len(splits) == 15
    assert any("15 groups have several spellings" in line and "0 of them" in line for line in index.warnings)


def test_a_patient_in_two_given_splits_by_spelling_is_told_of(tmp_path: Path) -> None:
    parts = ("train", "val", "test")
    rows = [("xy"[n % 2], "p1" if n == 0 else "P01" if n == 5 else f"q{n}", parts[n % 3]) for n in range(18)]
    warnings = written(tmp_path, rows, group_column="who", split_column="part").warnings
    assert any(
        "1 of them in several splits, such as 'P01', 'p1' in train and test" in line for line in warnings
    )


def test_class_folders_that_differ_in_case_are_told_of(tmp_path: Path) -> None:
    names = [f"{label}/{number}.png" for label in ("Cat", "cat", "dog") for number in range(6)]
    index = write(FolderSource(images(tmp_path / "root", *names)), tmp_path / "out")
    assert any("'Cat', 'cat' differ in spelling" in line for line in index.warnings)


def test_files_whose_names_are_no_utf8_do_not_stop_a_look_up(tmp_path: Path) -> None:
    images(tmp_path, "a.png")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))).write_bytes(b"x")
    table(tmp_path, "path,label\na,x\n")
    assert [one.path for one in CsvSource(tmp_path).listing().samples] == ["a"]
