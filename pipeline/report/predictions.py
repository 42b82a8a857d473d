"""Reading predictions.npz: once, with the check against the receipt on the bytes that are read."""

from __future__ import annotations

import functools
import io
import struct

import numpy as np

from pipeline.manifest import read_sound
from pipeline.stages.work import Entry

Prediction = tuple[np.ndarray, np.ndarray, np.ndarray]  # probabilities (N, K), targets, rows of samples.csv
LOCAL_HEADER = struct.Struct("<4s2xHH8xLLHH")  # signature, flags, method, sizes, lengths of name and extra
SIGNATURE = b"PK\x03\x04"
STREAMED = 0x08  # flag: the sizes stand after the member
IN_EXTRA = 0xFFFFFFFF  # the size stands in the extra field


def read_prediction(entry: Entry) -> Prediction:
    """What a finished fine-tuning predicted for its test split.

    Raises:
        pipeline.manifest.Damaged: the file is missing or not what the receipt says.
    """
    assert entry.receipt is not None
    name = "predictions.npz"
    content = read_sound(entry.folder, entry.receipt, name)
    arrays = _stored_arrays(content) if name in entry.receipt.files else None
    if arrays is None:
        with np.load(io.BytesIO(content)) as opened:
            arrays = dict(opened)
    return arrays["probabilities"], arrays["targets"], arrays["rows"]


def _stored_arrays(content: bytes) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz as numpy's ``savez`` writes it, without copying; None for any other.

    For a small file, ``np.load`` takes twenty times as long. It also compares checksums, which is not needed
    where the bytes have been compared with the receipt's SHA-256.
    """
    arrays = {}
    at = 0
    while content.startswith(SIGNATURE, at):
        _, flags, method, size, whole, name, extra = LOCAL_HEADER.unpack_from(content, at)
        start = at + LOCAL_HEADER.size + name
        if whole == IN_EXTRA:
            size = int.from_bytes(content[start + 12 : start + 20], "little")
        if flags & STREAMED or method:
            return None
        label = content[start - name : start].decode().removesuffix(".npy")
        start += extra
        header = 10 + int.from_bytes(content[start + 8 : start + 10], "little")
        dtype, shape, fortran = _layout(content[start : start + header])
        array = np.frombuffer(content, dtype, int(np.prod(shape)), start + header)
        arrays[label] = array.reshape(shape, order="F" if fortran else "C")
        at = start + size
    return arrays


@functools.lru_cache(maxsize=1000)
def _layout(header: bytes) -> tuple[np.dtype, tuple[int, ...], bool]:
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype, shape, fortran
