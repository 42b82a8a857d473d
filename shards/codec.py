"""Image files: decoding to upright pixels, and the bytes that go into a shard.

Bytes of JPEG, PNG and WebP files are kept as they are wherever any reader shows them alike; all else is
re-encoded once, when the shard is written.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from shards import deep, dicom
from shards.alike import SIDE
from shards.deep import deep_pixels, is_deep
from shards.dicom import is_dicom
from shards.intensity import Deep, Kind, Levels, Window, byte_span, measure, show
from shards.kinds import HEAD, READ, kind_of

DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
SUFFIXES = DICOM_SUFFIXES | frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".j2k"}
)  # what lacks a known suffix is known by its content
PLUGINS = (
    *(JpegImagePlugin, PngImagePlugin, WebPImagePlugin, BmpImagePlugin, TiffImagePlugin, GifImagePlugin),
    Jpeg2KImagePlugin,
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000")  # theirs: all that Pillow may try
JPEG_QUALITY = 95
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
STRIP = 192 << 10  # bytes of pixels hashed at once: they stay in a core's cache


class Unreadable(Exception):
    """A file is no image that can be decoded; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    Attributes:
        image: upright first frame in mode RGB or L, or with more than 8 bits a channel.
        kept: suffix under which the file's own bytes can be stored ("jpg", "png", "webp"), or "" where
            they must be re-encoded.
        lossy: the file was compressed with loss, so that a re-encoding may be too.
        orientation: as EXIF has it, 1 where the file's pixels are upright.
        frames: pages, frames or moments of the file; the first is shown.
        windowed: a DICOM file that says itself what is black and white.
        patient: a DICOM file's PatientID, or "".
    """

    image: Image.Image | Deep
    kept: str
    lossy: bool
    orientation: int = 1
    frames: int = 1
    windowed: bool = False
    patient: str = ""


class Decoded(NamedTuple):
    """A stored image, perhaps at a fraction of its size.

    Attributes:
        image: mode RGB.
        width, height: what it shows, in its pixels: at a fraction of its size, that may end within a pixel.
    """

    image: Image.Image
    width: float
    height: float


@dataclass(frozen=True)
class Inspection:
    """What is known of a file once it has been decoded.

    Attributes:
        sha256: of the file's bytes.
        format: suffix in the shard: jpg, png or webp.
        original: the file's own bytes are stored.
        width, height: of the stored image, in pixels.
        pixel_hash: SHA-256 (first 32 hex digits) over size and upright pixels, before any resizing.
        thumbnail: 64 x 64 grey bytes.
        colour: means of R - G and B - G; NaN where that is not known.
        levels: how the values of an image of more than 8 bits a channel are distributed; None for others.
        span: grey values between the 1 % and the 99 % quantile of an image of 8 bits a channel.
        upright: (width, height) of the upright image before any resizing.
        orientation: as EXIF has it, 1 where the file's pixels are upright.
        frames: pages, frames or moments of the file; the first is stored.
        windowed: a DICOM file that says itself what is black and white.
        patient: a DICOM file's PatientID, or "".
    """

    sha256: str
    format: str
    original: bool
    width: int
    height: int
    pixel_hash: str
    thumbnail: bytes
    colour: tuple[float, float]
    levels: Levels | None
    span: int
    upright: tuple[int, int]
    orientation: int
    frames: int = 1
    windowed: bool = False
    patient: str = ""


@dataclass(frozen=True)
class Rules:
    """How the images of a dataset are decoded.

    Attributes:
        resize: longest short side allowed in the shard, in pixels.
        own_windows: whether the window of a DICOM file decides what is black and white in it.
        windows: black and white of images of more than 8 bits, by kind; known once all have been measured.
    """

    resize: int | None = None
    own_windows: bool = True
    windows: Mapping[Kind, Window] | None = None


def load(data: bytes, *, own_windows: bool = True) -> Picture:
    """Decode an image file.

    Args:
        data: the file's bytes.
        own_windows: whether the window of a DICOM file is applied; else its values are wanted.

    Raises:
        Unreadable: with the reason; also for images so large that they may be decompression bombs.
    """
    if not data:
        raise Unreadable("file is empty")
    with reasons(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if is_dicom(data[: dicom.PREAMBLE]):
            return _load_dicom(data, own_windows)
        return _load_image(data)


@contextmanager
def reasons() -> Iterator[None]:
    """Whatever a decoder raises within the block, as Unreadable with a short reason."""
    try:
        yield
    except Unreadable:
        raise
    except (deep.NotDecoded, dicom.Refused) as error:
        raise Unreadable(str(error)) from None
    except UnidentifiedImageError:
        raise Unreadable("not an image in a known format") from None
    except MemoryError:
        raise Unreadable("too large for the memory") from None
    except Exception as error:  # decoders raise nearly anything on a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(reason[:200]) from None


def opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image, not yet decoded, if it is not too large. Raises what Pillow does, see :func:`reasons`."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    _check_pixels(*image.size)  # Pillow itself only warns up to twice its limit
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise Unreadable(f"{width} x {height} pixels: it could be a decompression bomb")


def _load_image(data: bytes) -> Picture:
    image = _identified(data)
    kept = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "", "")
    lossy = kept == "jpg" or (kept == "webp" and _is_lossy_webp(data))
    frames = int(getattr(image, "n_frames", 1))
    if image.format == "MPO":
        frames = 1  # the same view again, for a screen or in depth
    if is_deep(image):  # before EXIF is looked for, which may load it
        orientation = _orientation(_identified(data))
        pixels = deep_pixels(data, image, FORMATS)
        turned = _orientation(image)  # of a TIFF, Pillow has turned it
        values = deep.upright(pixels.values, turned)
        return Picture(Deep(values, pixels.inverted), "", False, _known(orientation), frames)
    orientation = _orientation(image)
    if (frames > 1 and kept in ("png", "webp")) or image.mode == "CMYK" or orientation != 1:
        kept = ""
    return Picture(_upright(image), kept, lossy, _known(orientation), frames)


def _identified(data: bytes) -> Image.Image:
    try:
        return opened(data)
    except UnidentifiedImageError:
        if (kind := kind_of(data[:HEAD])) not in ("", READ):
            raise Unreadable(f"{kind} is not read: convert it to PNG or TIFF") from None
        if data[:4] in TIFF_MARKS and (layout := deep.tiff_layout(data)):
            raise Unreadable(f"a TIFF with {layout} is not read") from None
        raise


def _known(orientation: int) -> int:
    return orientation if orientation in range(2, 9) else 1


def _is_lossy_webp(data: bytes) -> bool:
    """Whether the first frame is VP8, not VP8L. What moves or has metadata begins with other chunks."""
    position = 12
    while position + 8 <= len(data):
        kind, size = (
            data[position : position + 4],
            int.from_bytes(data[position + 4 : position + 8], "little"),
        )
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        position += 8 + (16 if kind == b"ANMF" else size + size % 2)  # a frame's chunks follow its 16 bytes
    return False


def _upright(image: Image.Image) -> Image.Image:
    """The pixels of an opened image in mode RGB or L; not copied where they are so in the file."""
    image.load()
    return _plain(image if _orientation(image) == 1 else ImageOps.exif_transpose(image))


def _plain(image: Image.Image) -> Image.Image:
    """The image in mode RGB or L; an alpha channel is left out."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode in ("LA", "RGBA", "PA", "P"):
        _check_alpha(image)
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")
    if image.mode in deep.GREY:
        raise Unreadable(f"{image.mode} where 8 bits a channel were expected")
    return image.convert("RGB")


