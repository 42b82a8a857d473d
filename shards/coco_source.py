"""Detection sets as in COCO: one JSON file, or one a split, with images, categories and annotations."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.boxes import FARTHEST, Instance, Instances
from shards.errors import InputError
from shards.files import read_regular
from shards.layout import Part, beside, gaps, parts, path_below, safe
from shards.segments import Polygons, Runs, Segment, polygon_area, run_lengths, runs_text
from shards.sources import Listing, Sample, below, existing_folder, object_classes, walk

Json = dict[str, Any]


@dataclass(frozen=True)
class CocoSource:
    """Images and objects that a JSON file lists.

    ``{split}`` in ``annotations`` (and in ``images``, where each split has its folder) gives splits, as in
    ``annotations/instances_{split}2017.json`` and ``{split}2017``. An image that the file lists without
    objects has none; an image that it does not list is unlabelled.

    Attributes:
        root: the folder that both are below.
        images: the folder that the file names in the JSON file are below.
        annotations: the JSON file.
        classes: names and order of the classes; the categories that have objects, by their ids, where None.
    """

    root: str | Path
    images: str = "images"
    annotations: str = "annotations.json"
    classes: Sequence[str] | None = None

    @property
    def base(self) -> Path | None:
        return Path(self.root)

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """All images with their objects.

        Raises:
            InputError: a missing folder or file, something missing or wrong in the file, with the id.
        """
        root = existing_folder(self.root)
        found = parts(root, self.images, self.annotations, key="annotations")
        samples: dict[str, Sample] = {}
        categories: dict[str, Any] = {}  # name → id, of the first file that has it
        for part in found:
            if not os.path.exists(part.annotations):
                continue  # its images are unlabelled
            content = _Content(part.annotations, path_below(root, part.annotations))
            for name, number in content.categories().items():
                categories.setdefault(name, number)
            for file_name, instances in content.images():
                location = part.images / file_name
                path = path_below(root, location)
                if path in samples:
                    raise InputError(f"{content.where} lists {path}, which is listed already")
                samples[path] = Sample(path, location, split=part.split, annotation=instances)
        order = sorted(categories, key=lambda name: _id_order(categories[name]))
        classes = object_classes(list(samples.values()), self.classes, order)
        ignored: Counter[str] = Counter()
        unlisted = _unlisted(root, found, set(samples), exclude, ignored)
        notes = gaps("annotation", [sample.path for sample in unlisted])
        notes += beside(root, self.images, found, exclude)
        if empty := [name for name in order if name not in classes]:
            notes.append(f"categories without any object are left out: {', '.join(empty[:10])}")
        everything = sorted([*samples.values(), *unlisted], key=lambda sample: sample.path)
        return Listing("detection", classes, everything, dict(sorted(ignored.items())), notes)


def _unlisted(
    root: Path, found: Sequence[Part], listed: set[str], exclude: Sequence[Path], ignored: Counter[str]
) -> list[Sample]:
    """Images in the folders that no JSON file lists; in a folder of several splits they join train."""
    splits: dict[Path, list[str]] = defaultdict(list)
    for part in found:
        splits[part.images].append(part.split)
    excluded = {path.resolve() for path in exclude}
    samples = []
    for folder, of in splits.items():
        for path in walk(folder, ignored):
            name = path_below(root, path)
            if name not in listed and not below(path, excluded):
                samples.append(Sample(name, path, labelled=False, split=of[0] if len(of) == 1 else "train"))
    return samples


def _id_order(number: Any) -> tuple[bool, Any]:
    return isinstance(number, str), number


@dataclass
class _Content:
    """One JSON file; ``where`` is what errors call it."""

    path: Path
    where: str
    json: Json = field(init=False)

    def __post_init__(self) -> None:
        try:
            content = json.loads(read_regular(self.path))
        except OSError as error:
            raise InputError(f"{self.where} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{self.where} is not valid JSON") from None
        except MemoryError:
            raise InputError(f"{self.where} is too large for the memory") from None
        if not isinstance(content, dict):
            raise InputError(f"{self.where} is no COCO file: it is not a JSON object")
        self.json = content

    def categories(self) -> dict[str, Any]:
        """Name → id."""
        found: dict[str, Any] = {}
        for number, category in self._by_id("categories").items():
            name = _text(category, "name", f"{self.where}: category {number}")
            if name in found:
                raise InputError(f"{self.where}: categories {found[name]} and {number} are both '{name}'")
            found[name] = number
        return found

    def images(self) -> list[tuple[str, Instances]]:
        """File name and objects of each image, in the order of the file."""
        images = self._by_id("images")
        names = {number: name for name, number in self.categories().items()}
        objects: dict[Any, list[Instance]] = {number: [] for number in images}
        for place, one in enumerate(self._list("annotations")):
            where = f"{self.where}: annotation {one.get('id', f'at place {place}')}"
            image, category = one.get("image_id"), one.get("category_id")
            for key, value, known in (("image_id", image, images), ("category_id", category, names)):
                if not isinstance(value, int | str) or value not in known:
                    raise InputError(f"{where}: {key} is {value!r:.100}, which is not in the file")
            objects[image].append(_instance(one, names[category], where))
        found = []
        for number, image in images.items():
            where = f"{self.where}: image {number}"
            name = str(safe(_text(image, "file_name", where), f"{where}: file_name"))
            size = _size(image, where)
            found.append((name, Instances(f"{self.where} (image {name})", tuple(objects[number]), size)))
        return found

    def _list(self, key: str) -> list[Json]:
        values = self.json.get(key)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise InputError(f"{self.where} is no COCO file: it has no list of {key}")
        return values

    def _by_id(self, key: str) -> dict[Any, Json]:
        found: dict[Any, Json] = {}
        for value in self._list(key):
            number = value.get("id")
            if not isinstance(number, int | str):
                raise InputError(f"{self.where}: {key} have the id {number!r:.100}, expected a number")
            if number in found:
                raise InputError(f"{self.where}: two of its {key} have the id {number}")
            found[number] = value
        return found


def _text(entry: Json, key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} is {value!r:.100}, expected a text")
    return value.strip()


def _size(image: Json, where: str) -> tuple[int, int] | None:
    """(width, height) as the file says, if it does (0: some programs do not know it)."""
    width, height = image.get("width") or 0, image.get("height") or 0
    for value in (width, height):
        if not isinstance(value, int) or value < 0:
            raise InputError(f"{where}: width or height is {value!r:.100}, expected pixels")
    return (width, height) if width and height else None


def _instance(one: Json, label: str, where: str) -> Instance:
    segment = _segment(one.get("segmentation"), where)
    if one.get("bbox") is not None:
        x, y, width, height = _numbers(one["bbox"], f"{where}: bbox", 4)
        box = x, y, x + width, y + height
    else:
        box = _extent(segment, where)
    crowd, area = one.get("iscrowd", 0), one.get("area")
    if crowd not in (0, 1):
        raise InputError(f"{where}: iscrowd is {crowd!r:.100}, expected 0 or 1")
    if area is not None:
        (area,) = _numbers([area], f"{where}: area", 1, most=FARTHEST**2)
    elif isinstance(segment, Polygons):
        area = sum(map(polygon_area, segment.parts))
    return Instance(label, box, bool(crowd), max(area, 0) if area else None, segment)


def _numbers(values: Any, what: str, length: int | None = None, *, most: float = FARTHEST) -> list[float]:
    """A list of finite numbers, none farther from 0 than ``most``."""
    sound = isinstance(values, list) and length in (None, len(values))
    # NaN is not <= anything
    if not sound or not all(isinstance(value, int | float) and abs(value) <= most for value in values):
        expected = {None: "numbers", 1: "a number"}.get(length, f"{length} numbers")
        raise InputError(f"{what} is {values!r:.100}, expected {expected}")
    return [float(value) for value in values]


def _extent(segment: Segment | None, where: str) -> tuple[float, float, float, float]:
    if not isinstance(segment, Polygons):
        raise InputError(f"{where}: bbox is missing")
    points = np.concatenate(segment.parts)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    return left, top, right, bottom


def _segment(given: Any, where: str) -> Segment | None:
    """Polygons of three or more points; run lengths, as numbers or as text; else none."""
    what = f"{where}: segmentation"
    if isinstance(given, Mapping):
        size, counts = given.get("size"), given.get("counts")
        if not isinstance(size, list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise InputError(f"{what}: size is {size!r:.100}, expected [height, width]")
        if isinstance(counts, list):
            numbers = _numbers(counts, f"{what}: counts", most=FARTHEST**2)
            if any(number < 0 or number % 1 for number in numbers):
                raise InputError(f"{what}: counts are not whole numbers from 0 on")
            counts = runs_text(np.array(numbers, np.int64))
        if not isinstance(counts, str):
            raise InputError(f"{what}: counts is {counts!r:.100}, expected a text or numbers")
        runs = Runs(size[0], size[1], counts)
        try:
            run_lengths(runs)
        except InputError as error:
            raise InputError(f"{what}: {error}") from None
        return runs
    if given is None:
        return None
    if not isinstance(given, list):
        raise InputError(f"{what} is {given!r:.100}, expected polygons or run lengths")
    parts = [np.reshape(_coordinates(part, what), (-1, 2)) for part in given]
    parts = [part for part in parts if len(part) >= 3]
    return Polygons(tuple(parts)) if parts else None


def _coordinates(part: Any, what: str) -> list[float]:
    values = _numbers(part, f"{what}: a polygon")
    if len(values) % 2:
        raise InputError(f"{what}: a polygon has {len(values)} numbers, expected pairs of x and y")
    return values
