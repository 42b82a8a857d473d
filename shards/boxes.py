"""Objects in images: as a source describes them, as ``KEY.boxes.json`` holds them, and as arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.errors import InputError
from shards.segments import MOST_POINTS, Polygons, Runs, Segment, drawn, scaled

MOST_OBJECTS = 10_000  # in one image
MOST_BYTES = 16 << 20  # of KEY.boxes.json, or of a source's file of one image
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
        if not (box[0].astype(np.float32) < box[1].astype(np.float32)).all():  # as they are read
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


def from_json(data: bytes, *, size: tuple[int, int], classes: int) -> Boxes:
    """The objects that a ``KEY.boxes.json`` holds.

    Args:
        data: its content.
        size: (width, height) of the stored image.
        classes: how many there are.

    Raises:
        InputError: what :func:`to_json` does not write for such an image.
    """
    from shards.schema import check_boxes  # pydantic, which a process that writes shards starts without

    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("it is not valid JSON") from None
    stored = check_boxes(content)
    boxes = np.array(stored.boxes, np.float32).reshape(-1, 4)
    if (boxes[:, :2] >= boxes[:, 2:]).any() or (boxes[:, 2:] > np.array(size, np.float32)).any():
        raise InputError(f"a box is not within the image of {size[0]} x {size[1]} pixels")
    labels = np.array(stored.labels, np.int64)
    if (labels >= classes).any():
        raise InputError(f"a box is of class number {labels.max()}, but there are {classes} classes")
    area = np.array(stored.area, np.float32)
    segments = None if stored.segments is None else _segments(stored.segments)
    return Boxes(boxes, labels, np.array(stored.crowd, bool), area, size, segments)


def _segments(stored: Sequence[Any]) -> tuple[Segment | None, ...]:
    """Outlines as :func:`_plain` gives them."""
    left = MOST_POINTS
    found: list[Segment | None] = []
    for place, one in enumerate(stored):
        if one is None:
            found.append(None)
            continue
        try:
            if isinstance(one, dict):
                height, width = map(int, one["size"])
                found.append(Runs(height, width, str(one["counts"])))
                continue
            parts = tuple(np.array(part, np.float64).reshape(-1, 2) for part in one)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise InputError(f"segments.{place}: neither polygons nor run lengths") from None
        left -= sum(map(len, parts))
        if left < 0:
            raise InputError(f"segments: polygons of more than {MOST_POINTS} points")
        if any(len(part) < 3 or not (np.abs(part) <= FARTHEST).all() for part in parts):
            raise InputError(f"segments.{place}: a polygon is not three or more points in the image")
        found.append(Polygons(parts))
    return tuple(found)
