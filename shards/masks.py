"""Segmentation masks: reading their values, which value is which class, and the mask that is stored."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shards import codec
from shards.deep import GREY
from shards.errors import InputError, listed
from shards.files import read_regular

IGNORE = 255  # in a stored mask: of no class
SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # of mask files: formats that keep every value
FORMATS = ("PNG", "BMP", "TIFF")


@dataclass(frozen=True)
class MaskFile:
    """The mask of an image: its path as errors name it, and the file, or the bytes of what is no file.

    ``more``: further masks of the same image, such as one a lesion.
    """

    path: str
    location: Path | None
    data: bytes | None = None
    more: tuple[MaskFile, ...] = ()

    def values(self) -> np.ndarray:
        """The mask's values: (H, W) uint8. Of several masks, what is not 0 lies upon the zeros of the others.

        Raises:
            OSError, codec.Unreadable: a file cannot be read or decoded.
            InputError: it is no mask: of more than 8 bits, or in colour; several masks have several sizes, or
                different values at one place.
        """
        merged = self._own_values()
        for other in self.more:
            added = other._own_values()
            if added.shape != merged.shape:
                raise InputError(
                    f"masks {self.path} and {other.path} of one image have {_size(merged)} and {_size(added)}"
                    " pixels"
                )
            if ((merged != 0) & (added != 0) & (merged != added)).any():
                raise InputError(
                    f"masks {self.path} and {other.path} of one image overlap with different values: merge"
                    " them into one file"
                )
            merged = np.maximum(merged, added)
        return merged

    def _own_values(self) -> np.ndarray:
        with codec.reasons(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = codec.opened(self._read(), FORMATS)
            pages = int(getattr(image, "n_frames", 1))
            image.load()
        if pages > 1:
            raise InputError(f"mask {self.path} has {pages} pages: expected one")
        if image.mode in ("L", "P"):
            return np.asarray(image)
        if image.mode == "1":
            return np.asarray(image.convert("L"))
        if image.mode in GREY:
            depth = {"I": "of 32-bit integers", "F": "of floating-point numbers"}.get(image.mode, "16-bit")
            raise InputError(f"mask {self.path} is {depth}: expected 8-bit grey or a palette")
        channels = np.asarray(image.convert("RGBA"))
        if (channels[..., :3] != channels[..., :1]).any() or (channels[..., 3] != 255).any():
            raise InputError(
                f"mask {self.path} is in colour ({image.mode}): expected 8-bit grey or a palette"
            )
        return channels[..., 0]

    def _read(self) -> bytes:
        if self.data is not None:
            return self.data
        assert self.location is not None
        return read_regular(self.location)


def _size(values: np.ndarray) -> str:
    return f"{values.shape[1]} x {values.shape[0]}"


@dataclass(frozen=True)
class MaskValues:
    """Which value of a mask is which class.

    Attributes:
        named: class → value, as the user says; None: a class for each value that occurs.
        ignored: values of no class; None: as :func:`settle` finds usual.
    """

    named: Mapping[str, int] | None = None
    ignored: Collection[int] | None = None

    def __post_init__(self) -> None:
        named, ignored = dict(self.named or {}), list(self.ignored or ())
        values = [*named.values(), *ignored]
        for value in values:
            if not 0 <= value <= 255:
                raise InputError(f"mask value {value} is not within 0 to 255")
        for value in values:
            if values.count(value) > 1:
                raise InputError(f"mask value {value} is named twice in mask_classes and mask_ignore")
        if self.named is not None and len(named) < 2:
            raise InputError("mask_classes names fewer than two classes")


@dataclass(frozen=True)
class Settled:
    """Classes in order of their values, and ``table``: 256 bytes, value → class number or IGNORE."""

    classes: list[str]
    table: bytes
    notes: list[str]

    def named(self, values: Mapping[int, int]) -> dict[str, int]:
        """Pixels of each class that occurs, in order, from pixels of each value."""
        counts = {self.table[value]: count for value, count in values.items() if self.table[value] != IGNORE}
        return {self.classes[number]: counts[number] for number in sorted(counts)}


def settle(values: MaskValues, found: Mapping[int, str]) -> Settled:
    """Decide the classes.

    The value 255 is of no class where nothing is said about it and the classes are the values 0 to K-1,
    K at least 2: so it is in most published sets. Where it is one of only two values it is a class: such are
    binary masks. Where that leaves it open, the user is asked.

    Args:
        values: what the user says.
        found: every value that occurs → a mask in which it does.

    Raises:
        InputError: a value that is not named, a class whose value does not occur, fewer than two classes, too
            many, or an open question.
    """
    ignored, notes = _ignored(values, found)
    if values.named is None:
        named = {str(value): value for value in sorted(set(found) - ignored)}
        notes.append(f"each of the mask values {_some(named.values())} is a class (mask_classes names them)")
    else:
        named = dict(sorted(values.named.items(), key=lambda item: item[1]))
        for value in sorted(set(found) - set(named.values()) - ignored):
            raise InputError(
                f"mask {found[value]} holds the value {value}, which is none of mask_classes"
                f" ({_some(named.values())}) and not in mask_ignore"
            )
        why = "is in mask_ignore" if values.ignored else "was taken as ignored"
        _require_present(named, found, ignored, why)
    if len(named) < 2:
        only = f"only the value {_some(named.values())}" if named else "no value"
        raise InputError(f"masks hold {only}: at least two classes are needed")
    if len(named) > IGNORE:
        raise InputError(f"masks hold {len(named)} values, each a class: at most {IGNORE} are possible")
    table = bytearray([IGNORE]) * 256
    for number, value in enumerate(named.values()):
        table[value] = number
    return Settled(list(named), bytes(table), notes)


def _require_present(
    named: Mapping[str, int], found: Mapping[int, str], ignored: Collection[int], why: str
) -> None:
    """Raises InputError where no mask holds a class, with what they hold in its place."""
    left = [f"; {value}, found in {found[value]}, {why}" for value in sorted(ignored) if value in found]
    said = left[0] if left else f": they hold {_some(sorted(found))}"
    for name, value in named.items():
        if value not in found:
            raise InputError(f"no readable mask holds the value {value} of '{name}'{said}")


def _ignored(values: MaskValues, found: Mapping[int, str]) -> tuple[set[int], list[str]]:
    """Values of no class, and what the user should know of it."""
    if values.ignored is not None:
        return set(values.ignored), []
    classes = sorted(found if values.named is None else values.named.values())
    others = [value for value in classes if value != IGNORE]
    if IGNORE not in found or len(others) < 2 or IGNORE in (values.named or {}).values():
        return set(), []
    if others == list(range(len(others))):
        return {IGNORE}, ["pixels of mask value 255 are ignored (mask_classes or mask_ignore changes that)"]
    if values.named is None:
        raise InputError(
            f"masks hold the values {_some(classes)}: is 255 a class, or to be ignored? mask_classes or"
            " mask_ignore must say"
        )
    return set(), []


def _some(values: Iterable[int]) -> str:
    return listed(map(str, values)).replace("'", "")


def resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) uint8 in another size (width, height): of each pixel the nearest."""
    if values.shape == (size[1], size[0]):
        return values
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def content_hash(values: np.ndarray) -> str:
    """SHA-256 over a mask's size and values."""
    head = f"{values.shape[1]}x{values.shape[0]}:".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()


