"""Outlines of objects: polygons, and run lengths as COCO writes them; both become masks.

Run lengths count pixels down the columns, background first; their text form is COCO's: each number, from the
fourth on less the one two places before it, in groups of 5 bits, lowest first, a group a character from '0'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.errors import InputError

MOST_POINTS = 1_000_000  # of the polygons of one image
CROSSINGS = 1 << 20  # of edges and rows that are computed at once
GROUPS = 7  # of 5 bits in a number: more than any image within Pillow's limit of pixels needs


@dataclass(frozen=True)
class Runs:
    """Run lengths of a mask of ``height`` x ``width`` pixels, as COCO's text."""

    height: int
    width: int
    counts: str


@dataclass(frozen=True, eq=False)
class Polygons:
    """The union of some polygons: each (P, 2) float64, x and y in pixels, P at least 3."""

    parts: tuple[np.ndarray, ...]


Segment = Runs | Polygons


def to_runs(mask: np.ndarray) -> Runs:
    """Run lengths of a mask: (H, W) bool."""
    flat = mask.ravel(order="F")
    bounds = np.flatnonzero(np.diff(flat, prepend=False))  # where a run begins, but for the first
    counts = np.diff(np.concatenate([[0], bounds, [flat.size]]))
    return Runs(mask.shape[0], mask.shape[1], runs_text(counts))


def runs_text(counts: np.ndarray) -> str:
    """Run lengths, int (N,), as COCO's text."""
    less = np.array(counts, np.int64)
    less[3:] -= np.asarray(counts, np.int64)[1:-2]
    text = bytearray()
    for number in less.tolist():
        more = True
        while more:
            group = number & 31
            number >>= 5
            more = number != (-1 if group & 16 else 0)
            text.append(48 + (group | 32 * more))
    return text.decode()


def run_lengths(runs: Runs) -> np.ndarray:
    """The numbers in COCO's text, int64 (N,).

    Raises:
        InputError: no such text, or its sum is not ``height * width``.
    """
    pixels = runs.height * runs.width
    if not 0 < pixels <= (Image.MAX_IMAGE_PIXELS or np.inf) or min(runs.height, runs.width) < 1:
        raise InputError(f"run lengths of {runs.width} x {runs.height} pixels")
    if len(runs.counts) > GROUPS * (pixels + 2):
        raise InputError(f"more run lengths than {runs.width} x {runs.height} pixels can have")
    codes = np.frombuffer(runs.counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise InputError("run lengths that are not in COCO's form")
    last = np.flatnonzero(codes & 32 == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() >= GROUPS:
        raise InputError("run lengths with a number too large")
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    counts = np.add.reduceat((codes & 31) << (5 * place), first)
    counts -= np.where(codes[last] & 16, 1 << (5 * (last - first + 1)), 0)  # below zero
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    if counts.min() < 0 or counts.max() > pixels or counts.sum() != pixels:
        raise InputError(f"run lengths that do not add up to {runs.width} x {runs.height} pixels")
    return counts


def scaled(segment: Segment, size: tuple[int, int], wanted: tuple[int, int]) -> Segment:
    """An outline after a resizing from ``size`` to ``wanted`` (width, height). Raises InputError."""
    if isinstance(segment, Runs):
        _check_size(segment, size)
    if size == wanted:
        return segment
    if isinstance(segment, Runs):
        return to_runs(drawn(segment, size, wanted[1], wanted[0]))
    factors = np.divide(wanted, size)
    return Polygons(tuple(part * factors for part in segment.parts))


def drawn(segment: Segment, size: tuple[int, int], height: int, width: int) -> np.ndarray:
    """The mask of an outline: a pixel is in it if its centre is.

    Args:
        segment: in pixels of an image of ``size``.
        size: (width, height) of that image.
        height, width: of the mask; other than ``size``, it is scaled (run lengths: nearest neighbour).

    Returns:
        (height, width) bool.

    Raises:
        InputError: run lengths that are broken or of another size.
    """
    if isinstance(segment, Runs):
        _check_size(segment, size)
        counts = run_lengths(segment)
        values = np.arange(len(counts), dtype=np.uint8) & 1
        mask = np.repeat(values, counts).astype(bool).reshape(segment.width, segment.height).T
        if size == (width, height):
            return mask
        return mask[_nearest(height, segment.height)][:, _nearest(width, segment.width)]
    mask = np.zeros((height, width), bool)
    for part in segment.parts:
        _fill(mask, part * np.divide((width, height), size))
    return mask


def _check_size(runs: Runs, size: tuple[int, int]) -> None:
    if (runs.width, runs.height) != size:
        what = f"run lengths of {runs.width} x {runs.height} pixels"
        raise InputError(f"{what} on an image of {size[0]} x {size[1]}")


def _nearest(wanted: int, size: int) -> np.ndarray:
    """Which of ``size`` pixels each of ``wanted`` takes (as Pillow does it): by the place of its centre."""
    return np.minimum(((np.arange(wanted) + 0.5) * (size / wanted)).astype(np.int64), size - 1)


def _fill(mask: np.ndarray, points: np.ndarray) -> None:
    """Add a polygon (P, 2) to a mask (H, W) bool, by the even-odd rule at the pixels' centres."""
    height, width = mask.shape
    columns = np.clip(np.ceil(points[:, 0] - 0.5), 0, width).astype(np.int64)
    left, right = int(columns.min()), int(columns.max())
    x, y = points[:, 0], points[:, 1]
    x_next, y_next = np.roll(x, -1), np.roll(y, -1)
    first = np.clip(np.ceil(np.minimum(y, y_next) - 0.5), 0, height).astype(np.int64)
    rows = np.clip(np.ceil(np.maximum(y, y_next) - 0.5), 0, height).astype(np.int64) - first
    top, bottom = int(first.min()), int((first + rows).max())
    if left == right or top == bottom:
        return
    flips = np.zeros((bottom - top, right - left + 1), np.uint8)
    for edges in _blocks(np.flatnonzero(rows), rows):
        edge = np.repeat(edges, rows[edges])
        within = np.arange(len(edge)) - np.repeat(np.cumsum(rows[edges]) - rows[edges], rows[edges])
        row = first[edge] + within
        slope = (x_next[edge] - x[edge]) / (y_next[edge] - y[edge])
        crossing = x[edge] + (row + 0.5 - y[edge]) * slope
        column = np.clip(np.ceil(crossing - 0.5), left, right).astype(np.int64)
        np.bitwise_xor.at(flips, (row - top, column - left), np.uint8(1))
    inside = np.bitwise_xor.accumulate(flips[:, :-1], axis=1).astype(bool)
    mask[top:bottom, left:right] |= inside


def _blocks(edges: np.ndarray, rows: np.ndarray) -> Sequence[np.ndarray]:
    """The edges in blocks that cross few rows together (an edge alone crosses no more than the mask has)."""
    block = np.cumsum(rows[edges]) // CROSSINGS
    return np.split(edges, np.flatnonzero(np.diff(block)) + 1)


def polygon_area(points: np.ndarray) -> float:
    """Of one polygon (P, 2), in square pixels."""
    x, y = points[:, 0], points[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
