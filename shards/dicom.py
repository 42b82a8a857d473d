"""DICOM images: the first frame as a display shows it, or its values where the file has no window.

What changes pixels is applied by pydicom: modality LUT or rescale, VOI LUT or window (the first; linear,
exact or sigmoid), palettes, YBR colours. MONOCHROME1, and a presentation LUT of the shape INVERSE, are
inverted. Padding (PixelPaddingValue, PixelPaddingRangeLimit) is no value, and black. What cannot be applied
is refused by its name.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from shards.intensity import Deep

PREAMBLE = 132
_PLAIN_GROUPS = (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08")  # of a first element, either byte order
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_VRS = frozenset(b"AE AS CS DA DS DT FD FL IS LO LT OB OW PN SH SL SQ SS ST TM UI UL UN US UT".split())
FARTHEST = 1e9  # beyond any window: comes out as its darkest and brightest value


class Refused(Exception):
    """A DICOM file that cannot be shown; the message names the attribute."""


@dataclass(frozen=True)
class Frame:
    """The first frame.

    Attributes:
        shown: as RGB or L, where the file says how it is to be shown; else None.
        deep: its values, where it does not.
        frames: how many there are.
        windowed: the file has a window or VOI LUT of its own.
        patient: the file's PatientID, or "".
    """

    shown: Image.Image | None
    deep: Deep | None
    frames: int
    windowed: bool
    patient: str = ""


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these bytes (132 or more) is DICOM, with its preamble or without."""
    return head[128:132] == b"DICM" or _is_bare(head)


def _is_bare(head: bytes) -> bool:
    """Whether these are elements of a DICOM dataset, as old exports have them, with no preamble."""
    if len(head) < 16 or head[:2] not in _PLAIN_GROUPS:
        return False
    little = head[1] == 0
    element = int.from_bytes(head[2:4], "little" if little else "big")
    if element > 0x0100:
        return False
    if head[4:6] in _VRS:  # explicit
        return True
    return little and int.from_bytes(head[4:8], "little") < 128  # implicit: the length of a short value


def read(data: bytes, *, own_windows: bool, check: Any) -> Frame:
    """Decode a file.

    Args:
        data: the file's bytes.
        own_windows: whether a window or VOI LUT of the file is applied; else its values are wanted.
        check: called with width and height, to refuse what is too large.

    Raises:
        Refused: pydicom is missing, or the file cannot be shown.
        Exception: whatever pydicom raises on a broken file.
    """
    try:
        import pydicom
    except ImportError:
        raise Refused("DICOM needs the package pydicom") from None
    dataset: Any = pydicom.dcmread(io.BytesIO(data), force=True)
    frame = _first_frame(dataset, own_windows, check)
    return replace(frame, patient=str(dataset.get("PatientID") or "").strip())


def _first_frame(dataset: Any, own_windows: bool, check: Any) -> Frame:
    from pydicom import pixels

    if not any(name in dataset for name in _PIXELS):
        raise Refused("DICOM file without an image")
    check(int(dataset.Columns), int(dataset.Rows))
    _set_syntax(dataset)
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed:
        _require_decoder(syntax)
    frames = int(dataset.get("NumberOfFrames") or 1)
    colours = str(dataset.get("PhotometricInterpretation", "")).strip()
    frame = pixels.pixel_array(_all_bits(dataset), index=0)  # YBR comes as RGB
    described = _first_frames(dataset)
    if colours == "PALETTE COLOR":
        return Frame(_bytes(pixels.apply_color_lut(frame, dataset), 16), None, frames, False)
    if frame.ndim == 3:
        if frame.dtype == np.uint8:
            return Frame(Image.fromarray(frame), None, frames, False)
        return Frame(None, Deep(_stored_bits(frame, dataset)), frames, False)
    stored = frame if syntax.is_compressed else _stored_bits(frame, dataset)
    padded = _padding(stored, described)
    values = np.asarray(pixels.apply_modality_lut(stored, described))
    inverted = colours == "MONOCHROME1" or str(dataset.get("PresentationLUTShape", "")).strip() == "INVERSE"
    if own_windows and (shown := _as_the_file_says(values, described, pixels)) is not None:
        grey = 255 - shown if inverted else shown
        grey[padded] = 0
        return Frame(Image.fromarray(np.rint(grey).astype(np.uint8)), None, frames, True)
    if padded.any():
        values = np.where(padded, np.nan, values.astype(np.float64))
        if values.dtype.kind == "f" and padded.all():
            raise Refused("every pixel is padding (PixelPaddingValue)")
    elif values.dtype.kind == "f" and np.array_equal(values, np.rint(values)):
        values = values.astype(np.int64)  # rescaled by whole numbers
    return Frame(None, Deep(values, inverted), frames, False)


