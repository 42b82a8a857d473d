"""Images of any shape as squares of one size, and where in its square an image lies."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from shards import IGNORE
from shards.codec import strips

Fit = Literal["squash", "crop", "pad"]
PIXELS = 1  # raise it where the same image comes out with other pixels: what is kept on disk is made anew
PIECE = 1 << 20  # bytes of pixels that go from Pillow to torch at once


def square(
    image: Image.Image, size: int, fit: Fit, *, width: float | None = None, height: float | None = None
) -> np.ndarray:
    """Resize an image to a square, antialiased, bicubic.

    Args:
        image: mode RGB.
        size: side in pixels.
        fit: ``squash`` ignores the shape, ``crop`` keeps the centre, ``pad`` adds black.
        width, height: how much of the image to take, from its upper left corner, in its pixels; default: all.

    Returns:
        (3, size, size) uint8.
    """
    wide, high = width or image.width, height or image.height
    if fit == "crop" and wide != high:  # torch's kernel knows no box
        side = min(wide, high)
        left, top = (wide - side) / 2, (high - side) / 2
        box = (left, top, left + side, top + side)
        cropped = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.asarray(cropped).transpose(2, 0, 1)
    room = _room(wide, high, size) if fit == "pad" else (size, size)
    pixels = _resized(image, room, wide, high)
    if room == (size, size):
        return pixels
    left, top = round((size - room[0]) / 2), round((size - room[1]) / 2)
    padded = np.zeros((3, size, size), np.uint8)
    padded[:, top : top + room[1], left : left + room[0]] = pixels
    return padded


def _resized(image: Image.Image, room: tuple[int, int], wide: float, high: float) -> np.ndarray:
    """The upper left ``wide`` x ``high`` pixels of an RGB image in ``room`` (width, height): (3, H, W) uint8.

    By torch's kernel for bytes, which takes a fifth of Pillow's time. It gives the same bits with any set of
    the CPU's instructions, and Pillow's values but for rounding: between the passes over rows and over
    columns too, which Pillow makes in the other order in some images.
    """
    array = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in strips(image, PIECE):
        array[top : top + strip.height] = np.asarray(strip)
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
    scales = room[1] / high, room[0] / wide  # interpolate() would take a size or scales, not both
    resized = torch.ops.aten._upsample_bicubic2d_aa(pixels, [room[1], room[0]], False, *scales)
    return resized[0].numpy()


def square_mask(mask: np.ndarray, size: int, fit: Fit) -> np.ndarray:
    """Resize a mask as :func:`square` resizes its image, by nearest neighbours; ``pad`` adds IGNORE.

    Args:
        mask: (H, W) uint8 class numbers.

    Returns:
        (size, size) uint8.
    """
    image = Image.fromarray(mask)
    if fit == "squash":
        image = image.resize((size, size), Image.Resampling.NEAREST)
    elif fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.NEAREST)
    else:
        image = image.resize(_room(*image.size, size), Image.Resampling.NEAREST)
        image = ImageOps.pad(image, (size, size), Image.Resampling.NEAREST, color=IGNORE)
    return np.asarray(image)


def _room(width: float, height: float, size: int) -> tuple[int, int]:
    """The pixels that an image takes in a square that it is padded to."""
    longest = max(width, height)
    return max(1, round(width / longest * size)), max(1, round(height / longest * size))


def extent(width: int, height: int, size: int, fit: Fit) -> tuple[float, float, float, float]:
    """Where the whole of an image lies in its square: left, top, right, bottom as shares of the side.

    The square is from 0 to 1. What ``crop`` cuts off lies outside, what ``pad`` adds beyond the image.
    """
    if fit == "squash":
        return 0.0, 0.0, 1.0, 1.0
    if fit == "crop":
        wide, high = width / min(width, height), height / min(width, height)
        return (1 - wide) / 2, (1 - high) / 2, (1 + wide) / 2, (1 + high) / 2
    wide, high = _room(width, height, size)
    left, top = round((size - wide) / 2), round((size - high) / 2)
    return left / size, top / size, (left + wide) / size, (top + high) / size
