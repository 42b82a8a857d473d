"""Images of any shape as squares of one size, and where in its square an image lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

from shards import IGNORE
from shards.codec import strips

Fit = Literal["squash", "crop", "pad"]
Fill = tuple[int, int, int]
BLACK: Fill = (0, 0, 0)
PIXELS = 2  # raise it where the same image comes out with other pixels: what is kept on disk is made anew
PIECE = 1 << 20  # bytes of pixels that go from Pillow to torch at once


def square(
    image: Image.Image,
    size: int,
    fit: Fit,
    *,
    width: float | None = None,
    height: float | None = None,
    fill: Fill = BLACK,
) -> np.ndarray:
    """Resize an image to a square, antialiased, bicubic.

    Sizes and offsets are those of timm's evaluation transform with ``crop_pct`` 1, so that an exported
    model's ``create_transform`` shows the net what it was trained on: ``squash`` ignores the shape, ``crop``
    (timm's ``center``) scales the short side and keeps the centre, ``pad`` (``border``) scales the long side
    and adds a border.

    Args:
        image: mode RGB.
        size: side in pixels.
        fit: one of these.
        width, height: how much of the image to take, from its upper left corner, in its pixels; default: all.
        fill: the border's colour, 0 to 255 a channel.

    Returns:
        (3, size, size) uint8.
    """
    wide, high = width or image.width, height or image.height
    room = scaled_size(wide, high, size, fit)
    if room == (size, size):
        return _resized(image, room, wide, high)
    left, top = _offset(room[0], size), _offset(room[1], size)
    if fit == "crop":  # only the part that is kept; torch's kernel knows no box
        across, down = wide / room[0], high / room[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        cropped = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return np.asarray(cropped).transpose(2, 0, 1)
    padded = np.empty((3, size, size), np.uint8)
    padded[:] = np.array(fill, np.uint8)[:, None, None]
    padded[:, -top : room[1] - top, -left : room[0] - left] = _resized(image, room, wide, high)
    return padded


def border(mean: Sequence[float]) -> Fill:
    """The colour that timm's evaluation transform pads with: a net's mean, one value in [0, 1] a channel."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue


def scaled_size(width: float, height: float, size: int, fit: Fit) -> tuple[int, int]:
    """Width and height in pixels of the whole image before it is cropped or padded to a square."""
    if fit == "squash":
        return size, size
    if fit == "crop":  # torchvision's Resize
        short = min(width, height)
        return (size, int(size * height / short)) if width <= height else (int(size * width / short), size)
    ratio = max(height / size, width / size)  # timm's ResizeKeepRatio
    return max(1, round(width / ratio)), max(1, round(height / ratio))


def _offset(length: int, size: int) -> int:
    """Where the square begins on a side of the scaled image; negative where a border comes before it."""
    return -((size - length) // 2) if length < size else round((length - size) / 2)


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
    height, width = mask.shape
    room = scaled_size(width, height, size, fit)
    left, top = _offset(room[0], size), _offset(room[1], size)
    image = Image.fromarray(mask)
    if fit == "crop":
        across, down = width / room[0], height / room[1]
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return np.asarray(image.resize((size, size), Image.Resampling.NEAREST, box=box))
    padded = np.full((size, size), IGNORE, np.uint8)
    scaled = image.resize(room, Image.Resampling.NEAREST)
    padded[-top : room[1] - top, -left : room[0] - left] = np.asarray(scaled)
    return padded


def extent(width: int, height: int, size: int, fit: Fit) -> tuple[float, float, float, float]:
    """Where the whole of an image lies in its square: left, top, right, bottom as shares of the side.

    The square is from 0 to 1. What ``crop`` cuts off lies outside, what ``pad`` adds beyond the image.
    """
    room = scaled_size(width, height, size, fit)
    left, top = -_offset(room[0], size), -_offset(room[1], size)
    return left / size, top / size, (left + room[0]) / size, (top + room[1]) / size
