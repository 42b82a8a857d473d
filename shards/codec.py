"""Image files: decoding to upright pixels, and the bytes that go into a shard.

Bytes of JPEG, PNG and WebP files are kept as they are wherever any reader shows them alike; all else is
re-encoded once, when the shard is written.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".dcm", ".dicom"}  # read from folders
)
PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, BmpImagePlugin, TiffImagePlugin)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # theirs: all that Pillow may try
JPEG_QUALITY = 95
THUMBNAIL = 16  # side of the grey thumbnail that near-duplicates are compared by, in pixels
STRIP = 192 << 10  # bytes of pixels hashed at once: they stay in a core's cache
GREY16_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


class Unreadable(Exception):
    """A file is no image that can be decoded; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    Attributes:
        image: upright first frame in mode RGB, L or I;16.
        kept: suffix under which the file's own bytes can be stored ("jpg", "png", "webp"), or "" where
            they must be re-encoded.
        lossy: the file was compressed with loss, so that a re-encoding may be too.
        orientation: as EXIF has it, 1 where the file's pixels are upright.
    """

    image: Image.Image
    kept: str
    lossy: bool
    orientation: int = 1


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
        perceptual_hash: 64-bit difference hash.
        thumbnail: 16 x 16 grey bytes.
        peak16: greatest value of a 16-bit image, 0 for 8-bit ones.
        upright: (width, height) of the upright image before any resizing.
        orientation: as EXIF has it, 1 where the file's pixels are upright.
    """

    sha256: str
    format: str
    original: bool
    width: int
    height: int
    pixel_hash: str
    perceptual_hash: int
    thumbnail: bytes
    peak16: int
    upright: tuple[int, int]
    orientation: int


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes (132 or more) is DICOM."""
    return head[128:132] == b"DICM"


def load(data: bytes) -> Picture:
    """Decode an image file.

    Raises:
        Unreadable: with the reason; also for images so large that they may be decompression bombs.
    """
    if not data:
        raise Unreadable("file is empty")
    with reasons(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _load_dicom(data) if is_dicom(data[:132]) else _load_image(data)


@contextmanager
def reasons() -> Iterator[None]:
    """Whatever a decoder raises within the block, as Unreadable with a short reason."""
    try:
        yield
    except Unreadable:
        raise
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
    image = opened(data)
    kept = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}.get(image.format or "", "")
    lossy = kept == "jpg" or (kept == "webp" and _is_lossy_webp(data))
    moving = kept in ("png", "webp") and getattr(image, "is_animated", False)
    orientation = _orientation(image)
    if moving or image.mode == "CMYK" or orientation != 1:
        kept = ""
    turned = orientation if orientation in range(2, 9) else 1
    return Picture(_upright(image), kept, lossy, turned)


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
    """The pixels of an opened image in mode RGB, L or I;16; not copied where they are so in the file."""
    image.load()
    return _plain(image if _orientation(image) == 1 else ImageOps.exif_transpose(image))


def _plain(image: Image.Image) -> Image.Image:
    """The image in mode RGB, L or I;16; an alpha channel is left out."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode in GREY16_MODES:
        return Image.fromarray(_to_uint16(np.asarray(image)))
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _to_uint16(pixels: np.ndarray) -> np.ndarray:
    """Grey values of any type as uint16.

    Whole numbers that fit stay as they are, floats in [0, 1] are multiplied by 65535, all else is stretched
    from the image's least to its greatest value.
    """
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise Unreadable("grey values are not finite")
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return pixels.astype(np.uint16)
    scaled = pixels.astype(np.float64)
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        scaled *= 65535
    else:
        scaled = (scaled - low) * (65535 / max(float(high) - float(low), 1e-12))
    return np.rint(scaled).astype(np.uint16)


def _load_dicom(data: bytes) -> Picture:
    """The first frame as a display shows it: rescaled, windowed, MONOCHROME1 inverted."""
    try:
        import pydicom
        from pydicom import pixels as dicom_pixels
    except ImportError:
        raise Unreadable("DICOM needs the package pydicom") from None
    dataset = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in dataset:
        raise Unreadable("DICOM file without an image")
    _check_pixels(dataset.Columns, dataset.Rows)
    frame = dicom_pixels.pixel_array(dataset, index=0)  # colour comes as RGB
    if frame.ndim == 3:
        wide = frame.dtype != np.uint8
        return Picture(Image.fromarray((frame >> 8 if wide else frame).astype(np.uint8)), "", False)
    values = np.asarray(dicom_pixels.apply_modality_lut(frame, dataset), np.float64)
    if dataset.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        values = dicom_pixels.apply_voi(np.rint(values).astype(np.int64), dataset)
    elif dataset.get("WindowCenter") is not None:
        ends = np.array(
            [-1e9, 1e9]
        )  # far outside any window: they come out as its darkest and brightest value
        low, high = dicom_pixels.apply_windowing(ends, dataset)
        values = dicom_pixels.apply_windowing(values, dataset)
    else:
        low, high = values.min(), values.max()
    grey = np.clip((values - low) * (255 / max(high - low, 1e-12)), 0, 255)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    return Picture(Image.fromarray(np.rint(grey).astype(np.uint8)), "", False)


