"""Images that are in the set more than once: identical pixels, and pictures that look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

MIN_CORRELATION = 0.99  # between grey thumbnails
MAX_DISTANCE = 10  # of 64 bits, between difference hashes
LISTED = 1000  # near-duplicates named in the report
BLOCK = 2048  # images a side of one matrix product


@dataclass(frozen=True)
class Pair:
    """Two samples of different splits that look alike; ``distance`` in bits of 64."""

    first: int
    second: int
    distance: int
    correlation: float


def identical(pixel_hashes: Sequence[str]) -> list[list[int]]:
    """Positions of samples with identical pixels, a list for each picture that is there more than once."""
    places: dict[str, list[int]] = defaultdict(list)
    for position, value in enumerate(pixel_hashes):
        places[value].append(position)
    return [positions for positions in places.values() if len(positions) > 1]


def near(
    hashes: Sequence[int], thumbnails: np.ndarray, splits: Sequence[str], pixel_hashes: Sequence[str]
) -> tuple[list[Pair], int]:
    """Pictures in different splits that look alike but are not identical.

    Two pictures are near if their grey thumbnails correlate by at least 0.99 and their 64-bit difference
    hashes differ in at most 10 bits. That finds copies that were compressed, scaled or brightened a
    little. The hash alone would not do: in sets of one kind, such as chest X-rays, a third of all pairs
    are within 10 bits.

    Args:
        hashes: (N,) difference hashes.
        thumbnails: (N, P) uint8 grey thumbnails.
        splits: (N,) names.
        pixel_hashes: (N,) of the pixels.

    Returns:
        The pairs, most alike first, at most 1000; and how many there are in all.
    """
    bits = np.unpackbits(np.array(hashes, ">u8").view(np.uint8).reshape(-1, 8), axis=1)
    grey = thumbnails.astype(np.float32)
    grey -= grey.mean(1, keepdims=True)
    grey /= np.maximum(np.linalg.norm(grey, axis=1, keepdims=True), 1e-6)
    names, pixels = np.array(splits), np.array(pixel_hashes)
    pairs: list[Pair] = []
    total = 0
    for rows, columns in _blocks(names):
        product = grey[rows] @ grey[columns].T
        a, b = np.nonzero(product >= MIN_CORRELATION)
        alike, a, b = product[a, b], rows[a], columns[b]
        distance = (bits[a] != bits[b]).sum(1)
        keep = np.flatnonzero((distance <= MAX_DISTANCE) & (pixels[a] != pixels[b]))
        total += len(keep)
        best = keep[np.argsort(-alike[keep], kind="stable")][:LISTED]
        found = zip(a[best], b[best], distance[best], alike[best])
        pairs += [Pair(int(i), int(j), int(d), round(float(c), 4)) for i, j, d, c in found]
        pairs = sorted(pairs, key=lambda pair: (-pair.correlation, pair.first, pair.second))[:LISTED]
    return pairs, total


def _blocks(splits: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (rows, columns) of blocks that cover every pair of samples in different splits once."""
    places = [np.flatnonzero(splits == name) for name in sorted(set(splits.tolist()))]
    for left, right in combinations(places, 2):
        for start in range(0, len(left), BLOCK):
            for begin in range(0, len(right), BLOCK):
                yield left[start : start + BLOCK], right[begin : begin + BLOCK]
