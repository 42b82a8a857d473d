"""Detection sets as in Pascal VOC: an XML file beside each image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from shards.boxes import FARTHEST, MOST_BYTES, Instance, Instances
from shards.errors import InputError
from shards.files import read_regular
from shards.layout import beside, gaps, pairs, parts, path_below
from shards.sources import Listing, Sample, existing_folder, object_classes

DEEPEST = 100  # elements within each other


@dataclass(frozen=True)
class VocSource:
    """Images and XML files of the same relative names, as ``JPEGImages/1.jpg`` and ``Annotations/1.xml``.

    Split folders below both, or ``{split}`` in both paths, give splits. An image without an XML file is
    unlabelled; an XML file without objects says that there are none. VOC counts pixels from 1, with both
    ends: xmin 1 and xmax 2 become the box from 0 to 2. Objects that are ``difficult`` become crowds.

    Attributes:
        root: the folder that both are below.
        images, annotations: the two folders.
        classes: names and order of the classes; those found, sorted, where None.
    """

    root: str | Path
    images: str = "JPEGImages"
    annotations: str = "Annotations"
    classes: Sequence[str] | None = None

    @property
    def base(self) -> Path | None:
        return Path(self.root)

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """All images with their objects.

        Raises:
            InputError: a missing folder, no image with an XML file, an XML file that is none or lacks
                something, a name that is not in ``classes``.
        """
        root = existing_folder(self.root)
        samples: list[Sample] = []
        left: list[str] = []
        ignored: Counter[str] = Counter()
        passed: Counter[str] = Counter()
        given = parts(root, self.images, self.annotations, key="annotations")
        for part in given:
            found = pairs(part, (".xml",), exclude, ignored, passed)
            left += [path_below(root, path) for path in found.left]
            for path, files in found.found:
                known = read_objects(files[0], path_below(root, files[0])) if files else None
                name = path_below(root, path)
                samples.append(Sample(name, path, labelled=bool(files), split=part.split, annotation=known))
        without = [sample.path for sample in samples if not sample.labelled]
        if len(without) == len(samples):
            raise InputError(f"no image in {root / self.images} has an XML file in {root / self.annotations}")
        samples.sort(key=lambda sample: sample.path)
        notes = (
            gaps("XML", without, left, passed)
            + beside(root, self.images, given, exclude)
            + _zero_based(samples)
        )
        classes = object_classes(samples, self.classes)
        return Listing("detection", classes, samples, dict(sorted(ignored.items())), notes)


def _zero_based(samples: Sequence[Sample]) -> list[str]:
    """A warning where coordinates seem to count from 0, as some programs write them."""
    known = [sample.annotation for sample in samples if isinstance(sample.annotation, Instances)]
    count = sum(min(one.box) < 0 for objects in known for one in objects.found)
    if not count:
        return []
    return [
        f"{count} boxes begin at 0, though VOC counts from 1: all boxes may be a pixel too far left and up"
    ]


def read_objects(path: Path, where: str) -> Instances:
    """The objects of one XML file, in pixels counted from 0.

    Args:
        path: the file.
        where: what errors call it.

    Raises:
        InputError: no XML, XML with a document type (which could make a few bytes into gigabytes or name
            other files), or something missing in it.
    """
    try:
        data = read_regular(path, most=MOST_BYTES)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from None
    root = _parse(data, where)
    size = tuple(_number(root.find("size"), name, where, 0) for name in ("width", "height"))
    found = []
    for one in root.findall("object"):
        label = " ".join((one.findtext("name") or "").split())
        if not label:
            raise InputError(f"{where}: an object has no name")
        box, what = one.find("bndbox"), f"{where}: {label}"
        left, top, right, bottom = (_number(box, name, what) for name in ("xmin", "ymin", "xmax", "ymax"))
        difficult = _number(one, "difficult", where, 0) != 0
        found.append(Instance(label, (left - 1, top - 1, right, bottom), crowd=difficult))
    whole = (int(size[0]), int(size[1])) if min(size) >= 1 else None  # 0: some programs do not know it
    return Instances(where, tuple(found), whole)


def _number(element: Element | None, name: str, where: str, default: float | None = None) -> float:
    text = element.findtext(name) if element is not None else None
    if text is None and default is not None:
        return default
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not abs(number) <= FARTHEST:
        raise InputError(f"{where}: {name} is '{text or ''}', expected a number")
    return number


def _parse(data: bytes, where: str) -> Element:
    """The tree of an XML text without a document type, and so without entities of its own."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    depth = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise InputError(f"{where} is nested deeper than {DEEPEST} elements")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise InputError(f"{where} has a document type (<!DOCTYPE …>), which is not read")

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # ValueError: of an unknown encoding
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is no XML: {error}") from None
    return builder.close()
