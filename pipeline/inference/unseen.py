"""Images that no label is known of, as a dataset folder: stored and decoded as those of a training were."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import shards
from pipeline.errors import UserError
from shards.sources import Listing, Sample, text, walk
from shards.table import read_table


@dataclass(frozen=True)
class ImagesSource:
    """Images without labels.

    Attributes:
        files: name → file.
        like: the dataset whose kind of labels and classes it gets.
    """

    files: dict[str, Path]
    like: shards.Index

    @property
    def base(self) -> Path | None:
        return None

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        samples = [Sample(name, path, labelled=False) for name, path in sorted(self.files.items())]
        return Listing(self.like.task, self.like.classes, samples)


def find_images(where: Path, *, path_column: str = "path") -> dict[str, Path]:
    """The images below a folder, or those that a table names, by their names in the prediction table.

    Args:
        where: a folder, an image file, or a CSV file whose paths are below its own folder (or absolute).
        path_column: of the CSV file.

    Raises:
        UserError: there is nothing there, or no image in it.
    """
    if where.is_dir():
        found = {text(path.relative_to(where).as_posix()): path for path in walk(where, Counter())}
    elif where.suffix.lower() in (".csv", ".tsv"):
        found = _of_table(where, path_column)
    elif where.is_file():
        found = {where.name: where}
    else:
        raise UserError(f"--images: there is no folder or table {where}")
    if not found:
        raise UserError(f"--images: no image in {where}")
    return found


def _of_table(path: Path, column: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for row in read_table(path, [column]).rows:
        name = row[column]
        if not name:
            raise UserError(f"--images: {path} line {row.line}: column '{column}' is empty")
        if name in found:
            raise UserError(f"--images: {path} line {row.line} names {name} again")
        found[name] = Path(os.path.join(path.parent, name))
    return found


def write_like(
    source: shards.Source,
    folder: Path,
    like: shards.Index,
    *,
    max_rejected: float = 1.0,
    processes: int = 1,
) -> shards.Index:
    """A dataset folder of a test split alone, stored as a training's was: of the same size and grey scale.

    Args:
        source: the images, with or without labels.
        folder: where to write.
        like: the training's.
        max_rejected: share of unreadable images above which nothing is written.
        processes: that read and write.

    Raises:
        shards.InputError: no image can be read, or too few.
    """
    own = like.meta["options"]
    options = shards.ShardOptions(
        seed=own["seed"],
        resize=own["resize"],
        max_rejected=max_rejected,
        intensity=own["intensity"] and tuple(own["intensity"]),
        windows={kind: tuple(window) for kind, window in like.meta["intensity"].items()},
        duplicates="keep",
        only_test=True,
        processes=processes,
    )
    return shards.write(source, folder, options)
