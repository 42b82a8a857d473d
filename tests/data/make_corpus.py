"""Makes images and tars that a reader must survive: `python tests/data/make_corpus.py FOLDER`.

Nothing of it is random: the same files every time (but for what another Pillow compresses otherwise).
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

TIB = 1 << 40
Member = tuple[tarfile.TarInfo, bytes]


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """Red grows to the right, green downwards; no two sides alike."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header gives any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )


def tiff_that_claims(width: int, height: int) -> bytes:
    """An uncompressed 8-bit grey TIFF of one strip, which is not there."""
    entries = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries.append((279, min(width * height, 2**32 - 1)))
    directory = struct.pack("<H", len(entries))
    for tag, value in entries:
        directory += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0)


def bmp_that_claims(width: int, height: int) -> bytes:
    content = bytearray(saved(gradient(), "BMP"))
    struct.pack_into("<ii", content, 18, width, height)
    return bytes(content)


def png_with_text_bomb() -> bytes:
    """A PNG whose compressed comment becomes 64 MiB."""
    sound = saved(gradient(), "PNG")
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9))
    return sound[:33] + text + sound[33:]


def moving(format: str) -> bytes:
    """Two frames: the gradient, then black."""
    frames = [Image.new("RGB", gradient().size)]
    return saved(gradient(), format, save_all=True, append_images=frames, duration=100)


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    return saved(gradient(), "JPEG", exif=exif, quality=95)


def transparent_palette() -> bytes:
    image = gradient().quantize(16)
    return saved(image, "PNG", transparency=bytes(range(0, 256, 16)))


def png_with_metadata() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 1000)
    return saved(gradient(), "PNG", pnginfo=info, dpi=(0, 0))


