"""Pixels of more than 8 bits a channel, from files that Pillow opens."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from shards.intensity import Deep

GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
PHOTOMETRIC, BITS, FORMAT = 262, 258, 339  # of TIFF
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2
_OTHER_BYTE = {
    ";16B": ";16L",
    ";16L": ";16B",
    ";16N": ";16B" if sys.byteorder == "little" else ";16L",
}


class NotDecoded(Exception):
    """Such pixels cannot be had; the message says why."""


def rawmode(image: Image.Image) -> str:
    """How the bytes of an opened image are laid out, in Pillow's words; empty where it does not say."""
    tiles: list[Any] = getattr(image, "tile", [])
    if not tiles:
        return ""
    args = tiles[0].args
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image, not loaded yet, has more than 8 bits a channel, or signed numbers.

    Pillow may give it any mode.
    """
    if image.mode in GREY or rawmode(image).endswith(tuple(_OTHER_BYTE)):
        return True
    return isinstance(image, TiffImagePlugin.TiffImageFile) and (max(_bits(image)) > 8 or _is_signed(image))


def _bits(image: TiffImagePlugin.TiffImageFile) -> tuple[int, ...]:
    return tuple(image.tag_v2.get(BITS, (1,)))


def _is_signed(image: TiffImagePlugin.TiffImageFile) -> bool:
    return SIGNED in tuple(image.tag_v2.get(FORMAT, (UNSIGNED,)))


def deep_pixels(data: bytes, image: Image.Image, formats: tuple[str, ...]) -> Deep:
    """All bits of an opened image that has more than 8 a channel, an alpha channel left out.

    Pillow gives colours of 16 bits as their upper bytes. It is asked for the lower ones too, in a second pass
    of its decoder over the same bytes.

    Args:
        data: the file.
        image: opened, not loaded.
        formats: that Pillow may try.

    Raises:
        NotDecoded: a layout that this cannot read.
    """
    layout, mode = rawmode(image), image.mode
    inverted = (
        isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    )
    if mode in GREY:
        return Deep(_grey(image), inverted)
    end = layout[-4:]
    if layout.startswith("LA;"):  # two channels of two bytes are four of one
        four = _loaded(image, "RGBA", "RGBA")
        return Deep(_joined(four[..., 0], four[..., 1]), inverted)
    if mode == "L" and isinstance(image, TiffImagePlugin.TiffImageFile) and _bits(image) == (8,):
        image.load()
        return Deep(np.asarray(image).view(np.int8), inverted)
    if mode not in ("RGB", "RGBA", "RGBX", "RGBa") or end not in _OTHER_BYTE:
        what = "in planes, or " if len(getattr(image, "tile", [])) > 1 else ""
        raise NotDecoded(f"{mode} {what}of more than 8 bits a channel, or signed, is not read")
    upper = _loaded(image, mode, layout)
    again = Image.open(io.BytesIO(data), formats=formats)
    lower = _loaded(again, mode, layout[:-4] + _OTHER_BYTE[end])
    return Deep(_joined(upper, lower)[..., :3], inverted)


def _joined(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    return upper.astype(np.uint16) << 8 | lower


def _loaded(image: Image.Image, mode: str, layout: str) -> np.ndarray:
    """The pixels of an opened image whose bytes are taken to be laid out in another way."""
    tiles = []
    for tile in getattr(image, "tile", []):
        args = (layout, *tile.args[1:]) if isinstance(tile.args, tuple) else layout
        tiles.append(tile._replace(args=args))
    image._mode = mode  # type: ignore[attr-defined]
    image.tile = tiles  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image)


def _grey(image: Image.Image) -> np.ndarray:
    unsigned = False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        unsigned = image.mode == "I" and _bits(image)[0] == 32 and not _is_signed(image)
    image.load()
    values = np.asarray(image)
    if unsigned:
        values = values.view(np.uint32)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise NotDecoded("grey values are not finite")
    return values


def tiff_layout(data: bytes) -> str:
    """How the pixels of a TIFF are laid out, for a message; empty where that cannot be told."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        bits, kind, shown = tags.get(BITS, (1,)), tags.get(FORMAT, (UNSIGNED,)), tags.get(PHOTOMETRIC)
    except Exception:  # whatever a broken file makes of it
        return ""
    return f"BitsPerSample {bits}, SampleFormat {kind}, PhotometricInterpretation {shown}"


def upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels (H, W, …) turned as an EXIF orientation from 1 to 8 says."""
    turns = {
        2: lambda: values[:, ::-1],
        3: lambda: values[::-1, ::-1],
        4: lambda: values[::-1],
        5: lambda: values.swapaxes(0, 1),
        6: lambda: np.rot90(values, -1),
        7: lambda: np.rot90(values, 2).swapaxes(0, 1),
        8: lambda: np.rot90(values, 1),
    }
    return np.ascontiguousarray(turns[orientation]()) if orientation in turns else values
