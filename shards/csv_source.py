"""Images and labels from a CSV file: one row an image, columns named by the user."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.codec import SUFFIXES
from shards.errors import InputError, listed, nearest
from shards.layout import gaps, path_below, safe
from shards.mask_source import mask_values
from shards.masks import SUFFIXES as MASK_SUFFIXES
from shards.masks import MaskFile
from shards.sources import SPLIT_NAMES, Listing, Sample, Task, check_classes, existing_folder

YES = frozenset({"1", "1.0", "true", "yes"})
NO = frozenset({"0", "0.0", "false", "no"})


@dataclass(frozen=True)
class CsvSource:
    """Rows of a CSV file (a .tsv file is read with tabs).

    One label column is single-label, or multi-label where ``label_separator`` is given; several columns of
    0 and 1 are multi-label, with the columns as classes. Empty label cells mean unlabelled. With a mask
    column it is a segmentation set, and label columns are not read.

    Attributes:
        root: the folder that image paths are below.
        csv: the file, below root or absolute.
        path_column: column with the image paths; a missing suffix such as .jpg is found on disk.
        label_columns: one or more columns.
        label_separator: what separates several labels in one column.
        split_column: column with train, val or test (or training, valid, validation, dev, testing).
        group_column: column with what must not be in two splits, such as the patient.
        classes: names and order of the classes; those found, sorted, where None. Not with masks.
        mask_column: column with the paths of masks below root, with or without suffix; an empty cell means
            unlabelled.
        mask_classes, mask_ignore: as for MaskSource.
    """

    root: str | Path
    csv: str | Path = "labels.csv"
    path_column: str = "path"
    label_columns: Sequence[str] = ("label",)
    label_separator: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    classes: Sequence[str] | None = None
    mask_column: str | None = None
    mask_classes: Mapping[str, int] | None = None
    mask_ignore: Collection[int] | None = None

    @property
    def base(self) -> Path | None:
        return Path(self.root)

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """All rows.

        Raises:
            InputError: missing root, file or column, a path listed twice, a label that is not in ``classes``
                or not 0/1, an unknown split, a mask that is not below the root.
        """
        root = existing_folder(self.root)
        rows = self._rows(root)
        if self.mask_column is not None:
            return self._masks(root, rows)
        several = len(self.label_columns) > 1
        task: Task = "multilabel" if several or self.label_separator else "multiclass"
        if several and self.classes is not None and set(self.classes) != set(self.label_columns):
            raise InputError(
                f"classes must be the label columns {listed(self.label_columns)} where there are several"
            )
        samples: list[Sample] = []
        for line, row, plain in self._images(root, rows):
            labels = self._indicators(row, line) if several else self._labels(row, line, plain.path)
            samples.append(replace(plain, labels=labels or (), labelled=labels is not None))
        classes = self._classes(samples)
        samples.sort(key=lambda sample: sample.path)
        return Listing(task, classes, samples)

    def _masks(self, root: Path, rows: list[tuple[int, dict[str, str]]]) -> Listing:
        """The same for a segmentation set."""
        assert self.mask_column is not None
        if self.classes is not None:
            raise InputError("classes is not for masks: mask_classes names their values")
        samples, missing = [], []
        for line, row, plain in self._images(root, rows):
            if cell := row[self.mask_column].strip():
                name = str(safe(cell, f"{self.csv} line {line}: column '{self.mask_column}'"))
                file = _locate(root, name, MASK_SUFFIXES)
                if os.path.exists(file):
                    plain = replace(plain, annotation=MaskFile(path_below(root, file), file))
                else:
                    missing.append(name)
            samples.append(replace(plain, labelled=plain.annotation is not None))
        without = [sample.path for sample in samples if not sample.labelled]
        if len(without) == len(samples):
            example = f" ({missing[0]} does not exist)" if missing else ""
            raise InputError(f"{self.csv} has no mask in column '{self.mask_column}'{example}")
        samples.sort(key=lambda sample: sample.path)
        notes = gaps("mask", sorted(without))
        if missing:
            notes.append(f"{len(missing)} masks that {self.csv} names do not exist, e.g. {missing[0]}")
        values = mask_values(self.mask_classes, self.mask_ignore)
        return Listing("segmentation", [], samples, notes=notes, mask_values=values)

    def _images(
        self, root: Path, rows: list[tuple[int, dict[str, str]]]
    ) -> Iterator[tuple[int, dict[str, str], Sample]]:
        """Line, row and sample, as yet without labels, of each row."""
        first_line: dict[str, int] = {}
        for line, row in rows:
            name = _clean(row[self.path_column])
            if not name:
                raise InputError(f"{self.csv} line {line}: column '{self.path_column}' is empty")
            if name in first_line:
                raise InputError(f"{self.csv} lists '{name}' twice, in lines {first_line[name]} and {line}")
            first_line[name] = line
            group = row[self.group_column].strip() if self.group_column else ""
            yield (
                line,
                row,
                Sample(
                    name, _locate(root, name, sorted(SUFFIXES)), split=self._split(row, line), group=group
                ),
            )

    def _rows(self, root: Path) -> list[tuple[int, dict[str, str]]]:
        """(line number, row) of each row, with all needed columns present."""
        path = root / self.csv
        if not os.path.isfile(path):
            raise InputError(f"CSV file {path} does not exist")
        if not self.label_columns and self.mask_column is None:
            raise InputError("label_columns is empty: expected at least one column")
        if len(self.label_columns) > 1 and self.label_separator:
            raise InputError("label_separator is for one label column, but there are several")
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", restval="")
                self._check_columns(list(reader.fieldnames or []))
                rows = [(reader.line_num, row) for row in reader]
                file.seek(0)
                if any("\0" in block for block in iter(lambda: file.read(1 << 20), "")):
                    raise csv.Error("it holds a NUL")
        except UnicodeDecodeError:
            raise InputError(f"CSV file {path} is not UTF-8 text") from None
        except csv.Error as error:
            raise InputError(f"CSV file {path} cannot be read: {error}") from None
        except OSError as error:
            raise InputError(f"CSV file {path} cannot be read: {error.strerror}") from None
        if not rows:
            raise InputError(f"CSV file {path} has no rows")
        return rows

    def _check_columns(self, columns: list[str]) -> None:
        labels = self.label_columns if self.mask_column is None else [self.mask_column]
        wanted = [self.path_column, *labels, self.split_column, self.group_column]
        for column in wanted:
            if column is None:
                continue
            if columns.count(column) > 1:
                raise InputError(f"{self.csv} has two columns '{column}'")
            if column not in columns:
                hint = nearest(column, columns)
                raise InputError(
                    f"{self.csv} has no column '{column}'{hint} (its columns: {listed(columns)})"
                )

    def _labels(self, row: dict[str, str], line: int, name: str) -> tuple[str, ...] | None:
        cell = row[self.label_columns[0]].strip()
        if not cell:
            return None
        if self.label_separator is None:
            labels = [cell]
        else:
            labels = sorted({part.strip() for part in cell.split(self.label_separator)} - {""})
        for label in labels:
            if self.classes is not None and label not in self.classes:
                hint = nearest(label, self.classes)
                raise InputError(
                    f"{self.csv} line {line}: label '{label}' of {name} is not in the list of classes{hint}"
                    f" (expected {listed(self.classes)})"
                )
        return tuple(labels)

    def _indicators(self, row: dict[str, str], line: int) -> tuple[str, ...] | None:
        cells = {column: row[column].strip().lower() for column in self.label_columns}
        if not any(cells.values()):
            return None
        for column, cell in cells.items():
            if cell not in YES and cell not in NO:
                raise InputError(f"{self.csv} line {line}: column '{column}' is '{cell}' (expected 0 or 1)")
        return tuple(column for column, cell in cells.items() if cell in YES)

    def _split(self, row: dict[str, str], line: int) -> str:
        if self.split_column is None:
            return ""
        cell = row[self.split_column].strip()
        if cell.lower() not in SPLIT_NAMES:
            raise InputError(
                f"{self.csv} line {line}: column '{self.split_column}' is '{cell}'"
                f" (expected {listed(SPLIT_NAMES)})"
            )
        return SPLIT_NAMES[cell.lower()]

    def _classes(self, samples: Sequence[Sample]) -> list[str]:
        if not any(sample.labelled for sample in samples):
            raise InputError(
                f"{self.csv} has no label: column {listed(self.label_columns)} is empty in every row"
            )
        found = {label for sample in samples for label in sample.labels}
        if self.classes is not None:
            classes = list(self.classes)
        elif len(self.label_columns) > 1:
            classes = list(self.label_columns)
        else:
            classes = sorted(found)
        check_classes(classes)
        for name in classes:
            if name not in found:
                raise InputError(f"class '{name}' has no sample in {self.csv}")
        return classes


def _clean(cell: str) -> str:
    """A path cell as one unique spelling with forward slashes."""
    cell = cell.strip().replace("\\", "/")
    return posixpath.normpath(cell) if cell else ""


def _locate(root: Path, name: str, suffixes: Sequence[str]) -> Path:
    """The file of a path cell; where it has none of some suffixes, a file beside it that has one."""
    path = root / name
    if path.suffix.lower() not in suffixes and not os.path.exists(path):
        for suffix in suffixes:
            if os.path.exists(f"{path}{suffix}"):
                return Path(f"{path}{suffix}")
    return path
