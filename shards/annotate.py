"""The annotations of samples on their way into tars: measured beside their images, named, stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from shards import boxes, codec, masks
from shards.boxes import Instances
from shards.errors import InputError
from shards.masks import MaskFile
from shards.sources import ANNOTATIONS, Listing, Sample

QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that change width and height


@dataclass(frozen=True)
class Measured:
    """What is known of an annotation once it has been read.

    Attributes:
        content: SHA-256 of what the source says, to tell whether two annotations are the same.
        counts: class → pixels of the stored mask, or boxes; for masks once :func:`settle` has named them.
        values: value → pixels of the stored mask.
        crowd, outlined: boxes that are crowds; that have an outline.
        clipped, dropped: boxes that went beyond the image; that were left out as they have no area in it.
    """

    content: str
    counts: dict[str, int] = field(default_factory=dict)
    values: dict[int, int] = field(default_factory=dict)
    crowd: int = 0
    outlined: int = 0
    clipped: int = 0
    dropped: int = 0


def measure(sample: Sample, seen: codec.Inspection) -> Measured | None:
    """Read a sample's annotation; None where it has none.

    Raises:
        codec.Unreadable: the mask cannot be read, or the image cannot be used with its annotation.
        InputError: the annotation is none, or of an image of another size.
    """
    annotation, stored = sample.annotation, (seen.width, seen.height)
    if annotation is None:
        return None
    if isinstance(annotation, MaskFile):
        values = _values(annotation)
        size = values.shape[1], values.shape[0]
        _check_size(sample.path, seen, f"its mask {annotation.path}", size)
        pixels = np.bincount(masks.resized(values, stored).ravel(), minlength=256)
        present = np.flatnonzero(pixels).tolist()
        return Measured(masks.content_hash(values), values={value: int(pixels[value]) for value in present})
    _check_size(sample.path, seen, annotation.where, annotation.size)
    placed = boxes.place(annotation, seen.upright, stored)
    counts = Counter(one.label for one in placed.found)
    return Measured(
        boxes.content_hash(annotation.found),
        counts=dict(counts),
        crowd=sum(one.crowd for one in placed.found),
        outlined=sum(one.segment is not None for one in placed.found),
        clipped=placed.clipped,
        dropped=placed.dropped,
    )


def _values(file: MaskFile) -> np.ndarray:
    try:
        return file.values()
    except codec.Unreadable as error:
        raise codec.Unreadable(f"mask {file.path}: {error}") from None
    except OSError as error:
        raise codec.Unreadable(f"mask {file.path}: {error.strerror}") from None


def _check_size(path: str, seen: codec.Inspection, what: str, size: tuple[int, int] | None) -> None:
    """The annotation must be of the upright image, which after an EXIF rotation only another shape tells."""
    width, height = seen.upright
    if seen.orientation == 1 and size not in (None, seen.upright):
        raise InputError(
            f"{path} has {width} x {height} pixels, but {what} is of {size[0]} x {size[1]}"  # type: ignore[index]
        )
    tells = seen.orientation in QUARTER_TURNS and width != height and size == seen.upright
    if seen.orientation != 1 and not tells:
        raise codec.Unreadable("has an EXIF rotation; its annotation may be of the image before it")


@dataclass(frozen=True)
class StoredMask:
    """``KEY.mask.png`` to be: of which file, in which size (width, height), by which table of values."""

    file: MaskFile
    content: str
    size: tuple[int, int]
    table: bytes
    suffix: ClassVar[str] = ANNOTATIONS["segmentation"]

    def encode(self) -> bytes:
        """Its bytes.

        Raises:
            InputError: the file is not what it was when it was measured.
        """
        try:
            values = _values(self.file)
        except codec.Unreadable as error:
            raise InputError(f"{error}, though it was read before") from None
        if masks.content_hash(values) != self.content:
            raise InputError(f"mask {self.file.path} changed while it was sharded")
        return masks.to_png(masks.resized(values, self.size), self.table)


@dataclass(frozen=True)
class StoredBoxes:
    """``KEY.boxes.json`` to be: which objects, on an image of which size, stored in which, class → number."""

    instances: Instances
    upright: tuple[int, int]
    size: tuple[int, int]
    numbers: Mapping[str, int]
    outlined: bool
    suffix: ClassVar[str] = ANNOTATIONS["detection"]

    def encode(self) -> bytes:
        """Its bytes.

        Raises:
            InputError: they are more than a reader takes.
        """
        placed = boxes.place(self.instances, self.upright, self.size)
        data = boxes.to_json(placed.found, self.numbers, outlined=self.outlined)
        if len(data) > boxes.MOST_BYTES:
            raise InputError(f"{self.instances.where}: its outlines take more than {boxes.MOST_BYTES} bytes")
        return data


Stored = StoredMask | StoredBoxes


@dataclass
class Entry:
    """A readable sample on its way: ``sample.split`` is final once splits are made."""

    sample: Sample
    seen: codec.Inspection
    key: str
    measured: Measured | None = None
    stored: Stored | None = None


def settle(listing: Listing, entries: Sequence[Entry]) -> tuple[Listing, list[Entry]]:
    """Name the classes that annotations hold: in the listing, as labels of the samples, and as numbers.

    Raises:
        InputError: mask values that are not those of classes.
    """
    if listing.mask_values is not None:
        return _settle_masks(listing, listing.mask_values, entries)
    if listing.task != "detection":
        return listing, list(entries)
    numbers = {name: number for number, name in enumerate(listing.classes)}
    outlined = any(entry.measured.outlined for entry in entries if entry.measured)
    settled = []
    for entry in entries:
        if entry.measured is not None:
            assert isinstance(entry.sample.annotation, Instances)
            size = entry.seen.width, entry.seen.height
            names = tuple(name for name in listing.classes if name in entry.measured.counts)
            entry = replace(
                entry,
                sample=replace(entry.sample, labels=names),
                stored=StoredBoxes(entry.sample.annotation, entry.seen.upright, size, numbers, outlined),
            )
        settled.append(entry)
    return listing, settled


def _settle_masks(
    listing: Listing, values: masks.MaskValues, entries: Sequence[Entry]
) -> tuple[Listing, list[Entry]]:
    found: dict[int, str] = {}
    for entry in entries:
        if entry.measured is not None:
            assert isinstance(entry.sample.annotation, MaskFile)
            for value in entry.measured.values:
                found.setdefault(value, entry.sample.annotation.path)
    decided = masks.settle(values, found)
    settled = []
    for entry in entries:
        if entry.measured is not None:
            assert isinstance(entry.sample.annotation, MaskFile)
            counts = decided.named(entry.measured.values)
            size = entry.seen.width, entry.seen.height
            entry = replace(
                entry,
                sample=replace(entry.sample, labels=tuple(counts)),
                measured=replace(entry.measured, counts=counts),
                stored=StoredMask(entry.sample.annotation, entry.measured.content, size, decided.table),
            )
        settled.append(entry)
    return replace(listing, classes=decided.classes, notes=listing.notes + decided.notes), settled
