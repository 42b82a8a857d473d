"""Images that are in the set more than once: with identical pixels, or as altered copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from shards import alike
from shards.annotate import Entry
from shards.sources import SPLITS, Sample

Kind = Literal["identical", "near"]


@dataclass(frozen=True)
class Copies:
    """Two images that show the same.

    Attributes:
        first, second: as they were listed, with the splits that the source gives.
        kind: "identical" pixels, or "near": an altered copy.
        correlation: of their detail, 1 for identical pixels.
        conflict: both are labelled, and differently.
    """

    first: Sample
    second: Sample
    kind: Kind
    correlation: float
    conflict: bool


class Linked:
    """Which of some names belong together (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def root(self, name: str) -> str:
        """The name that stands for all that this one is linked to."""
        while self._parent.setdefault(name, name) != name:
            self._parent[name] = self._parent[self._parent[name]]
            name = self._parent[name]
        return name

    def link(self, first: str, second: str) -> None:
        """Put two names together; the lesser of their roots stands for both."""
        one, other = sorted((self.root(first), self.root(second)))
        self._parent[other] = one


def given_split(sample: Sample) -> str:
    """The split the source gives; samples without one are divided together with train, as one split."""
    return sample.split or "train"


def identical(entries: Sequence[Entry]) -> list[list[int]]:
    """Positions of samples with identical pixels, a list for each picture that is there more than once."""
    places: dict[str, list[int]] = defaultdict(list)
    for position, entry in enumerate(entries):
        places[entry.seen.pixel_hash].append(position)
    return [positions for positions in places.values() if len(positions) > 1]


def find(entries: Sequence[Entry]) -> list[Copies]:
    """Every image that shows what another shows.

    Of identical pixels, each image is paired with the first of them. Of altered copies, one image of each
    picture and given split is paired with those of the other picture.
    """
    pairs = [
        _copies(entries[positions[0]], entries[other], "identical", 1.0)
        for positions in identical(entries)
        for other in positions[1:]
    ]
    return pairs + list(_near(entries))


def _near(entries: Sequence[Entry]) -> Iterator[Copies]:
    pictures: dict[str, dict[str, Entry]] = {}  # pixels → split → its first image
    for entry in entries:
        pictures.setdefault(entry.seen.pixel_hash, {}).setdefault(given_split(entry.sample), entry)
    seen = [next(iter(splits.values())).seen for splits in pictures.values()]
    thumbnails = np.frombuffer(b"".join(one.thumbnail for one in seen), np.uint8)
    found = alike.find(
        thumbnails.reshape(-1, alike.SIDE, alike.SIDE),
        sides=np.array([min(one.upright) for one in seen]),
        colours=np.array([one.colour for one in seen]),
    )
    of = [list(splits.values()) for splits in pictures.values()]
    for pair in found:
        for first, second in product(of[pair.first], of[pair.second]):
            yield _copies(first, second, "near", pair.correlation)


def _copies(first: Entry, second: Entry, kind: Kind, correlation: float) -> Copies:
    """A pair; the annotations of altered copies (masks, boxes) are altered too, and do not conflict."""
    known = first.sample.labelled and second.sample.labelled
    conflict = known and first.sample.labels != second.sample.labels
    if first.measured and second.measured:
        conflict = known and kind == "identical" and first.measured.content != second.measured.content
    return Copies(first.sample, second.sample, kind, correlation, conflict)


def dropped(pairs: Iterable[Copies], *, unlabelled: bool) -> set[str]:
    """Paths to leave out, so that no picture is in two given splits: train's, then validation's.

    Args:
        pairs: in two given splits or not.
        unlabelled: leave out unlabelled images only.
    """
    paths = set()
    for pair in pairs:
        less, more = sorted((pair.first, pair.second), key=lambda sample: SPLITS.index(given_split(sample)))
        if given_split(less) != given_split(more) and not (unlabelled and less.labelled):
            paths.add(less.path)
    return paths
