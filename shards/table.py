"""Tables that people write: CSV and TSV files, read strictly, every row with its line.

A row with another number of cells than the header, a quote that swallows rows, a table in another encoding:
each is refused with the line and what was found, since whatever else is done with it is a guess.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.errors import InputError, listed, nearest, printable

# What spreadsheets, R, pandas and databases write for "no value", lower case (pandas' own list, and - . ?).
MISSING = frozenset(
    {"", "nan", "-nan", "na", "n/a", "#n/a", "#na", "#n/a n/a", "<na>", "none", "null", "nil"}
    | {"1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan", "-", "--", "?", "."}
)
SEPARATORS = (",", ";", "\t")
MOST_CELL = 1 << 20  # characters: a cell that is longer has swallowed the rest of the file
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


@dataclass(frozen=True)
class Row:
    """One row: the line it begins in, from 1, and its cells by column, without surrounding space."""

    line: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


@dataclass(frozen=True)
class Table:
    """A table with a header.

    Attributes:
        name: of the file, in messages.
    """

    name: str
    columns: list[str]
    rows: list[Row]


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value: empty, ``nan``, ``NA``, ``null``, ``-`` …"""
    return cell.strip().lower() in MISSING


def read_table(path: Path, needed: Sequence[str], *, name: str = "") -> Table:
    """Read a CSV or TSV file.

    Cells are separated by commas; by tabs in a ``.tsv`` file, and by semicolons or tabs where the header has
    those and no comma. Text is UTF-8, or UTF-16 with a byte-order mark. Rows without any value are skipped.

    Args:
        path: the file.
        needed: columns that must be there, once.
        name: what messages call it; default: the path.

    Raises:
        InputError: it is not there or not such text; a column is missing or there twice; a row has too many
            or too few cells; a quote is not closed, or its cell spans rows.
    """
    name = name or str(path)
    text = _decoded(path, name)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{name} line {line} holds a NUL: it is no table, or damaged")
    records = _records(text, name, separator_of(path, text))
    header_line, header = next(records, (1, []))
    columns = _header(header, name, header_line, needed)
    rows = []
    for line, cells in records:
        if not any(cell.strip() for cell in cells):
            continue
        while len(cells) > len(columns) and not cells[-1].strip():
            cells.pop()  # as spreadsheets write them
        if len(cells) != len(columns):
            few = "few" if len(cells) < len(columns) else "many"
            raise InputError(
                f"{name} line {line} has too {few} cells: {len(cells)} where the header has {len(columns)}"
                f" ({_shown(cells)}); a cell that holds a {_word(separator_of(path, text))} needs quotes"
            )
        rows.append(Row(line, {column: cell.strip() for column, cell in zip(columns, cells)}))
    if not rows:
        raise InputError(f"{name} has no rows")
    return Table(name, columns, rows)


def separator_of(path: Path, text: str) -> str:
    """What separates the cells: by the file's suffix, else by its header."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = text.lstrip().split("\n", 1)[0]
    if "," in header:
        return ","
    return max(SEPARATORS, key=header.count)


def _decoded(path: Path, name: str) -> str:
    if not os.path.isfile(path):
        raise InputError(f"CSV file {path} does not exist")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"CSV file {path} cannot be read: {error.strerror}") from None
    encoding = next((encoding for mark, encoding in _BOMS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"CSV file {path} is not UTF-8 text: line {line} holds the byte {content[error.start]:#04x};"
            " save it as UTF-8"
        ) from None


def _records(text: str, name: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The line in which each record begins, and its cells."""
    csv.field_size_limit(MOST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    ended, width = 0, 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = "a quote is not closed" if "unexpected end" in str(error) else str(error)
            what = "a cell is not closed by its quote" if "field larger" in str(error) else what
            raise InputError(f"{name} line {ended + 1} cannot be read: {what}") from None
        begins, ended = ended + 1, reader.line_num
        width = width or len(cells)
        for cell in cells:
            if "\n" in cell and any(line.count(separator) >= width - 1 for line in cell.splitlines()[1:]):
                raise InputError(
                    f"{name} line {begins}: a quoted cell goes on to line {ended} over what looks like rows:"
                    f" {printable(cell[:40])!r} …; a quote is missing, or there is one too many"
                )
        yield begins, cells


def _header(header: list[str], name: str, line: int, needed: Sequence[str]) -> list[str]:
    columns = [cell.strip() for cell in header]
    while columns and not columns[-1]:
        columns.pop()
    times = Counter(columns)
    for column in needed:
        if times[column] > 1:
            raise InputError(f"{name} has two columns '{column}'")
        if column not in columns:
            raise InputError(
                f"{name} has no column '{column}'{nearest(column, columns)} (its columns: {listed(columns)})"
            )
    return columns


def _shown(cells: Sequence[str]) -> str:
    text = " | ".join(cells)
    return printable(text if len(text) < 80 else f"{text[:77]}…")


def _word(separator: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab"}[separator]