def to_png(values: np.ndarray, table: bytes) -> bytes:
    """The content of ``KEY.mask.png``: 8-bit grey, class numbers."""
    out = io.BytesIO()
    Image.fromarray(np.frombuffer(table, np.uint8)[values]).save(out, "PNG")
    return out.getvalue()


def from_png(data: bytes, *, size: tuple[int, int], classes: int) -> np.ndarray:
    """The class numbers that a ``KEY.mask.png`` holds.

    Args:
        data: its content.
        size: (width, height) of the stored image.
        classes: how many there are.

    Returns:
        (height, width) uint8, IGNORE where a pixel is of no class.

    Raises:
        InputError: what :func:`to_png` does not write for such an image.
    """
    try:
        with codec.reasons():
            image = codec.opened(data, ("PNG",))
            if image.mode != "L" or image.size != size:
                found = f"{image.mode}, {image.width} x {image.height} pixels"
                raise codec.Unreadable(f"{found}, expected 8-bit grey of {size[0]} x {size[1]}")
            values = np.array(image)
    except codec.Unreadable as error:
        raise InputError(str(error)) from None
    unknown = values[(values >= classes) & (values != IGNORE)]
    if unknown.size:
        raise InputError(f"class number {unknown.max()}, but there are {classes} classes")
    return values
