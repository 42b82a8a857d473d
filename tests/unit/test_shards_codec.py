"""Every image format comes out as the pixels a viewer would show."""

from __future__ import annotations

import hashlib
import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures import picture as photograph
from shards import codec
from shards.codec import Rules
from shards.intensity import windows


def picture(height: int = 12, width: int = 20) -> np.ndarray:
    """A smooth colour image, (height, width, 3) uint8, no two sides of it alike."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(
        np.uint8
    )


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def stored(data: bytes, resize: int | None = None) -> tuple[codec.Inspection, bytes]:
    seen = codec.inspect(data, rules=Rules(resize=resize))
    levels = [] if seen.levels is None else [seen.levels]
    rules = Rules(resize=resize, windows=windows(levels))
    return seen, data if seen.original else codec.encode(data, rules=rules)


@pytest.mark.parametrize(
    ("format", "options", "suffix"),
    [("PNG", {}, "png"), ("JPEG", {"quality": 90}, "jpg"), ("WEBP", {"lossless": True}, "webp")],
)
def test_web_formats_keep_their_bytes(format, options, suffix):
    data = saved(Image.fromarray(picture()), format, **options)
    seen, kept = stored(data)
    assert (seen.format, kept, seen.width, seen.height) == (suffix, data, 20, 12)


@pytest.mark.parametrize(
    ("format", "options"), [("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_other_formats_become_png_of_equal_pixels(format, options):
    seen, kept = stored(saved(Image.fromarray(picture()), format, **options))
    assert seen.format == "png" and kept.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(codec.decode(kept)), picture())


def test_equal_pixels_have_equal_hashes_in_any_lossless_format():
    image = Image.fromarray(picture())
    hashes = {
        codec.inspect(saved(image, format), rules=Rules()).pixel_hash for format in ("PNG", "BMP", "TIFF")
    }
    other = codec.inspect(saved(Image.fromarray(picture()[::-1]), "PNG"), rules=Rules()).pixel_hash
    assert len(hashes) == 1 and other not in hashes


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("strip", [1, 150, codec.STRIP])
def test_hashes_are_those_of_the_whole_image(mode, strip, monkeypatch):
    monkeypatch.setattr(codec, "STRIP", strip)
    grey = picture()[..., 0].astype("<u2")
    image = Image.fromarray(picture()).convert(mode) if mode != "I;16" else Image.fromarray(grey * 200)
    deep = b"2i" + (grey.astype("<i8") * 200).tobytes()
    pixels = image.convert("RGB").tobytes() if mode != "I;16" else deep
    seen = codec.inspect(saved(image, "PNG"), rules=Rules())
    assert seen.pixel_hash == hashlib.sha256(b"20x12:" + pixels).hexdigest()[:32]
    if mode != "I;16":
        small = image.convert("L").resize((64, 64), Image.Resampling.BOX)
        assert seen.thumbnail == small.tobytes()


def test_inspecting_takes_no_second_copy_of_the_pixels():
    data = saved(photograph(1024, 768, seed=0), "JPEG")
    codec.inspect(data, rules=Rules())
    tracemalloc.start()
    codec.inspect(data, rules=Rules())
    peak = tracemalloc.get_traced_memory()[1]  # of Python's own: Pillow's image is not in it
    tracemalloc.stop()
    assert peak < 1024 * 768 * 3 / 2


def test_sixteen_bit_grey_becomes_eight_bit_by_the_datasets_window():
    values = np.linspace(0, 4095, 240).reshape(12, 20).astype(np.uint16)
    seen, kept = stored(saved(Image.fromarray(values), "TIFF"))
    assert seen.format == "png" and seen.levels is not None and seen.levels.quantiles[-1] == 4095
    shown = np.asarray(codec.decode(kept))
    assert shown.shape == (12, 20, 3) and shown.min() == 0 and shown.max() == 255
    assert np.abs(shown[..., 0] - values / 4095 * 255).max() <= 1.5
    assert stored(saved(Image.fromarray(values), "PNG"))[1] == kept


def test_sixteen_bit_grey_is_resized_after_its_window():
    values = np.full((40, 60), 30000, np.uint16)
    values[:, :30] = 10000
    seen, kept = stored(saved(Image.fromarray(values), "PNG"), resize=10)
    small = np.asarray(Image.open(io.BytesIO(kept)))
    assert (seen.width, seen.height) == (15, 10) and small.shape == (10, 15)
    assert (small[:, :5] == 0).all() and (small[:, 10:] == 255).all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_float_tiff_becomes_eight_bit(scale):
    values = np.linspace(0, scale, 240, dtype=np.float32).reshape(12, 20)
    seen, kept = stored(saved(Image.fromarray(values), "TIFF"))
    shown = np.asarray(codec.decode(kept))[..., 0]
    assert seen.levels is not None and seen.levels.kind == ("unit" if scale == 1 else "values")
    assert shown[0, 0] == 0 and shown[-1, -1] == 255 and np.abs(shown - values / scale * 255).max() < 2


def test_float_tiff_with_nan_is_unreadable():
    values = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(codec.Unreadable, match="not finite"):
        codec.load(saved(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_exif_rotation_is_applied(format):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    seen, kept = stored(saved(Image.fromarray(picture()), format, exif=exif))
    expected = np.rot90(picture(), -1).astype(int)
    assert (seen.width, seen.height, seen.original) == (12, 20, False)
    assert np.abs(np.asarray(codec.decode(kept)).astype(int) - expected).mean() < 4


def test_trivial_exif_keeps_the_bytes():
    exif = Image.Exif()
    exif[0x0112] = 1
    assert codec.inspect(saved(Image.fromarray(picture()), "JPEG", exif=exif), rules=Rules()).original


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_decodes_to_rgb(mode):
    image = Image.fromarray(picture()).convert(mode)
    format = "TIFF" if mode == "CMYK" else "PNG"
    _, kept = stored(saved(image, format))
    shown = codec.decode(kept)
    assert shown.mode == "RGB" and shown.size == (20, 12)
    expected = image.convert("RGBA").convert("RGB") if mode == "P" else image.convert("RGB")
    assert np.abs(np.asarray(shown).astype(int) - np.asarray(expected)).max() <= 1


def test_cmyk_jpeg_is_stored_as_rgb_jpeg():
    seen, kept = stored(saved(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95))
    image = Image.open(io.BytesIO(kept))
    assert seen.format == "jpg" and image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - picture()).mean() < 6


def test_palette_with_transparency_does_not_warn(recwarn):
    image = Image.fromarray(picture()).convert("P")
    codec.decode(saved(image, "PNG", transparency=b"\x00\x80\xff"))
    assert not recwarn.list


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_first_frame_of_a_moving_image_is_stored(format):
    first, second = Image.fromarray(picture()), Image.fromarray(255 - picture())
    options = {"lossless": True} if format == "WEBP" else {}
    seen, kept = stored(saved(first, format, save_all=True, append_images=[second], **options))
    assert seen.format == "png" and getattr(Image.open(io.BytesIO(kept)), "n_frames", 1) == 1
    assert np.array_equal(np.asarray(codec.decode(kept)), picture())


def test_one_pixel_is_an_image():
    seen, kept = stored(saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), resize=8)
    assert (seen.width, seen.height) == (1, 1) and codec.decode(kept).getpixel((0, 0)) == (1, 2, 3)


def test_resize_bounds_the_short_side_and_enlarges_nothing():
    large = saved(Image.fromarray(picture(100, 300)), "JPEG")
    seen, kept = stored(large, resize=50)
    assert (seen.width, seen.height, seen.format) == (150, 50, "jpg") and codec.decode(kept).size == (150, 50)
    png = saved(Image.fromarray(picture(100, 300)), "PNG")
    assert stored(png, resize=50)[0].format == "png"
    assert stored(png, resize=100)[1] == png


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "known format"),
        (saved(Image.fromarray(picture(200, 200)), "JPEG")[:1500], "truncated"),
        (saved(Image.fromarray(picture(200, 200)), "PNG")[:300], "truncated|broken"),
        (bytes(128) + b"DICM" + b"garbage", "."),
    ],
)
def test_broken_files_are_unreadable_with_a_one_line_reason(data, reason):
    with pytest.raises(codec.Unreadable, match=reason) as caught:
        codec.load(data)
    assert str(caught.value) and "\n" not in str(caught.value)


def test_decompression_bomb_is_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # Pillow only warns up to twice that
    with pytest.raises(codec.Unreadable, match="decompression bomb"):
        codec.load(saved(Image.fromarray(picture()), "PNG"))


def dicom(pixels: np.ndarray, **tags: object) -> bytes:
    """A DICOM file with these pixels, (H, W) or (frames, H, W) uint16."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.astype("<u2").tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


