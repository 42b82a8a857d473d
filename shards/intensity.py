"""What is black and what is white in images of more than 8 bits a channel: one rule for a whole dataset.

Values of all such images share one window, from ``black`` to ``white``, so that one image's brightness stays
comparable with another's. It reaches from the 0.1 % to the 99.9 % quantile of all their pixels, every image
weighing alike; images whose values span more than four times what the median image's do are left out of the
estimate, so that a hot pixel, or one image of another kind, does not darken all others. Images of floats
between 0 and 1 are a kind of their own, with a window of their own. Labels play no part, nor do splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

Kind = Literal["values", "unit"]
Window = tuple[float, float]  # black, white: in the images' own units
PROBABILITIES = np.array([0, 0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999, 1])
LOW, HIGH = 2, 8  # places of 1 % and 99 % among them
TAIL = 0.001  # of all pixels, darker than black, and as many brighter than white
FAR = 4.0  # times the median image's span: values of another scale
LITTLE = 0.25  # of the range from black to white: less, and images are nearly of one grey
MEASURED = 1 << 20  # pixels of an image that are looked at
BYTE = 255


@dataclass(frozen=True)
class Deep:
    """Pixels of more than 8 bits a channel.

    Attributes:
        values: (H, W) or (H, W, 3), whole numbers or floats in the image's own units; NaN: no value, black.
        inverted: the least value is white.
    """

    values: np.ndarray
    inverted: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.values.shape[1], self.values.shape[0]


@dataclass(frozen=True)
class Levels:
    """How an image's values are distributed: their quantiles at ``PROBABILITIES``."""

    kind: Kind
    quantiles: tuple[float, ...]
    whole: bool  # numbers, not floats

    @property
    def span(self) -> float:
        """From the 1 % to the 99 % quantile."""
        return self.quantiles[HIGH] - self.quantiles[LOW]


def measure(deep: Deep) -> Levels:
    """The distribution of an image's values; pixels without a value do not count."""
    values = deep.values.ravel()
    values = values[:: max(1, len(values) // MEASURED)]
    whole = values.dtype.kind in "iu"
    if not whole:
        values = values[~np.isnan(values)]
    if not len(values):
        values = np.zeros(1)
    unit = not whole and values.min() >= 0 and values.max() <= 1
    quantiles = np.quantile(values.astype(np.float64), PROBABILITIES)
    return Levels("unit" if unit else "values", tuple(float(value) for value in quantiles), whole)


def windows(levels: Sequence[Levels], given: Window | None = None) -> dict[Kind, Window]:
    """The window of each kind of images that there is.

    Args:
        levels: of the images of more than 8 bits.
        given: what the user says that black and white are, for all of them.
    """
    found: dict[Kind, Window] = {}
    kinds: tuple[Kind, ...] = ("values", "unit")
    for kind in kinds:
        chosen = [one for one in levels if one.kind == kind]
        if chosen:
            found[kind] = given or _estimate(chosen)
    return found


def outliers(levels: Sequence[Levels]) -> np.ndarray:
    """Which images' values span much more than the median image's do: (N,) bool."""
    spans = np.array([one.span for one in levels])
    typical = np.median(spans[spans > 0]) if (spans > 0).any() else 0.0
    ends = np.array([[one.quantiles[1], one.quantiles[-2]] for one in levels])
    centre = np.median(ends, axis=0)
    reach = np.maximum(centre[0] - ends[:, 0], ends[:, 1] - centre[1])
    far = (spans > FAR * typical) | (reach > FAR * max(typical, centre[1] - centre[0]))
    return far & (typical > 0)


def _estimate(levels: Sequence[Levels]) -> Window:
    far = outliers(levels)
    inliers = [one for one, away in zip(levels, far) if not away] or list(levels)
    table = np.array([one.quantiles for one in inliers])
    black, white = _pooled(table, TAIL), _pooled(table, 1 - TAIL)
    if (
        all(one.whole for one in inliers)
        and table.min() >= 0
        and table.max() <= BYTE
        and white > BYTE * LITTLE
    ):
        return 0.0, float(BYTE)  # 8-bit values in wider files
    return (black, white) if white > black else (black, black + 1)


def _pooled(table: np.ndarray, probability: float) -> float:
    """A quantile of all pixels of images, each weighing alike.

    Args:
        table: (N, L) quantiles at ``PROBABILITIES``, between which values are taken to be spread evenly.
    """
    low, high = float(table.min()), float(table.max())
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        if _share_below(table, middle) < probability:
            low = middle
        else:
            high = middle
    return _plain((low + high) / 2)


def _share_below(table: np.ndarray, value: float) -> float:
    """The share of pixels up to a value, each image weighing alike."""
    starts, ends = table[:, :-1], table[:, 1:]
    widths = ends - starts
    within = np.where(widths > 0, (value - starts) / np.where(widths > 0, widths, 1), value >= starts)
    return float((np.clip(within, 0, 1) * np.diff(PROBABILITIES)).sum(axis=1).mean())


def _plain(value: float) -> float:
    """Rounded to six digits: what is written down can be read, and typed."""
    return float(f"{value:.6g}")


def show(deep: Deep, known: Mapping[Kind, Window] | None = None) -> Image.Image:
    """An image of more than 8 bits as RGB or L: ``black`` and less is 0, ``white`` and more 255.

    Args:
        known: the window of each kind; without one, the image's own quantiles.
    """
    levels = measure(deep)
    own = (levels.quantiles[1], levels.quantiles[-2])
    black, white = (known or {}).get(levels.kind, own)
    width = white - black
    scaled = (deep.values.astype(np.float64) - black) * (BYTE / (width if width > 0 else 1))
    grey = np.clip(scaled, 0, BYTE)
    if deep.inverted:
        grey = BYTE - grey
    return Image.fromarray(np.rint(np.nan_to_num(grey, nan=0.0)).astype(np.uint8))


def used_share(levels: Levels, window: Window) -> float:
    """How much of the range from black to white an image uses, between its 1 % and 99 % quantiles."""
    low, high = np.clip([levels.quantiles[LOW], levels.quantiles[HIGH]], *window)
    return float((high - low) / (window[1] - window[0]))


def byte_span(grey: Image.Image) -> int:
    """Grey values between the 1 % and the 99 % quantile of an image in mode L."""
    below = np.cumsum(grey.histogram())
    low, high = np.searchsorted(below, [0.01 * below[-1], 0.99 * below[-1]])
    return int(high - low)
