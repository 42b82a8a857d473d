"""Kinds of files by what they begin with, whatever they are called."""

from __future__ import annotations

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
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypavif", "AVIF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x93NUMPY", "NumPy"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"NRRD", "NRRD"),
    (0, b"ObjectType =", "MetaImage"),
    (344, b"n+1\0", "NIfTI"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x01\xda\x01", "SGI"),
)


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
    return next((kind for at, mark, kind in _MARKS if head[at : at + len(mark)] == mark), "")