def _check_alpha(image: Image.Image) -> None:
    """Refuse an image of one colour whose transparency is all that it shows."""
    if image.mode in ("P", "PA") and "transparency" not in image.info and image.mode == "P":
        return
    whole = image.convert("RGBA")
    ends = [band.getextrema() for band in whole.split()]
    if ends[-1][0] != ends[-1][1] and all(low == high for low, high in ends[:-1]):
        raise Unreadable("it is of one colour: all that it shows is in its alpha channel")


def _load_dicom(data: bytes, own_windows: bool) -> Picture:
    frame = dicom.read(data, own_windows=own_windows, check=_check_pixels)
    image = frame.shown if frame.shown is not None else frame.deep
    assert image is not None
    return Picture(image, "", False, frames=frame.frames, windowed=frame.windowed, patient=frame.patient)


def inspect(data: bytes, *, rules: Rules) -> Inspection:
    """Decode a file and measure it.

    Args:
        data: the file's bytes.
        rules: of the dataset.

    Raises:
        Unreadable: with the reason.
    """
    picture = load(data, own_windows=rules.own_windows)
    image = picture.image
    width, height = _fitted(image.size, rules.resize)
    original = bool(picture.kept) and (width, height) == image.size
    grey = _as_mode(show(image) if isinstance(image, Deep) else image, "L")
    return Inspection(
        sha256=hashlib.sha256(data).hexdigest(),
        format=picture.kept if original else "jpg" if picture.lossy else "png",
        original=original,
        width=width,
        height=height,
        pixel_hash=_pixel_hash(image),
        thumbnail=grey.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes(),
        colour=_colour(image),
        levels=measure(image) if isinstance(image, Deep) else None,
        span=byte_span(grey),
        upright=image.size,
        orientation=picture.orientation,
        frames=picture.frames,
        windowed=picture.windowed,
        patient=picture.patient,
    )


