"""A written dataset: its table of samples, and any image by its row number."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from shards import boxes, codec, masks
from shards.boxes import Boxes
from shards.errors import InputError, printable
from shards.files import open_regular, read_regular
from shards.sources import ANNOTATIONS, SEPARATOR, SPLITS, Task

if TYPE_CHECKING:
    import pandas as pd

FORMAT_VERSION = 3
INDEX, SAMPLES, REJECTED, REPORT = "index.json", "samples.csv", "rejected.csv", "data_report.json"
COPIES = "duplicates.csv"
OPEN_FILES = 128  # shards kept open a process
COLUMNS = {
    "key": str,
    "shard": str,
    "offset": np.int64,
    "length": np.int64,
    "format": str,
    "labels": str,
    "labelled": np.int64,
    "split": str,
    "group": str,
    "width": np.int64,
    "height": np.int64,
    "pixel_hash": str,
    "path": str,
}
ANNOTATION_COLUMNS = {"annotation_offset": np.int64, "annotation_length": np.int64}


def columns_of(task: Task) -> dict[str, type]:
    """The columns of ``samples.csv`` with their types: sets with masks or boxes have two more."""
    return COLUMNS | ANNOTATION_COLUMNS if task in ANNOTATIONS else COLUMNS


class Index:
    """A dataset folder as :func:`shards.write` leaves it.

    Safe to use after a fork, from several threads, and to send to another process.

    Attributes:
        folder: where it is.
        task: "multiclass", "multilabel", "segmentation" or "detection".
        classes: names of the classes; a class's number is its place here. A background is a class of its own
            in segmentation, and none in detection.
        meta: the content of ``index.json``.
        samples: pandas.DataFrame, one row a sample in file order, with the columns key, shard, offset and
            length (of the image in the tar, in bytes), format, labels ("a", "a|b" or ""), labelled (bool: an
            unlabelled sample and one in which nothing was found both have the labels ""), split, group,
            width and height (pixels), pixel_hash, path (in the source); for segmentation and detection,
            where labels are what occurs in the mask or among the boxes, also annotation_offset and
            annotation_length.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], samples: pd.DataFrame) -> None:
        self.folder = folder
        self.meta = meta
        self.task: Task = meta["task"]
        self.classes: list[str] = meta["classes"]
        self.samples = samples
        self._shard_names = samples["shard"].to_numpy(object)
        self._offsets = samples["offset"].to_numpy(np.int64)
        self._lengths = samples["length"].to_numpy(np.int64)
        self._splits = samples["split"].to_numpy(object)
        self._labelled = samples["labelled"].to_numpy(bool)
        self._sizes = samples[["width", "height"]].to_numpy(np.int64)
        if self.task in ANNOTATIONS:
            self._annotations = samples[list(ANNOTATION_COLUMNS)].to_numpy(np.int64)
        try:
            self._targets = _encode(samples["labels"].tolist(), self._labelled, self.classes, self.task)
        except KeyError as error:
            raise InputError(
                f"{folder / SAMPLES} has the label {error}, which is no class of {INDEX}"
            ) from None
        self._files = _OpenFiles(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Read a dataset's index, and see that its shards are there with the right sizes.

        Raises:
            InputError: no dataset there, one of another format version, a missing or cut shard, an index or a
                table of samples that does not fit them.
        """
        folder = Path(folder)
        meta = read_meta(folder)
        for shard in meta["shards"]:
            path = folder / shard["name"]
            if not path.is_file():
                raise InputError(f"shard {path} is missing")
            if path.stat().st_size != shard["bytes"]:
                raise InputError(f"shard {path} has {path.stat().st_size} bytes, not {shard['bytes']}")
        return cls(folder, meta, read_samples(folder / SAMPLES, meta))

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the index, and thereby over all shards and samples: equal for equal datasets."""
        return hashlib.sha256(dump_json(self.meta)).hexdigest()

    @property
    def outlined(self) -> bool:
        """Whether every object of a detection set has its outline: ``boxes(row).masks`` gives masks."""
        return bool(self.meta.get("outlined", False))

    @property
    def report(self) -> dict[str, Any]:
        """The content of ``data_report.json``: sizes, counts, duplicates, warnings. Raises InputError."""
        return read_json(self.folder / REPORT)

    @property
    def warnings(self) -> list[str]:
        """What the user should know of this dataset, one line each. Raises InputError."""
        lines = self.report.get("warnings")
        if not isinstance(lines, list):
            raise InputError(f"{self.folder / REPORT} has no list of warnings")
        return [printable(str(line)) for line in lines]

    def rows(self, split: str, labelled: bool | None = None) -> np.ndarray:
        """Row numbers of a split, ascending.

        Args:
            split: train, val or test.
            labelled: only those with labels (True), without (False), or both (None).

        Returns:
            (N,) int64.
        """
        if split not in SPLITS:
            raise InputError(f"there is no split '{split}' (expected train, val or test)")
        chosen = self._splits == split
        if labelled is not None:
            chosen &= self._labelled == labelled
        return np.flatnonzero(chosen).astype(np.int64)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Labels as numbers.

        Args:
            rows: (N,) row numbers.

        Returns:
            multiclass: (N,) int64, -1 where unlabelled; multilabel, and segmentation and detection, where it
            says what occurs: (N, K) float32 of 0 and 1, or NaN.
        """
        return self._targets[np.asarray(rows, np.int64)]

    def read(self, row: int) -> bytes:
        """The stored image file of a sample. Raises InputError if the shard is cut or gone."""
        return self._files.read(self._shard_names[row], int(self._offsets[row]), int(self._lengths[row]))

    def decode(self, row: int) -> Image.Image:
        """The image of a sample in mode RGB, upright. Raises InputError."""
        return self.decode_bytes(self.read(row))

    def decode_small(self, row: int, *, at_least: int) -> codec.Decoded:
        """The same, where so many pixels are enough for either side (:func:`shards.codec.decode_small`)."""
        return self.decode_small_bytes(self.read(row), at_least=at_least)

    def mask(self, row: int) -> np.ndarray:
        """The segmentation mask of a sample.

        Returns:
            (H, W) uint8 class numbers, 255 where a pixel is of no class; H and W are those of the image.

        Raises:
            InputError: the sample has no mask, or none that can be read.
        """
        data = self._annotation(row, "segmentation")
        try:
            return masks.from_png(data, size=self._size(row), classes=len(self.classes))
        except InputError as error:
            raise InputError(f"{self._name(row)} cannot be read: {error}") from None

    def boxes(self, row: int) -> Boxes:
        """The objects of a sample, none where nothing was found.

        Raises:
            InputError: the sample has no annotation, or none that can be read.
        """
        data = self._annotation(row, "detection")
        try:
            return boxes.from_json(data, size=self._size(row), classes=len(self.classes))
        except InputError as error:
            raise InputError(f"{self._name(row)} cannot be read: {error}") from None

    def _annotation(self, row: int, task: Task) -> bytes:
        if self.task != task:
            raise InputError(f"{self.folder} is a {self.task} set, it has no {ANNOTATIONS[task]}")
        if not self._labelled[row]:
            raise InputError(f"{self._name(row)} is not there: the sample is unlabelled")
        offset, length = self._annotations[row].tolist()
        return self._files.read(self._shard_names[row], offset, length)

    def _size(self, row: int) -> tuple[int, int]:
        width, height = self._sizes[row].tolist()
        return width, height

    def _name(self, row: int) -> str:
        return f"{self.samples['key'].iat[row]}.{ANNOTATIONS[self.task]} in {self.folder}"

    def decode_bytes(self, data: bytes) -> Image.Image:
        """The same as :meth:`decode` for the bytes of a sample that came through :func:`shards.stream`."""
        with self._input_error():
            return codec.decode(data)

    def decode_small_bytes(self, data: bytes, *, at_least: int) -> codec.Decoded:
        """The same as :meth:`decode_small` for such bytes."""
        with self._input_error():
            return codec.decode_small(data, at_least=at_least)

    @contextmanager
    def _input_error(self) -> Iterator[None]:
        try:
            yield
        except codec.Unreadable as error:
            raise InputError(f"{self.folder} holds an image that cannot be decoded: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a dataset. Raises InputError."""
    try:
        return parse_json(read_regular(path), str(path))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no dataset of shards: {path.name} is missing") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object that a JSON text holds. Raises InputError."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not valid JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{where} is not a JSON object")
    return content


def dump_json(content: Any) -> bytes:
    """JSON as datasets hold it: indented, UTF-8, the same bytes for the same content."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of ``index.json``, of this format version. Raises InputError."""
    return check_index(read_json(folder / INDEX), str(folder))


def check_index(meta: dict[str, Any], where: str) -> dict[str, Any]:
    """The content of ``index.json``, if it is of this format version and whole. Raises InputError."""
    from shards.schema import check_meta  # pydantic, which a process that writes shards starts without

    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{where} has format version {version}, expected {FORMAT_VERSION}: write the dataset again"
        )
    check_meta(meta, f"{where}/{INDEX}")
    return meta


