"""Objects in images: as a source describes them, as ``KEY.boxes.json`` holds them, and as arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shards.errors import InputError
from shards.segments import MOST_POINTS, Polygons, Runs, Segment, drawn, scaled

MOST_OBJECTS = 10_000  # in one image
MOST_BYTES = 16 << 20  # of a file with the objects of one image
FARTHEST = 1e7  # coordinate, in pixels
DIGITS = 3  # after the point, of a coordinate or an area in a tar


@dataclass(frozen=True, eq=False, slots=True)
class Instance:
    """One object of an image.

    Attributes:
        label: name of its class.
        box: x0, y0, x1, y1 in pixels.
        crowd: not to be counted in an evaluation (COCO's iscrowd, VOC's difficult).
        area: in square pixels; None: not known.
        segment: its outline; None: not known.
    """

    label: str
    box: tuple[float, float, float, float]
    crowd: bool = False
    area: float | None = None
    segment: Segment | None = None


@dataclass(frozen=True, eq=False)
class Instances:
    """All objects of one image as a source describes them.

    Attributes:
        where: what errors call the description.
        found: the objects, in pixels of the source's image.
        size: (width, height) of that image as the source says; None where it does not.
    """

    where: str
    found: tuple[Instance, ...]
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.found) > MOST_OBJECTS:
            raise InputError(f"{self.where} has {len(self.found)} objects, more than {MOST_OBJECTS}")
        points = sum(
            len(part) for one in self.found if isinstance(one.segment, Polygons) for part in one.segment.parts
        )
        if points > MOST_POINTS:
            raise InputError(f"{self.where} has polygons of {points} points, more than {MOST_POINTS}")


@dataclass(frozen=True, eq=False)
class Placed:
    """The objects of an image as they are stored: in pixels of the stored image, all within it."""

    found: tuple[Instance, ...]
    clipped: int  # boxes that went beyond the image
    dropped: int  # boxes without area, or wholly outside


def place(instances: Instances, size: tuple[int, int], stored: tuple[int, int]) -> Placed:
    """Clip objects to their image and resize them with it.

    Args:
        instances: what the source says.
        size: (width, height) of the source's image.
        stored: of the image in the tar.

    Raises:
        InputError: run lengths that are broken or of another size than the image.
    """
    found, clipped = [], 0
    factors = np.divide(stored, size)
    for one in instances.found:
        corners = np.reshape(one.box, (2, 2))
        within = np.clip(corners, 0, size)
        box = np.round(within * factors, DIGITS)
        if not (box[0] < box[1]).all():
            continue
        clipped += not np.array_equal(within, corners)
        area = one.area * factors.prod() if one.area else (box[1] - box[0]).prod()
        try:
            segment = None if one.segment is None else scaled(one.segment, size, stored)
        except InputError as error:
            raise InputError(f"{instances.where}: {error}") from None
        found.append(
            replace(one, box=tuple(box.ravel().tolist()), area=round(float(area), DIGITS), segment=segment)
        )
    return Placed(tuple(found), clipped, len(instances.found) - len(found))


def to_json(found: Sequence[Instance], numbers: Mapping[str, Any], *, outlined: bool) -> bytes:
    """The content of ``KEY.boxes.json``.

    Args:
        found: what :func:`place` gave.
        numbers: class → number.
        outlined: whether outlines are stored, with null for an object that has none.
    """
    content = {
        "area": [one.area for one in found],
        "boxes": [one.box for one in found],
        "crowd": [one.crowd for one in found],
        "labels": [numbers[one.label] for one in found],
    }
    if outlined:
        content["segments"] = [_plain(one.segment) for one in found]
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def content_hash(found: Sequence[Instance]) -> str:
    """SHA-256 over objects as a source describes them."""
    names = {one.label: one.label for one in found}
    return hashlib.sha256(to_json(found, names, outlined=True)).hexdigest()


def _plain(segment: Segment | None) -> Any:
    """An outline as COCO writes it."""
    if isinstance(segment, Runs):
        return {"size": [segment.height, segment.width], "counts": segment.counts}
    if segment is None:
        return None
    return [np.round(part, DIGITS).ravel().tolist() for part in segment.parts]


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of one image.

    Attributes:
        boxes: (M, 4) float32, x0, y0, x1, y1 in pixels of the stored image.
        labels: (M,) int64, class numbers.
        crowd: (M,) bool, not to be counted in an evaluation.
        area: (M,) float32, square pixels.
        size: (width, height) of the stored image, which outlines refer to.
        segments: (M,) outlines, None for an object without one; None in a set without outlines.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    size: tuple[int, int] = (0, 0)
    segments: tuple[Segment | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def masks(self, height: int, width: int) -> np.ndarray | None:
        """The objects as masks: a pixel is in an object if its centre is.

        Args:
            height, width: of the masks; other than the image's, they are scaled with it.

        Returns:
            (M, height, width) bool; None where an object of the image has no outline.

        Raises:
            InputError: run lengths that are broken.
        """
        if self.segments is None or any(segment is None for segment in self.segments):
            return None
        masks = np.zeros((len(self), height, width), bool)
        for mask, segment in zip(masks, self.segments):
            assert segment is not None
            mask[:] = drawn(segment, self.size, height, width)
        return masks


Coordinate = Annotated[float, Field(ge=-FARTHEST, le=FARTHEST)]
Corner = Annotated[float, Field(ge=0, le=FARTHEST)]


class _Runs(BaseModel):
    size: tuple[int, int]
    counts: str


class _Stored(BaseModel):
    """``KEY.boxes.json``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)  # further keys may stand there

    boxes: list[tuple[Corner, Corner, Corner, Corner]] = Field(max_length=MOST_OBJECTS)
    labels: list[Annotated[int, Field(ge=0, lt=2**31)]]
    crowd: list[bool]
    area: list[Annotated[float, Field(ge=0, le=FARTHEST**2)]]
    segments: list[list[list[Coordinate]] | _Runs | None] | None = None

    @model_validator(mode="after")
    def _of_one_length(self) -> _Stored:
        segments = self.boxes if self.segments is None else self.segments
        lengths = {len(self.boxes), len(self.labels), len(self.crowd), len(self.area), len(segments)}
        if len(lengths) > 1:
            raise ValueError("boxes, labels, crowd, area and segments are not of one length")
        parts = [part for one in self.segments or () if isinstance(one, list) for part in one]
        if any(len(part) < 6 or len(part) % 2 for part in parts):
            raise ValueError("a polygon is not three or more pairs of x and y")
        if sum(map(len, parts)) > 2 * MOST_POINTS:
            raise ValueError(f"polygons of more than {MOST_POINTS} points")
        return self


