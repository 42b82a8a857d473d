"""The written digits that come with scikit-learn: a set that needs no download, to try everything on."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shards.masks import MaskFile, MaskValues
from shards.sources import Listing, Sample

SIDE = 8  # pixels of a digit
BLACK = 16  # its greatest grey value
INK = 4  # from this grey value on a pixel belongs to the digit
ACROSS = 2  # digits of a page, along each side


@dataclass(frozen=True)
class DigitsSource:
    """The 1,797 grey 8 x 8 images, labelled 0 to 9."""

    @property
    def base(self) -> Path | None:
        return None

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """All digits; they have no splits and no groups (their writers are not recorded)."""
        samples = []
        for number, (pixels, target) in enumerate(zip(*_digits())):
            samples.append(Sample(f"{target}/{number:04d}.png", None, (str(target),), data=_grey(pixels)))
        samples.sort(key=lambda sample: sample.path)
        return Listing("multiclass", [str(digit) for digit in range(10)], samples)


@dataclass(frozen=True)
class DigitPagesSource:
    """449 pages of 2 x 2 digits, 16 x 16 pixels, with masks: which digit the ink of each pixel belongs to."""

    @property
    def base(self) -> Path | None:
        return None

    def listing(self, *, exclude: Sequence[Path] = ()) -> Listing:
        """Every page of four digits in the order of the set; the last digit is left over."""
        images, targets = _digits()
        each = ACROSS**2
        samples = []
        for number in range(len(images) // each):
            some = slice(number * each, (number + 1) * each)
            page = _page(images[some])
            digits = np.kron(targets[some].reshape(ACROSS, ACROSS), np.ones((SIDE, SIDE), np.int64))
            mask = np.where(page >= INK, digits + 1, 0).astype(np.uint8)
            name = f"{number:04d}.png"
            file = MaskFile(f"masks/{name}", None, data=_png(mask))
            samples.append(Sample(f"images/{name}", None, data=_grey(page), annotation=file))
        classes = {"paper": 0} | {str(digit): digit + 1 for digit in range(10)}
        return Listing("segmentation", [], samples, mask_values=MaskValues(classes))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """(N, 8, 8) grey values 0 to 16, and (N,) digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


def _page(images: np.ndarray) -> np.ndarray:
    """(4, 8, 8) → (16, 16), row by row."""
    return images.reshape(ACROSS, ACROSS, SIDE, SIDE).swapaxes(1, 2).reshape(ACROSS * SIDE, ACROSS * SIDE)


def _grey(pixels: np.ndarray) -> bytes:
    return _png(np.rint(pixels * (255 / BLACK)).astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()