def read_samples(source: Path | BinaryIO, meta: dict[str, Any], where: str | None = None) -> pd.DataFrame:
    """``samples.csv``, if it fits its index.

    Args:
        source: a path, or an open file.
        meta: the content of ``index.json``.
        where: what errors call it; None: the path.

    Raises:
        InputError: with the line where it does not fit.
    """
    import pandas as pd

    from shards.schema import check_samples

    where = where or str(source)
    columns = columns_of(meta["task"])
    try:
        with open_regular(source) if isinstance(source, Path) else source as file:
            samples = pd.read_csv(
                file,
                dtype=columns,
                keep_default_na=False,
                na_filter=False,
                encoding="utf-8",
                lineterminator="\n",
            )
    except FileNotFoundError:
        raise InputError(f"{where} is missing") from None
    except (ValueError, OSError, OverflowError) as error:
        raise InputError(f"{where} cannot be read: {error}") from None
    if not isinstance(samples.index, pd.RangeIndex):  # pandas takes the first of too many cells for a name
        raise InputError(f"{where} has rows with more cells than columns")
    missing = [column for column in columns if column not in samples]
    if missing:
        raise InputError(f"{where} has no column '{missing[0]}'")
    check_samples(samples, meta, where)
    samples["labelled"] = samples["labelled"].astype(bool)
    return samples