def images() -> dict[str, bytes]:
    """Every odd image by its file name."""
    grey16 = Image.fromarray((np.arange(24 * 16, dtype=np.uint16) * 100).reshape(16, 24))
    jpeg, png = saved(gradient(), "JPEG", quality=95), saved(gradient(), "PNG")
    tiff, webp = saved(gradient(), "TIFF"), saved(gradient(), "WEBP", lossless=True)
    return {
        "cmyk.jpg": saved(gradient().convert("CMYK"), "JPEG", quality=95),
        "one.png": saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"),
        "wide.png": saved(gradient(20000, 1), "PNG"),
        "tall.jpg": saved(gradient(1, 20000), "JPEG"),
        "moving.webp": moving("WEBP"),
        "moving.png": moving("PNG"),
        "moving.gif": moving("GIF"),
        "turned.jpg": turned_jpeg(),
        "grey16.png": saved(grey16, "PNG"),
        "grey16.tif": saved(grey16, "TIFF"),
        "palette.png": transparent_palette(),
        "metadata.png": png_with_metadata(),
        "png_called.jpg": png,
        "gif_called.png": moving("GIF"),
        "text_called.png": b"no image",
        "empty.png": b"",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "cut.tif": tiff[: len(tiff) // 2],
        "cut.webp": webp[: len(webp) // 2],
        "bomb.png": png_that_claims(60_000, 60_000),
        "bomb.tif": tiff_that_claims(100_000, 100_000),
        "bomb.bmp": bmp_that_claims(30_000, 30_000),
        "claims.png": png_that_claims(9_000, 9_000),
        "claims.tif": tiff_that_claims(9_000, 9_000),
        "text_bomb.png": png_with_text_bomb(),
    }


def special_files(folder: Path) -> None:
    """Names of images behind which there is no image: a pipe, an endless device, holes, a broken link."""
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to("nothing.png")
    with open(folder / "holes.png", "wb") as file:
        file.truncate(TIB)


def members_of(tar: bytes) -> list[Member]:
    """The files of a sound tar."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        found = [(info, file.extractfile(info)) for info in file]
    return [(info, content.read()) for info, content in found if content is not None]


def packed(members: list[Member], *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these members as they are, whatever their headers say of the content."""
    out = io.BytesIO()
    for info, content in members:
        out.write(info.tobuf(format=format))
        out.write(content + bytes(-len(content) % 512))
    return out.getvalue() + bytes(1024)


def with_first(members: list[Member], **changes: object) -> list[Member]:
    """The first file's header changed, its content kept."""
    info, content = members[0]
    other = tarfile.TarInfo(info.name)
    other.size, other.mode = info.size, info.mode
    for name, value in changes.items():
        setattr(other, name, value)
    return [(other, content), *members[1:]]


def sparse(members: list[Member]) -> bytes:
    """The first file as GNU sparse: a few bytes of content, holes of a TiB."""
    header = bytearray(
        with_first(members, type=tarfile.GNUTYPE_SPARSE)[0][0].tobuf(format=tarfile.GNU_FORMAT)
    )
    size = members[0][0].size
    struct.pack_into("12s12s", header, 386, f"{0:011o}".encode(), f"{size:011o}".encode())
    header[483:495] = b"\x80" + TIB.to_bytes(11, "big")
    return checked(header) + packed(members)[512:]


def checked(header: bytearray) -> bytes:
    """A header with the right checksum."""
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def claiming(members: list[Member], size: int) -> bytes:
    """The first file's header gives this size (in base 256, so that any number fits)."""
    header = bytearray(members[0][0].tobuf(format=tarfile.USTAR_FORMAT))
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    header[124] |= 0x80
    return checked(header) + packed(members)[512:]


def pax(members: list[Member], **headers: str) -> bytes:
    """A PAX header before the first file that overrides what its own header says."""
    info, content = members[0]
    info = with_first(members)[0][0]
    info.pax_headers = headers
    return packed([(info, content)], format=tarfile.PAX_FORMAT)[:-1024] + packed(members[1:])


HOSTILE_TARS: dict[str, Callable[[list[Member]], bytes]] = {
    "name above the folder": lambda m: packed(with_first(m, name="../../escaped.png")),
    "absolute name": lambda m: packed(with_first(m, name="/tmp/escaped.png")),
    "symbolic link": lambda m: packed(with_first(m, type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard link": lambda m: packed(with_first(m, type=tarfile.LNKTYPE, linkname="/etc/passwd")),
    "device": lambda m: packed(with_first(m, type=tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "pipe": lambda m: packed(with_first(m, type=tarfile.FIFOTYPE)),
    "folder": lambda m: packed(with_first(m, type=tarfile.DIRTYPE)),
    "sparse": sparse,
    "sparse by PAX": lambda m: pax(
        m, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(TIB)}
    ),
    "path by PAX": lambda m: pax(m, path="../../escaped.png"),
    "size by PAX": lambda m: pax(m, size=str(TIB)),
    "long GNU name": lambda m: packed(with_first(m, name="x" * 200), format=tarfile.GNU_FORMAT),
    "size too large": lambda m: claiming(m, TIB),
    "size of 2^90": lambda m: claiming(m, 1 << 90),
    "size below zero": lambda m: claiming(m, -512),
    "size too small": lambda m: packed(with_first(m, size=1)),
    "wrong checksum": lambda m: packed(m)[:150] + b"9" + packed(m)[151:],
    "another order": lambda m: packed([*m[2:], *m[:2]]),
    "every file twice": lambda m: packed([member for member in m for _ in range(2)]),
    "no tar": lambda m: b"no tar" * 1000,
    "nothing but zeros": lambda m: bytes(len(packed(m))),
    "empty": lambda m: b"",
    "cut in the first header": lambda m: packed(m)[:100],
    "compressed": lambda m: gzip.compress(packed(m) + bytes(32 << 20), mtime=0),
}
# What follows the last sample: readers of samples never come there, but `verify` must see it.
HOSTILE_ENDS: dict[str, Callable[[list[Member]], bytes]] = {
    "a sample again": lambda m: packed([*m, *m[:2]]),
    "another file": lambda m: packed([*m, (tarfile.TarInfo("../escaped.png"), b"")]),
    "a link": lambda m: packed([*m, *with_first(m, type=tarfile.SYMTYPE, linkname="/etc", size=0)[:1]]),
    "more after the end": lambda m: packed(m) + b"more" * 300,
    "no end": lambda m: packed(m)[:-1024],
}


def main(folder: Path) -> None:
    """Write all images, special files and tars below a folder."""
    for below in ("images", "tars"):
        (folder / below).mkdir(parents=True)
    for name, content in images().items():
        (folder / "images" / name).write_bytes(content)
    special_files(folder / "images")
    sound = []
    for suffix, content in (("png", saved(gradient(), "PNG")), ("json", b'{"labels": ["a"]}')):
        info = tarfile.TarInfo(f"sample.{suffix}")
        info.size = len(content)
        sound.append((info, content))
    for name, make in {**HOSTILE_TARS, **HOSTILE_ENDS}.items():
        (folder / "tars" / f"{name.replace(' ', '_')}.tar").write_bytes(make(sound))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
