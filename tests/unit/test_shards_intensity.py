"""One rule for black and white a dataset, and every depth and layout of pixels read with all its bits."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards import CsvSource, FolderSource, Index, InputError, ShardOptions, codec, write
from shards.intensity import Deep, measure, outliers, show, windows

RNG = np.random.default_rng(0)


def png16(pixels: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG of a colour type that Pillow does not write (2: RGB, 4: grey and alpha, 6: RGBA)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def tiff(pixels: np.ndarray, *, photometric: int, kind: int = 1, order: str = "<", planar: int = 1) -> bytes:
    """An uncompressed TIFF of one strip. kind: 1 unsigned, 2 signed, 3 float."""
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    bits = pixels.dtype.itemsize * 8
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    if planar == 2:
        data = b"".join(
            pixels[..., c].astype(pixels.dtype.newbyteorder(order)).tobytes() for c in range(channels)
        )
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels), (259, 3, [1])]
    each = len(data) // channels
    strips = [8 + each * c for c in range(channels)] if planar == 2 else [8]
    counts = [each] * channels if planar == 2 else [len(data)]
    tags += [(262, 3, [photometric]), (273, 4, strips), (277, 3, [channels]), (278, 4, [height])]
    tags += [(279, 4, counts), (284, 3, [planar]), (339, 3, [kind] * channels)]
    start = 8 + len(data)
    after = start + 2 + 12 * len(tags) + 4
    extra, directory = b"", struct.pack(order + "H", len(tags))
    for tag, type_, values in tags:
        code = {3: "H", 4: "I"}[type_]
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            place = struct.pack(order + "I", after + len(extra))
            extra += packed
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, type_, len(values)) + place
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", start) + data + directory + bytes(4) + extra


def loaded(data: bytes) -> Deep:
    image = codec.load(data).image
    assert isinstance(image, Deep)
    return image


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_all_bits_of_sixteen_bit_png(colour: int, channels: int) -> None:
    pixels = RNG.integers(0, 65536, (9, 13, channels)).astype(np.uint16)
    expected = pixels[..., 0] if colour == 4 else pixels[..., :3]
    assert np.array_equal(loaded(png16(pixels, colour)).values, expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
def test_all_bits_of_sixteen_bit_grey_tiff(order: str, compression: str | None) -> None:
    pixels = RNG.integers(0, 65536, (9, 13)).astype(np.uint16)
    if compression is None:
        data = tiff(pixels, photometric=1, order=order)
    else:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "TIFF", compression=compression)
        data = out.getvalue()
    assert np.array_equal(loaded(data).values, pixels)


@pytest.mark.parametrize("order", ["<", ">"])
def test_all_bits_of_sixteen_bit_colour_tiff(order: str) -> None:
    pixels = RNG.integers(0, 65536, (9, 13, 3)).astype(np.uint16)
    assert np.array_equal(loaded(tiff(pixels, photometric=2, order=order)).values, pixels)


def test_colour_in_planes_is_read_rightly_or_refused() -> None:
    pixels = RNG.integers(0, 65536, (9, 13, 3)).astype(np.uint16)
    try:
        found = codec.load(tiff(pixels, photometric=2, planar=2)).image
    except codec.Unreadable:
        return
    assert isinstance(found, Deep) and np.array_equal(found.values, pixels)


@pytest.mark.parametrize(
    ("dtype", "kind", "values"),
    [
        (np.int16, 2, [-32768, -1, 0, 32767]),
        (np.uint32, 1, [0, 1, 2**31, 2**32 - 1]),
        (np.int32, 2, [-(2**31), -1, 0, 2**31 - 1]),
        (np.float32, 3, [-1.5, 0, 0.25, 1e6]),
        (np.float64, 3, [-1.5, 0, 0.25, 1e6]),
        (np.int8, 2, [-128, -1, 0, 127]),
        (np.float16, 3, [-1.5, 0, 0.25, 1000]),
    ],
)
def test_numbers_of_any_type_are_what_they_are_or_refused(dtype: Any, kind: int, values: list[float]) -> None:
    pixels = np.array([values] * 3, dtype)
    try:
        found = codec.load(tiff(pixels, photometric=1, kind=kind)).image
    except codec.Unreadable as refused:
        assert "SampleFormat" in str(refused)
        assert dtype in (np.float16, np.float64)  # Pillow does not read them
        return
    assert (
        isinstance(found, Deep) and found.values.astype(np.float64).tolist() == pixels.astype(float).tolist()
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_white_is_zero_is_shown_inverted_at_every_depth(dtype: Any) -> None:
    ramp = np.tile(np.linspace(0, np.iinfo(dtype).max, 64).astype(dtype), (8, 1))
    shown = []
    for photometric in (0, 1):
        image = codec.load(tiff(ramp, photometric=photometric)).image
        shown.append(np.asarray(show(image) if isinstance(image, Deep) else image).astype(int))
    assert shown[1][0, 0] == 0 and shown[1][0, -1] == 255
    assert np.abs(shown[0] + shown[1] - 255).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_turns_deep_pixels_as_it_turns_others(orientation: int) -> None:
    pixels = RNG.integers(0, 256, (5, 7)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = []
    for values in (pixels, pixels.astype(np.uint16) * 257):
        out = io.BytesIO()
        Image.fromarray(values).save(out, "PNG", exif=exif)
        image = codec.load(out.getvalue()).image
        found.append(image.values // 257 if isinstance(image, Deep) else np.asarray(image))
    assert np.array_equal(*found) and (orientation == 1 or not np.array_equal(found[0], pixels))


def test_an_image_that_is_in_its_alpha_channel_alone_is_refused() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6, 3] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    with pytest.raises(codec.Unreadable, match="alpha channel"):
        codec.load(out.getvalue())


def levels(*arrays: np.ndarray) -> list[Any]:
    return [measure(Deep(array)) for array in arrays]


def ramp(low: float, high: float, dtype: Any = np.int32) -> np.ndarray:
    return np.tile(np.linspace(low, high, 1000), (10, 1)).astype(dtype)


def test_the_window_is_that_of_all_pixels_every_image_weighing_alike() -> None:
    small, large = ramp(0, 1000), np.repeat(ramp(3000, 4000), 50, axis=0)
    black, white = windows(levels(small, large))["values"]
    pooled = np.quantile(np.concatenate([small.ravel(), ramp(3000, 4000).ravel()]), [0.001, 0.999])
    assert black == pytest.approx(pooled[0], abs=8) and white == pytest.approx(pooled[1], abs=8)


def test_one_hot_pixel_or_one_image_of_another_kind_darkens_no_other() -> None:
    others = [ramp(0, 4000 + number) for number in range(9)]
    spoilt = others[0].copy()
    spoilt[0, 0] = 65535
    for odd in (spoilt, ramp(0, 65535), ramp(0, 1, np.float32)):
        white = windows(levels(*others, odd))["values"][1]
        assert 3950 < white < 4020
    assert outliers(levels(*others, ramp(0, 65535))).tolist() == [False] * 9 + [True]
    assert not outliers(levels(*others, spoilt)).any()


def test_signed_and_unsigned_slices_share_a_scale() -> None:
    both = windows(levels(ramp(0, 3000, np.uint16), ramp(-1000, 2000, np.int16)))["values"]
    assert both[0] == pytest.approx(-1000, abs=15) and both[1] == pytest.approx(3000, abs=15)


def test_floats_from_zero_to_one_are_a_kind_of_their_own() -> None:
    found = windows(levels(ramp(0, 1, np.float32), ramp(0, 4000, np.uint16)))
    assert found["unit"] == pytest.approx((0, 1), abs=0.01) and found["values"] == pytest.approx(
        (0, 4000), abs=10
    )


def test_eight_bit_values_in_wider_files_are_as_in_eight_bits() -> None:
    assert windows(levels(ramp(3, 250, np.uint16)))["values"] == (0, 255)
    assert windows(levels(ramp(0, 16, np.uint16)))["values"][1] == pytest.approx(15, abs=0.1)


def test_flat_images_have_a_window_too() -> None:
    black, white = windows(levels(np.full((4, 4), 7, np.uint16)))["values"]
    assert black < white


def sharded(root: Path, images: dict[str, np.ndarray], **options: Any) -> Index:
    lines = ["path,label"]
    for number, (name, pixels) in enumerate(sorted(images.items())):
        (root / "in").mkdir(exist_ok=True)
        (root / "in" / name).write_bytes(tiff(pixels, photometric=1, kind=kind_of(pixels)))
        lines.append(f"{name},{'ab'[number % 2]}")
    (root / "in" / "labels.csv").write_text("\n".join(lines))
    return write(CsvSource(root / "in"), root / "out", ShardOptions(**options))


def kind_of(pixels: np.ndarray) -> int:
    return {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]


def shown(index: Index, name: str) -> np.ndarray:
    row = int(np.flatnonzero(index.samples["path"] == name)[0])
    return np.asarray(index.decode(row))[..., 0].astype(int)


def noise(high: int, number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, high, (24, 24)).astype(np.uint16)


def test_the_dataset_says_its_window_and_keeps_it(tmp_path: Path) -> None:
    images = {f"{number:02}.tif": noise(4096, number) for number in range(16)}
    index = sharded(tmp_path, images)
    black, white = index.meta["intensity"]["values"]
    assert 0 <= black < 20 and 4070 < white <= 4095
    expected = np.clip((images["03.tif"].astype(float) - black) / (white - black) * 255, 0, 255)
    assert np.abs(shown(index, "03.tif") - expected).max() <= 0.51
    assert any(
        "16 images of more than 8 bits" in line and "black to white" in line for line in index.warnings
    )


def test_a_given_intensity_is_obeyed_and_must_be_one(tmp_path: Path) -> None:
    images = {f"{number:02}.tif": noise(4096, number) for number in range(16)}
    index = sharded(tmp_path, images, intensity=(1000.0, 2000.0))
    found = shown(index, "05.tif")
    assert index.meta["intensity"] == {"values": [1000.0, 2000.0]}
    assert (found[images["05.tif"] <= 1000] == 0).all() and (found[images["05.tif"] >= 2000] == 255).all()
    with pytest.raises(InputError, match="black 5 must be below white 5"):
        ShardOptions(intensity=(5, 5))


def test_what_looks_wrong_is_told_of(tmp_path: Path) -> None:
    images = {f"{number:02}.tif": noise(300, number) for number in range(16)}
    images["15.tif"] = noise(65536, 99)
    warnings = sharded(tmp_path, images).warnings
    assert any("1 of them reach far beyond the others, such as 15.tif" in line for line in warnings)
    wide = {name: pixels for name, pixels in images.items() if name != "15.tif"}
    (tmp_path / "wide").mkdir()
    warnings = sharded(tmp_path / "wide", wide, intensity=(0.0, 65535.0)).warnings
    assert any("the median of these images uses 0% of the range" in line for line in warnings)


def test_dark_images_of_eight_bits_are_told_of(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "in" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 16, (16, 16), np.uint8)).save(path)
    warnings = write(FolderSource(tmp_path / "in"), tmp_path / "out").warnings
    assert any("the median image of 8 bits a channel uses" in line for line in warnings)
