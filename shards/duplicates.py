"""Images that are in the set more than once: identical pixels, and pictures that look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_DISTANCE = 6  # of 64 bits of the difference hash
MIN_CORRELATION = 0.995  # between the thumbnails of two pictures whose hashes are near
LISTED = 1000  # near-duplicates named in the report
BLOCK = 2048


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

    Two pictures are near if their 64-bit difference hashes differ in at most 6 bits and their grey thumbnails
    correlate by at least 0.995. The Hamming distance of all pairs comes from one matrix product of hashes
    written as ±1, as distance = (64 - product) / 2.

    Args:
        hashes: (N,) difference hashes.
        thumbnails: (N, P) uint8 grey thumbnails.
        splits: (N,) names.
        pixel_hashes: (N,) of the pixels.

    Returns:
        The pairs, nearest first, at most 1000; and how many there are in all.
    """
    words = np.array(hashes, ">u8").view(np.uint8).reshape(-1, 8)
    signs = np.unpackbits(words, axis=1).astype(np.float32) * 2 - 1
    grey = thumbnails.astype(np.float32)
    grey -= grey.mean(1, keepdims=True)
    grey /= np.maximum(np.linalg.norm(grey, axis=1, keepdims=True), 1e-6)
    names = np.array(splits)
    pixels = np.array(pixel_hashes)
    pairs: list[Pair] = []
    total = 0
    present = sorted(set(splits))
    for number, one in enumerate(present):
        for other in present[number + 1 :]:
            left, right = np.flatnonzero(names == one), np.flatnonzero(names == other)
            for start in range(0, len(left), BLOCK):
                for begin in range(0, len(right), BLOCK):
                    rows, columns = left[start : start + BLOCK], right[begin : begin + BLOCK]
                    product = signs[rows] @ signs[columns].T
                    a, b = np.nonzero(product >= 64 - 2 * MAX_DISTANCE)
                    if not len(a):
                        continue
                    distance = ((64 - product[a, b]) / 2).astype(int)
                    a, b = rows[a], columns[b]
                    alike = np.einsum("ij,ij->i", grey[a], grey[b])
                    keep = (alike >= MIN_CORRELATION) & (pixels[a] != pixels[b])
                    total += int(keep.sum())
                    found = zip(a[keep], b[keep], distance[keep], alike[keep])
                    pairs += [Pair(int(i), int(j), int(d), float(c)) for i, j, d, c in found]
                    pairs = sorted(
                        pairs, key=lambda pair: (-round(pair.correlation, 6), pair.first, pair.second)
                    )
                    del pairs[LISTED:]
    return pairs, total
