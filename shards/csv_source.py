"""Images and labels from a CSV file: one row an image, columns named by the user."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.codec import SUFFIXES
from shards.errors import InputError, listed, nearest
from shards.layout import gaps, path_below
from shards.lookup import Lookup
from shards.mask_source import mask_values
from shards.masks import SUFFIXES as MASK_SUFFIXES
from shards.masks import MaskFile
from shards.sources import SPLIT_NAMES, Listing, Sample, Task, check_classes, existing_folder
from shards.table import Row, is_missing, read_table

YES = frozenset({"1", "1.0", "true", "yes"})
NO = frozenset({"0", "0.0", "false", "no"})


@dataclass(frozen=True)
class CsvSource:
    """Rows of a CSV file (a .tsv file is read with tabs), as :mod:`shards.table` reads them.

    One label column is single-label, or multi-label where ``label_separator`` is given; several columns of
    0 and 1 are multi-label, with the columns as classes. Label cells that are empty, or say ``nan``, ``NA``,
    ``null`` and the like, mean unlabelled, unless ``classes`` names such a word. With a mask
    column it is a segmentation set, and label columns are not read.

    Attributes:
        root: the folder that image paths are below.
        csv: the file, below root or absolute.
        path_column: column with the image paths, below root; a missing suffix such as .jpg is found on disk.
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
        missing = Missing(self.csv)
        for row, plain in self._images(root, rows, missing):
            if several:
                labels = self._indicators(row, missing)
            else:
                labels = self._labels(row, plain.path, missing)
            samples.append(replace(plain, labels=labels or (), labelled=labels is not None))
        classes = self._classes(samples)
        samples.sort(key=lambda sample: sample.path)
        return Listing(task, classes, samples, notes=missing.notes())

    def _masks(self, root: Path, rows: Sequence[Row]) -> Listing:
        """The same for a segmentation set."""
        assert self.mask_column is not None
        if self.classes is not None:
            raise InputError("classes is not for masks: mask_classes names their values")
        samples, absent = [], []
        missing = Missing(self.csv)
        masks = Lookup(root, MASK_SUFFIXES)
        for row, plain in self._images(root, rows, missing):
            cell = row[self.mask_column]
            if is_missing(cell):
                missing.count(self.mask_column, cell, "these images are unlabelled")
            else:
                where = self._where(row, self.mask_column)
                file = masks.file(masks.relative(cell, where), where)
                if os.path.exists(file):
                    plain = replace(plain, annotation=MaskFile(path_below(root, file), file))
                else:
                    absent.append(cell)
            samples.append(replace(plain, labelled=plain.annotation is not None))
        without = [sample.path for sample in samples if not sample.labelled]
        if len(without) == len(samples):
            example = f" ({absent[0]} does not exist)" if absent else ""
            raise InputError(f"{self.csv} has no mask in column '{self.mask_column}'{example}")
        samples.sort(key=lambda sample: sample.path)
        notes = gaps("mask", sorted(without)) + missing.notes()
        if absent:
            notes.append(f"{len(absent)} masks that {self.csv} names do not exist, e.g. {absent[0]}")
        values = mask_values(self.mask_classes, self.mask_ignore)
        return Listing("segmentation", [], samples, notes=notes, mask_values=values)

    def _images(self, root: Path, rows: Sequence[Row], missing: Missing) -> Iterator[tuple[Row, Sample]]:
        """Each row and its sample, as yet without labels."""
        first_line: dict[str, int] = {}
        lookup = Lookup(root, SUFFIXES)
        for row in rows:
            where, cell = self._where(row, self.path_column), row[self.path_column]
            if not cell:
                raise InputError(f"{self.csv} line {row.line}: column '{self.path_column}' is empty")
            name = lookup.relative(cell, where)
            file = lookup.file(name, where)
            for spelled in {name, path_below(root, file)}:
                if spelled in first_line:
                    raise InputError(
                        f"{self.csv} lists '{name}' twice, in lines {first_line[spelled]} and {row.line}"
                    )
                first_line[spelled] = row.line
            if is_missing(cell) and not os.path.exists(file):
                raise InputError(f"{where} is '{cell}', expected the path of an image")
            group = row[self.group_column] if self.group_column else ""
            if self.group_column and (is_missing(group) or group.lower() == "unknown"):
                if group:
                    missing.count(self.group_column, group, "each of these images is a unit of its own")
                group = ""
            yield row, Sample(name, file, split=self._split(row), group=group)

    def _where(self, row: Row, column: str) -> str:
        return f"{self.csv} line {row.line}: column '{column}'"

    def _rows(self, root: Path) -> list[Row]:
        """The rows, with all needed columns present."""
        if not self.label_columns and self.mask_column is None:
            raise InputError("label_columns is empty: expected at least one column")
        if len(self.label_columns) > 1 and self.label_separator:
            raise InputError("label_separator is for one label column, but there are several")
        labels = self.label_columns if self.mask_column is None else [self.mask_column]
        wanted = [self.path_column, *labels, self.split_column, self.group_column]
        needed = [column for column in wanted if column is not None]
        return read_table(root / self.csv, needed, name=str(self.csv)).rows

    def _labels(self, row: Row, name: str, missing: Missing) -> tuple[str, ...] | None:
        cell = row[self.label_columns[0]]
        if is_missing(cell) and cell not in (self.classes or ()):
            missing.count(self.label_columns[0], cell, "these images are unlabelled")
            return None
        if self.label_separator is None:
            labels = [cell]
        else:
            labels = sorted({part.strip() for part in cell.split(self.label_separator)} - {""})
        for label in labels:
            if self.classes is not None and label not in self.classes:
                hint = nearest(label, self.classes)
                raise InputError(
                    f"{self.csv} line {row.line}: label '{label}' of {name} is not in the list of"
                    f" classes{hint} (expected {listed(self.classes)})"
                )
        return tuple(labels)

    def _indicators(self, row: Row, missing: Missing) -> tuple[str, ...] | None:
        cells = {column: row[column].lower() for column in self.label_columns}
        if all(is_missing(cell) for cell in cells.values()):
            for cell in set(cells.values()):
                missing.count(", ".join(self.label_columns), cell, "these images are unlabelled")
            return None
        for column, cell in cells.items():
            if cell not in YES and cell not in NO:
                where = self._where(row, column)
                raise InputError(f"{where} is '{cell}' (expected 0 or 1, or nothing in all of them)")
        return tuple(column for column, cell in cells.items() if cell in YES)

    def _split(self, row: Row) -> str:
        if self.split_column is None:
            return ""
        cell = row[self.split_column]
        if cell.lower() not in SPLIT_NAMES:
            raise InputError(
                f"{self._where(row, self.split_column)} is '{cell}' (expected {listed(SPLIT_NAMES)})"
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


class Missing:
    """Counts the cells that are not empty and say that there is no value.

    Args:
        table: the file's name.
    """

    def __init__(self, table: str | Path) -> None:
        self._table = table
        self._found: dict[tuple[str, str], Counter[str]] = {}

    def count(self, column: str, cell: str, meaning: str) -> None:
        if cell:
            self._found.setdefault((column, meaning), Counter())[cell] += 1

    def notes(self) -> list[str]:
        """One line a column: which words, how often, and what they were taken for."""
        return [
            f"{self._table}: column '{column}' says {listed(words)} {sum(words.values())} times, taken for"
            f" missing: {meaning} (`classes` can name such a word)"
            for (column, meaning), words in self._found.items()
        ]