RAMP = np.linspace(0, 4000, 64).reshape(8, 8).astype(np.uint16)


def test_dicom_without_a_window_is_stretched():
    seen, kept = stored(dicom(RAMP))
    shown = np.asarray(codec.decode(kept))[..., 0].astype(int)
    assert seen.format == "png" and not seen.original
    assert np.abs(shown - RAMP / 4000 * 255).max() <= 1


def test_dicom_window_applies_to_rescaled_values():
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 1000, "WindowWidth": 1000}
    _, kept = stored(dicom(RAMP, **tags))
    shown = np.asarray(codec.decode(kept))[..., 0].astype(int)
    rescaled = 2.0 * RAMP - 1000
    assert (shown[rescaled < 490] == 0).all() and (shown[rescaled > 1510] == 255).all()
    middle = (rescaled > 520) & (rescaled < 1480)
    assert np.abs(shown - (rescaled - 500) / 1000 * 255)[middle].max() < 2


def test_dicom_that_fills_half_its_window_stays_dark():
    _, kept = stored(dicom(RAMP, WindowCenter=4000, WindowWidth=8000))
    shown = np.asarray(codec.decode(kept))[..., 0]
    assert shown.min() == 0 and 125 <= shown.max() <= 129


def test_dicom_lookup_table_is_applied():
    pydicom = pytest.importorskip("pydicom")
    entry = pydicom.dataset.Dataset()
    entry.add_new("LUTDescriptor", "US", [4096, 0, 16])
    entry.add_new("LUTData", "US", list(range(65535, -1, -16)))
    _, kept = stored(dicom(RAMP, VOILUTSequence=pydicom.sequence.Sequence([entry])))
    shown = np.asarray(codec.decode(kept))[..., 0].astype(int)
    assert np.abs(shown - (65535 - 16.0 * RAMP) / 65535 * 255).max() <= 1