def inspect(data: bytes, *, resize: int | None) -> Inspection:
    """Decode a file and measure it.

    Args:
        data: the file's bytes.
        resize: longest short side allowed in the shard, in pixels.

    Raises:
        Unreadable: with the reason.
    """
    picture = load(data)
    image = picture.image
    width, height = _fitted(image.size, resize)
    original = bool(picture.kept) and (width, height) == image.size
    peak = int(np.asarray(image).max()) if image.mode == "I;16" else 0
    grey = _to_grey8(image, peak) if image.mode == "I;16" else _as_mode(image, "L")
    return Inspection(
        sha256=hashlib.sha256(data).hexdigest(),
        format=picture.kept if original else "jpg" if picture.lossy else "png",
        original=original,
        width=width,
        height=height,
        pixel_hash=_pixel_hash(image),
        perceptual_hash=_difference_hash(grey),
        thumbnail=grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes(),
        peak16=peak,
        upright=image.size,
        orientation=picture.orientation,
    )


def encode(data: bytes, *, resize: int | None) -> bytes:
    """The bytes to store for a file that is not kept as it is: upright and resized.

    JPEG of quality 95 for a file that was compressed with loss, else PNG.
    """
    picture = load(data)
    image = picture.image
    size = _fitted(image.size, resize)
    if size != image.size:
        if image.mode == "I;16":
            resized = image.convert("F").resize(size, Image.Resampling.LANCZOS)
            values = np.rint(np.clip(np.asarray(resized), 0, 65535)).astype(np.uint16)
            image = Image.fromarray(values)
        else:
            image = image.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if picture.lossy:
        image.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(out, "PNG")
    return out.getvalue()


def decode(data: bytes, *, grey16_max: int = 65535) -> Image.Image:
    """A stored image as RGB, 8 bits a channel.

    Args:
        data: a JPEG, PNG or WebP file.
        grey16_max: the 16-bit grey value that becomes white.

    Raises:
        Unreadable: with the reason.
    """
    with reasons():
        return _as_rgb(opened(data), grey16_max)


def decode_small(data: bytes, *, at_least: int, grey16_max: int = 65535) -> Decoded:
    """The same, where so many pixels are enough for either side.

    A JPEG then comes at a half, a quarter or an eighth of its size, without the frequencies that would be
    lost in any case, and in a half to a quarter of the time.
    """
    with reasons():
        image = opened(data)
        drafted = image.draft(image.mode, (at_least, at_least)) if _orientation(image) == 1 else None
        whole = _as_rgb(image, grey16_max)
    return Decoded(whole, *(drafted[1][2:] if drafted else whole.size))


def _as_rgb(image: Image.Image, grey16_max: int) -> Image.Image:
    """The pixels of an opened image."""
    image = _upright(image)
    return _as_mode(_to_grey8(image, grey16_max) if image.mode == "I;16" else image, "RGB")


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode; itself, not Pillow's copy, where it is in that mode."""
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """As EXIF has it, 1 where the file's pixels are upright."""
    return image.getexif().get(0x0112, 1)


def _to_grey8(image: Image.Image, white: int) -> Image.Image:
    values = np.asarray(image).astype(np.float32) * (255 / max(white, 1))
    return Image.fromarray(np.rint(np.clip(values, 0, 255)).astype(np.uint8))


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
        image: mode RGB, L or I;16.
        most: bytes that a piece makes in RGB, where that is a row or more.
    """
    rows = max(1, most // (3 * image.width))
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _pixel_hash(image: Image.Image) -> str:
    """Of an image in mode RGB, L or I;16: grey is hashed as the colour it shows."""
    wide = image.mode == "I;16"
    digest = hashlib.sha256(f"{image.width}x{image.height}:{'16' if wide else ''}".encode())
    for _, strip in strips(image, STRIP):
        digest.update(np.asarray(strip, "<u2").tobytes() if wide else _as_mode(strip, "RGB").tobytes())
    return digest.hexdigest()[:32]


def _difference_hash(grey: Image.Image) -> int:
    """One bit a neighbouring pair of a 9 x 8 thumbnail: is the right one brighter (dHash)?"""
    small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