def from_json(data: bytes, *, size: tuple[int, int], classes: int) -> Boxes:
    """The objects that a ``KEY.boxes.json`` holds.

    Args:
        data: its content.
        size: (width, height) of the stored image.
        classes: how many there are.

    Raises:
        InputError: what :func:`to_json` does not write for such an image.
    """
    try:
        stored = _Stored.model_validate_json(data)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"msg": "nested too deep"}
        key = ".".join(map(str, first.get("loc", ())))
        raise InputError(f"{key or 'boxes'}: {first['msg'].removeprefix('Value error, ')}") from None
    boxes = np.array(stored.boxes, np.float32).reshape(-1, 4)
    if (boxes[:, :2] >= boxes[:, 2:]).any() or (boxes[:, 2:] > np.array(size, np.float32)).any():
        raise InputError(f"a box is not within the image of {size[0]} x {size[1]} pixels")
    labels = np.array(stored.labels, np.int64)
    if (labels >= classes).any():
        raise InputError(f"a box is of class number {labels.max()}, but there are {classes} classes")
    segments = None if stored.segments is None else tuple(map(_segment, stored.segments))
    area = np.array(stored.area, np.float32)
    return Boxes(boxes, labels, np.array(stored.crowd, bool), area, size, segments)


def _segment(stored: list[list[float]] | _Runs | None) -> Segment | None:
    if stored is None:
        return None
    if isinstance(stored, _Runs):
        return Runs(*stored.size, stored.counts)
    return Polygons(tuple(np.reshape(part, (-1, 2)) for part in stored))
