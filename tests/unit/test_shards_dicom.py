"""DICOM: what changes pixels is applied, against values computed by hand, or refused by its name."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from shards import codec
from shards.codec import Rules
from shards.intensity import Deep, show

pydicom = pytest.importorskip("pydicom")
RAMP = np.linspace(0, 4000, 64).reshape(8, 8).astype(np.uint16)


def dicom(pixels: np.ndarray, *, preamble: bool = True, syntax: str | None = None, **tags: Any) -> bytes:
    from pydicom.uid import ExplicitVRLittleEndian

    data = pydicom.dataset.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.file_meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = data.file_meta.MediaStorageSOPClassUID, "1.2.3"
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    data.Rows, data.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    if pixels.ndim == 3 and not colour:
        data.NumberOfFrames = len(pixels)
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    if colour:
        data.PlanarConfiguration = 0
    for name, value in tags.items():
        setattr(data, name, value)
    if "FloatPixelData" not in tags:
        data.PixelData = np.ascontiguousarray(pixels).tobytes()
        data["PixelData"].VR = "OB" if bits == 8 else "OW"
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    return out.getvalue() if preamble else out.getvalue()[132:]


def picture(data: bytes, *, own_windows: bool = True) -> np.ndarray:
    image = codec.load(data, own_windows=own_windows).image
    return np.asarray(show(image, {"values": (0, 4000)}) if isinstance(image, Deep) else image).astype(int)


def values(data: bytes, **options: Any) -> np.ndarray:
    image = codec.load(data, **options).image
    assert isinstance(image, Deep)
    return image.values


def sequence(**entries: Any) -> Any:
    item = pydicom.dataset.Dataset()
    for name, value in entries.items():
        setattr(item, name, value)
    return pydicom.sequence.Sequence([item])


def test_without_a_window_values_are_kept_and_rescaled() -> None:
    assert np.array_equal(values(dicom(RAMP)), RAMP)
    rescaled = values(dicom(RAMP, RescaleSlope=2, RescaleIntercept=-1000))
    assert np.array_equal(rescaled, 2 * RAMP.astype(int) - 1000) and rescaled.dtype.kind == "i"


@pytest.mark.parametrize("preamble", [True, False])
def test_with_or_without_the_preamble(preamble: bool) -> None:
    data = dicom(RAMP, preamble=preamble)
    assert np.array_equal(values(data), RAMP)


@pytest.mark.parametrize("explicit", [True, False])
def test_without_any_header(explicit: bool) -> None:
    """A bare dataset, as very old exports have it: no preamble, no group 2."""
    data = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    out = io.BytesIO()
    del data.file_meta
    pydicom.dcmwrite(out, data, implicit_vr=not explicit, little_endian=True, enforce_file_format=False)
    assert np.array_equal(values(out.getvalue()), RAMP)


def test_text_that_begins_like_nothing_is_no_dicom() -> None:
    with pytest.raises(codec.Unreadable, match="known format"):
        codec.load(b"\x08\x00no image at all" * 20)


def test_a_palette_gives_colours() -> None:
    tables = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8] for name in ("Red", "Green", "Blue")}
    tables |= {f"{name}PaletteColorLookupTableData": bytes(256) for name in ("Green", "Blue")}
    tables["RedPaletteColorLookupTableData"] = bytes(range(255, -1, -1))
    places = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    found = picture(dicom(places, PhotometricInterpretation="PALETTE COLOR", **tables))
    assert np.array_equal(found[..., 0], 255 - places.astype(int)) and not found[..., 1:].any()


def test_a_palette_of_sixteen_bits_gives_colours() -> None:
    ramp = (np.arange(256, dtype="<u2") * 257).tobytes()
    tables = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in ("Red", "Green", "Blue")}
    tables |= {f"{name}PaletteColorLookupTableData": ramp for name in ("Red", "Green", "Blue")}
    places = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    found = picture(dicom(places, PhotometricInterpretation="PALETTE COLOR", **tables))
    assert np.array_equal(found[..., 1], places)


@pytest.mark.parametrize(
    ("padding", "tags"),
    [
        (-2000, {"PixelPaddingValue": -2000}),
        (-1990, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1980}),
    ],
)
def test_padding_is_no_value_and_black(padding: int, tags: dict[str, int]) -> None:
    pixels = RAMP.astype(np.int16)
    pixels[:2] = padding
    found = values(dicom(pixels, **tags))
    assert np.isnan(found[:2]).all() and np.array_equal(found[2:], pixels[2:])
    seen = codec.inspect(dicom(pixels, **tags), rules=Rules())
    assert seen.levels is not None and seen.levels.quantiles[0] == pixels[2:].min()
    assert (picture(dicom(pixels, **tags))[:2] == 0).all()
    inverted = picture(dicom(pixels, PhotometricInterpretation="MONOCHROME1", **tags))
    assert (inverted[:2] == 0).all() and inverted[2, 0] > inverted[-1, -1]


def test_padding_of_an_unsigned_image_written_as_signed() -> None:
    pixels = RAMP.copy()
    pixels[:2] = 65535
    data = pydicom.dcmread(io.BytesIO(dicom(pixels)))
    data.add_new("PixelPaddingValue", "SS", -1)
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    assert np.isnan(values(out.getvalue())[:2]).all()


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 1000},
        {"WindowWidth": 1000},
        {"WindowCenter": 1000, "WindowWidth": 0},
        {"WindowCenter": 1000, "WindowWidth": -5},
        {"WindowCenter": None, "WindowWidth": None},
    ],
)
def test_an_incomplete_window_is_none(tags: dict[str, Any]) -> None:
    assert np.array_equal(values(dicom(RAMP, **tags)), RAMP)


def test_the_first_of_several_windows_counts() -> None:
    several = picture(dicom(RAMP, WindowCenter=[1000, 3000], WindowWidth=[500, 100]))
    assert np.array_equal(several, picture(dicom(RAMP, WindowCenter=1000, WindowWidth=500)))
    step = picture(dicom(RAMP, WindowCenter=2000, WindowWidth=1))
    assert (
        set(np.unique(step)) == {0, 255}
        and (step[RAMP < 1999] == 0).all()
        and (step[RAMP > 2000] == 255).all()
    )


def test_voi_functions_are_the_standards() -> None:
    exact = picture(dicom(RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT"))
    expected = np.clip((RAMP.astype(float) - 1500) / 1000, 0, 1) * 255
    assert np.abs(exact - expected).max() <= 0.51
    sigmoid = picture(dicom(RAMP, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID"))
    expected = 255 / (1 + np.exp(-4 * (RAMP.astype(float) - 2000) / 1000))
    assert np.abs(sigmoid - expected).max() <= 1


def test_a_window_can_be_passed_over_for_one_scale_of_the_dataset() -> None:
    data = dicom(RAMP, WindowCenter=1000, WindowWidth=500)
    assert np.array_equal(values(data, own_windows=False), RAMP)


@pytest.mark.parametrize(
    "tags", [{"PhotometricInterpretation": "MONOCHROME1"}, {"PresentationLUTShape": "INVERSE"}]
)
def test_inverted_once_whatever_says_so(tags: dict[str, str]) -> None:
    plain, window = picture(dicom(RAMP)), {"WindowCenter": 2000, "WindowWidth": 4000}
    assert np.abs(plain + picture(dicom(RAMP, **tags)) - 255).max() <= 1
    assert np.abs(picture(dicom(RAMP, **window)) + picture(dicom(RAMP, **tags, **window)) - 255).max() <= 1
    both = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
    assert np.array_equal(picture(dicom(RAMP, **tags)), picture(dicom(RAMP, **both)))


def test_a_modality_lut_is_applied() -> None:
    entry = sequence(LUTDescriptor=[4, 0, 16], ModalityLUTType="US")
    entry[0].add_new("LUTData", "US", [10, 20, 3000, 40])
    pixels = np.array([[0, 1], [2, 3]], np.uint16)
    assert values(dicom(pixels, ModalityLUTSequence=entry)).tolist() == [[10, 20], [3000, 40]]


def test_bits_that_are_not_the_images_are_left_out() -> None:
    overlaid = RAMP | (np.arange(64).reshape(8, 8).astype(np.uint16) % 16 << 12)
    assert np.array_equal(values(dicom(overlaid, BitsStored=12, HighBit=11)), RAMP)
    high = (RAMP << 4).astype(np.uint16)
    assert np.array_equal(values(dicom(high, BitsStored=12, HighBit=15)), RAMP)
    signed = np.array([[-2048, -1], [0, 2047]], np.int16)
    unsigned_bits = (signed & 0x0FFF).astype(np.int16)
    assert np.array_equal(values(dicom(unsigned_bits, BitsStored=12, HighBit=11)), signed)


def test_colours_in_planes_and_in_pixels_are_the_same() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(picture(dicom(pixels)), pixels)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    data = pydicom.dcmread(io.BytesIO(dicom(pixels, PlanarConfiguration=1)))
    data.PixelData = planes.tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    assert np.array_equal(picture(out.getvalue()), pixels)


def test_ybr_becomes_rgb() -> None:
    ybr = np.zeros((8, 8, 3), np.uint8)
    ybr[..., 0], ybr[..., 1], ybr[..., 2] = 76, 85, 255  # red, by ITU-R BT.601
    found = picture(dicom(ybr, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(found[0, 0] - [255, 0, 0]).max() <= 2


def test_colours_of_more_than_eight_bits_keep_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 4096, (8, 8, 3)).astype(np.uint16)
    assert np.array_equal(values(dicom(pixels, BitsStored=12, HighBit=11)), pixels)


def test_an_enhanced_file_says_in_its_groups_how_the_first_frame_is_shown() -> None:
    shared = sequence(
        PixelValueTransformationSequence=sequence(RescaleSlope=2, RescaleIntercept=-1000),
        FrameVOILUTSequence=sequence(WindowCenter=1000, WindowWidth=1000),
    )
    stack = np.stack([RAMP, RAMP[::-1]])
    found = picture(dicom(stack, SharedFunctionalGroupsSequence=shared))
    plain = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 1000, "WindowWidth": 1000}
    assert np.array_equal(found, picture(dicom(RAMP, **plain)))
    assert codec.load(dicom(stack)).frames == 2


def test_float_pixels_are_values() -> None:
    pixels = np.linspace(-1, 3, 64, dtype=np.float32).reshape(8, 8)
    tags = {"FloatPixelData": pixels.tobytes(), "BitsAllocated": 32}
    data = pydicom.dcmread(io.BytesIO(dicom(pixels, **tags)))
    for name in ("BitsStored", "HighBit", "PixelRepresentation"):
        del data[name]
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    assert np.array_equal(values(out.getvalue()), pixels)


def test_a_compression_that_needs_a_package_names_it() -> None:
    from pydicom.uid import JPEGLSLossless

    if pydicom.pixels.get_decoder(JPEGLSLossless).is_available:
        pytest.skip("a decoder of JPEG-LS is installed")
    data = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    data.file_meta.TransferSyntaxUID = JPEGLSLossless
    data.PixelData = pydicom.encaps.encapsulate([bytes(64)])
    data["PixelData"].is_undefined_length = True
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    with pytest.raises(codec.Unreadable, match=r"JPEG-LS .* needs a decoder: pip install pylibjpeg"):
        codec.load(out.getvalue())


@pytest.mark.parametrize("syntax", ["RLELossless", "DeflatedExplicitVRLittleEndian"])
def test_lossless_compressions_of_pydicom_itself(syntax: str) -> None:
    data = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    if syntax == "RLELossless":
        data.compress(pydicom.uid.RLELossless)
    else:
        data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    assert np.array_equal(values(out.getvalue()), RAMP)


def test_a_file_without_pixels_says_so() -> None:
    data = pydicom.dcmread(io.BytesIO(dicom(RAMP)))
    del data.PixelData
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    with pytest.raises(codec.Unreadable, match="without an image"):
        codec.load(out.getvalue())