def test_dicom_monochrome1_is_inverted():
    _, plain = stored(dicom(RAMP))
    _, inverted = stored(dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    total = np.asarray(codec.decode(plain)).astype(int) + np.asarray(codec.decode(inverted))
    assert (np.abs(total - 255) <= 1).all()


def test_dicom_of_many_frames_gives_the_first():
    _, one = stored(dicom(RAMP))
    _, many = stored(dicom(np.stack([RAMP, RAMP[::-1]])))
    assert one == many


@pytest.mark.parametrize(
    ("size", "fills"), [((640, 480), (160, 120)), ((641, 477), (160.25, 119.25)), ((200, 150), (200, 150))]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_decoded_no_larger_than_needed_and_shows_the_same(mode, size, fills):
    data = saved(photograph(*size, seed=0).convert(mode), "JPEG", quality=90)
    small, whole = codec.decode_small(data, at_least=96), codec.decode(data)
    assert (whole.size, (small.width, small.height), small.image.mode) == (size, fills, "RGB")
    found = small.image.resize((96, 96), Image.Resampling.BICUBIC, box=(0, 0, *fills))
    difference = np.asarray(found, float) - np.asarray(
        whole.resize((96, 96), Image.Resampling.BICUBIC), float
    )
    assert np.abs(difference).mean() < 0.5, "of 255"


def test_other_formats_and_turned_ones_are_decoded_whole():
    image = photograph(640, 480, seed=0)
    assert codec.decode_small(saved(image, "PNG"), at_least=96)[1:] == (640, 480)
    turned = image.getexif()
    turned[0x0112] = 6
    assert codec.decode_small(saved(image, "JPEG", exif=turned), at_least=96)[1:] == (480, 640)
