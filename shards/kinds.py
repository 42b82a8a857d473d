"""Kinds of files by what they begin with, whatever they are called."""

from __future__ import annotations

import re
import zlib

from shards.dicom import is_dicom

HEAD = 512  # bytes that tell
READ = "read"  # a kind that is decoded
_MARKS: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, kind; READ: one that is decoded
    (0, b"\xff\xd8\xff", READ),
    (0, b"\x89PNG\r\n\x1a\n", READ),
    (0, b"GIF87a", READ),
    (0, b"GIF89a", READ),
    (0, b"II*\0", READ),
    (0, b"MM\0*", READ),
    (0, b"II+\0", READ),
    (0, b"MM\0+", READ),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", READ),  # JPEG 2000
    (0, b"\xff\x4f\xff\x51", READ),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"hevc", b"hevx", b"hevm", b"hevs")),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"NRRD", "NRRD"),
    (0, b"ObjectType =", "MetaImage"),
    (344, b"n+1\0", "NIfTI"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x01\xda\x00", "SGI"),
    (0, b"\x01\xda\x01", "SGI"),
    (0, b"icns", "Icon"),
    (0, b"DDS ", "DDS"),
    (0, b"qoif", "QOI"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"FLIF", "FLIF"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"#?RADIANCE", "Radiance"),
)
_NETPBM = re.compile(rb"P[1-7]\s+(#[^\n]*\n\s*)*(\d+|WIDTH)\s")
_ICON = re.compile(rb"\0\0[\1\2]\0[\1-\x40]\0", re.S)  # 1 to 64 icons, or cursors


def kind_of(head: bytes) -> str:
    """What a file with this beginning is.

    Args:
        head: its first 512 bytes, or all of it.

    Returns:
        ``read``: an image that is decoded; the name of a kind of images that is not; empty for no image.
    """
    if is_dicom(head):
        return READ
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return READ
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return READ
    if head[:2] == b"\x1f\x8b":
        return _kind_of_compressed(head)
    if _NETPBM.match(head):
        return "Netpbm"
    if _ICON.match(head):
        return "Icon"
    return next((kind for at, mark, kind in _MARKS if head[at : at + len(mark)] == mark), "")


def _kind_of_compressed(head: bytes) -> str:
    """The kind of what gzip has compressed, from its beginning; empty for no image."""
    try:
        kind = kind_of(zlib.decompressobj(wbits=31).decompress(head, HEAD))
    except zlib.error:
        return ""
    return f"{'image' if kind == READ else kind} compressed by gzip" if kind else ""