def encode(data: bytes, *, rules: Rules) -> bytes:
    """The bytes to store for a file that is not kept as it is: upright, 8 bits a channel, resized.

    JPEG of quality 95 for a file that was compressed with loss, else PNG.
    """
    picture = load(data, own_windows=rules.own_windows)
    image = show(picture.image, rules.windows) if isinstance(picture.image, Deep) else picture.image
    size = _fitted(image.size, rules.resize)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if picture.lossy:
        image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(out, "PNG")
    return out.getvalue()


def decode(data: bytes) -> Image.Image:
    """A stored image as RGB, 8 bits a channel.

    Args:
        data: a JPEG, PNG or WebP file.

    Raises:
        Unreadable: with the reason.
    """
    with reasons():
        return _as_mode(_upright(opened(data)), "RGB")


def decode_small(data: bytes, *, at_least: int) -> Decoded:
    """The same, where so many pixels are enough for either side.

    A JPEG then comes at a half, a quarter or an eighth of its size, without the frequencies that would be
    lost in any case, and in a half to a quarter of the time.
    """
    with reasons():
        image = opened(data)
        drafted = image.draft(image.mode, (at_least, at_least)) if _orientation(image) == 1 else None
        whole = _as_mode(_upright(image), "RGB")
    return Decoded(whole, *(drafted[1][2:] if drafted else whole.size))


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode; itself, not Pillow's copy, where it is in that mode."""
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """As EXIF has it, 1 where the file's pixels are upright."""
    return image.getexif().get(0x0112, 1)


def _fitted(size: tuple[int, int], resize: int | None) -> tuple[int, int]:
    """Width and height once the short side is at most ``resize`` pixels."""
    short = min(size)
    if resize is None or short <= resize:
        return size
    return max(1, round(size[0] * resize / short)), max(1, round(size[1] * resize / short))


def strips(image: Image.Image, most: int) -> Iterator[tuple[int, Image.Image]]:
    """An image in pieces of its whole width, each with the row where it begins, to make bytes of.

    Pillow makes bytes of a whole image in as much memory twice over, which the C library may give back to
    the system after every image: the next one is slower for it, by up to two thirds.

    Args:
        image: mode RGB or L.
        most: bytes that a piece makes in RGB, where that is a row or more.
    """
    rows = max(1, most // (3 * image.width))
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _pixel_hash(image: Image.Image | Deep) -> str:
    """Of upright pixels: grey is hashed as the colour it shows, values of more than 8 bits as numbers."""
    if isinstance(image, Deep):
        width, height = image.size
        whole = image.values.dtype.kind in "iu"
        digest = hashlib.sha256(f"{width}x{height}:{image.values.ndim}{'i' if whole else 'f'}".encode())
        digest.update(image.values.astype("<i8" if whole else "<f8").tobytes())
        return digest.hexdigest()[:32]
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    for _, strip in strips(image, STRIP):
        digest.update(_as_mode(strip, "RGB").tobytes())
    return digest.hexdigest()[:32]


def _colour(image: Image.Image | Deep) -> tuple[float, float]:
    """Means of R - G and B - G over 64 x 64 pixels; NaN for grey images and those of more than 8 bits."""
    if isinstance(image, Deep) or image.mode != "RGB":
        return np.nan, np.nan
    red, green, blue = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.NEAREST)).mean((0, 1)).tolist()
    return round(red - green, 1), round(blue - green, 1)