def _set_syntax(dataset: Any) -> None:
    """A file without a header of its own says by its elements how they are written."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if not hasattr(dataset, "file_meta") or dataset.file_meta is None:
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        uid = (
            ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        )
        dataset.file_meta.TransferSyntaxUID = uid


def _require_decoder(syntax: Any) -> None:
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Refused(f"DICOM compressed as {syntax.name} (TransferSyntaxUID) is not read") from None
    if not decoder.is_available:
        package = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
        raise Refused(
            f"DICOM compressed as {syntax.name} (TransferSyntaxUID) needs a decoder: pip install {package}"
        )


def _first_frames(dataset: Any) -> Any:
    """The dataset with what an enhanced one says of its first frame: rescale, window, padding."""
    import pydicom

    found = pydicom.Dataset()
    found.update(dataset)
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        first = dataset.get(groups)
        for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            inner = first[0].get(sequence) if first else None
            if inner:
                for element in inner[0]:
                    found[element.tag] = element
    return found


def _all_bits(dataset: Any) -> Any:
    """The dataset as if every bit were the image's: pydicom takes the low ones, whatever HighBit says."""
    import pydicom

    stored, high = dataset.get("BitsStored"), dataset.get("HighBit")
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated or not stored or high in (None, stored - 1):
        return dataset
    found = pydicom.Dataset()
    found.update(dataset)
    found.file_meta = dataset.file_meta
    found.add_new("BitsStored", "US", dataset.BitsAllocated)  # new elements: the dataset keeps its own
    found.add_new("HighBit", "US", dataset.BitsAllocated - 1)
    return found


def _stored_bits(frame: np.ndarray, dataset: Any) -> np.ndarray:
    """Whole numbers without what lies in bits that are not the image's (old overlays)."""
    allocated, stored = int(dataset.get("BitsAllocated", 0)), int(dataset.get("BitsStored", 0))
    high = int(dataset.get("HighBit", stored - 1))
    if frame.dtype.kind not in "iu" or not stored or (stored >= allocated and high == stored - 1):
        return frame
    raw = frame.astype(np.int64) >> (high + 1 - stored)
    raw &= (1 << stored) - 1
    if int(dataset.get("PixelRepresentation", 0)):
        raw = np.where(raw >= 1 << (stored - 1), raw - (1 << stored), raw)
    return raw.astype(frame.dtype)


def _padding(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """Which pixels are padding."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    bits = int(dataset.get("BitsAllocated", 16))
    ends = [int(value), int(dataset.get("PixelPaddingRangeLimit", value))]
    if not int(dataset.get("PixelRepresentation", 0)):  # written as signed in an unsigned image
        ends = [end % (1 << bits) for end in ends]
    elif max(ends) >= 1 << (bits - 1):
        ends = [end - (1 << bits) if end >= 1 << (bits - 1) else end for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


def _as_the_file_says(values: np.ndarray, dataset: Any, pixels: Any) -> np.ndarray | None:
    """Grey values from 0 to 255 by the file's VOI LUT or window; None where it has none that is complete."""
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        looked_up = pixels.apply_voi(np.rint(values).astype(np.int64), dataset)
        return np.clip(np.asarray(looked_up, np.float64) * (255 / (2.0**bits - 1)), 0, 255)
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function == "LINEAR" and width == 1:  # a step: pydicom would divide by zero
        return np.where(values <= centre - 0.5, 0.0, 255.0)
    low, high = pixels.apply_windowing(np.array([-FARTHEST, FARTHEST]), dataset)
    shown = pixels.apply_windowing(values.astype(np.float64), dataset)
    return np.clip((shown - low) * (255 / max(float(high - low), 1e-12)), 0, 255)


def _first(value: Any) -> float | None:
    """The first of one or several numbers; None where there is none."""
    if value is None or value == "":
        return None
    if isinstance(value, (list, tuple)) or hasattr(value, "__iter__"):
        value = next(iter(value), None)
    return None if value is None else float(value)


def _bytes(frame: np.ndarray, bits: int) -> Image.Image:
    """Colours of a palette, whose entries of 16 bits may hold 8."""
    if frame.dtype != np.uint8:
        frame = (frame >> (bits - 8)) if frame.max() > 255 else frame
    return Image.fromarray(frame.astype(np.uint8))