def _encode(labels: list[str], labelled: np.ndarray, classes: list[str], task: Task) -> np.ndarray:
    number = {name: place for place, name in enumerate(classes)}
    if task == "multiclass":
        return np.array([number[name] if known else -1 for name, known in zip(labels, labelled)], np.int64)
    targets = np.zeros((len(labels), len(classes)), np.float32)
    targets[~labelled] = np.nan
    for row, names in enumerate(labels):
        for name in filter(None, names.split(SEPARATOR)):
            targets[row, number[name]] = 1
    return targets


class _Descriptor:
    """An open file that closes when the last user lets go of it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _OpenFiles:
    """Reads from many files at given places, keeping the last used ones open.

    ``pread`` does not move a file's position, so a descriptor inherited through a fork, or shared by
    threads, is safe to read from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def read(self, name: str, offset: int, length: int) -> bytes:
        path = self.folder / name
        try:
            file = self._file(name, path)
            data = os.pread(file.number, length, offset)
            while len(data) < length and (
                more := os.pread(file.number, length - len(data), offset + len(data))
            ):
                data += more
        except OSError as error:
            raise InputError(f"shard {path} cannot be read: {error.strerror}") from None
        if len(data) < length:
            raise InputError(f"shard {path} is cut short")
        return data

    def _file(self, name: str, path: Path) -> _Descriptor:
        if self._process != os.getpid():  # a thread of the parent may have held the lock at the fork
            self._process, self._lock = os.getpid(), threading.Lock()
        with self._lock:
            file = self._open.pop(name, None) or _Descriptor(path)
            self._open[name] = file
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
            return file
