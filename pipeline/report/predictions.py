"""Reading predictions.npz: once, with the check against the receipt on the bytes that are read.

The arrays that a file holds say which kind of labels it is for, and so what its metrics are made of.
"""

from __future__ import annotations

import functools
import io
import struct
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pipeline.evaluate.protocols import METRICS_OF
from pipeline.manifest import Damaged, read_sound
from pipeline.stages.work import Entry

BOX_METRICS = 3  # of those of detection, which stand first; the others need masks
LOCAL_HEADER = struct.Struct("<4s2xHH8xLLHH")  # signature, flags, method, sizes, lengths of name and extra
SIGNATURE = b"PK\x03\x04"
STREAMED = 0x08  # flag: the sizes stand after the member
MOST_UNFOLDED = 100  # times its own size that an .npz made elsewhere may unfold into
_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AssertionError,
    IndexError,
    OverflowError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
)
IN_EXTRA = 0xFFFFFFFF  # the size stands in the extra field


class Classified(NamedTuple):
    """Of N images and K classes.

    Attributes:
        probabilities: (N, K).
        targets: int (N,), or (N, K) of 0 and 1.
        rows: int (N,), of samples.csv.
    """

    probabilities: np.ndarray
    targets: np.ndarray
    rows: np.ndarray

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that exist for these labels."""
        return METRICS_OF["multilabel" if self.targets.ndim == 2 else "multiclass"]

    @property
    def truth(self) -> np.ndarray:
        """What all predictions of one test split have in common."""
        return self.targets

    @property
    def classes(self) -> int:
        return self.probabilities.shape[1]

    @property
    def values(self) -> int:
        """How many numbers are in memory."""
        return self.probabilities.size


class Segmented(NamedTuple):
    """Of N images and K classes, pixels counted by class; the counts of an image's confusion add up to them.

    Attributes:
        right, true, predicted: int64 (N, K): pixels of a class that were predicted as it, all that are of
            it, and all that were predicted as it.
        rows: int (N,), of samples.csv.
    """

    right: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    rows: np.ndarray

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that exist for these labels."""
        return METRICS_OF["segmentation"]

    @property
    def truth(self) -> np.ndarray:
        """What all predictions of one test split have in common: not the pixels, whose number is a choice."""
        return self.rows

    @property
    def classes(self) -> int:
        return self.true.shape[1]

    @property
    def values(self) -> int:
        """How many numbers are in memory."""
        return 3 * self.true.size


class Detections(NamedTuple):
    """D detections in N images.

    Attributes:
        image: int (D,), places 0 to N - 1 in the test split.
        label: int (D,), classes.
        score: float (D,).
        match: int8 (D, 10), at an IoU of .50, .55, … .95: 1 found an object, 0 none, -1 not counted.
    """

    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    match: np.ndarray


class Detected(NamedTuple):
    """Of N images and K classes.

    Attributes:
        boxes: matched by their boxes.
        masks: the detections matched by their masks, where there are any.
        truth: int (N, K), objects that are there.
        rows: int (N,), of samples.csv.
    """

    boxes: Detections
    masks: Detections | None
    truth: np.ndarray
    rows: np.ndarray

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that exist for these labels."""
        return METRICS_OF["detection"][: BOX_METRICS if self.masks is None else None]

    @property
    def classes(self) -> int:
        return self.truth.shape[1]

    @property
    def values(self) -> int:
        """How many numbers are in memory."""
        both = [self.boxes, *([] if self.masks is None else [self.masks])]
        return self.truth.size + sum(array.size for detections in both for array in detections)


Prediction = Classified | Segmented | Detected


def prediction_of(arrays: Mapping[str, np.ndarray]) -> Prediction:
    """What the arrays of a predictions.npz say (docs/formats.md), in the form its metrics are made of."""
    rows = arrays["rows"]
    if "confusion" in arrays:
        confusion = arrays["confusion"]  # (N, K, K), truth × prediction
        right = np.diagonal(confusion, axis1=1, axis2=2).astype(np.int64)
        true, predicted = (confusion.sum(axis=axis, dtype=np.int64) for axis in (2, 1))
        return Segmented(right, true, predicted, rows)
    if "detection_match" in arrays:
        masks = _detections(arrays, "mask_detection") if "mask_detection_match" in arrays else None
        return Detected(_detections(arrays, "detection"), masks, arrays["truth_count"], rows)
    classified = Classified(arrays["probabilities"], arrays["targets"], rows)
    if classified.probabilities.ndim != 2 or not all(len(part) == len(rows) for part in classified):
        raise ValueError("its arrays do not fit together")
    whole = classified.targets.dtype.kind + rows.dtype.kind
    if classified.probabilities.dtype.kind != "f" or not set(whole) <= set("iub"):
        raise ValueError("its arrays are not numbers")
    return classified


def _detections(arrays: Mapping[str, np.ndarray], prefix: str) -> Detections:
    return Detections(*(arrays[f"{prefix}_{name}"] for name in ("image", "class", "score", "match")))


def read_prediction(entry: Entry) -> Prediction:
    """What a finished fine-tuning predicted for its test split.

    Raises:
        pipeline.manifest.Damaged: the file is missing or not what the receipt says.
    """
    assert entry.receipt is not None
    name = "predictions.npz"
    content = read_sound(entry.folder, entry.receipt, name)
    try:
        arrays = _stored_arrays(content) if name in entry.receipt.files else None
        return prediction_of(_packed_arrays(content) if arrays is None else arrays)
    except _UNREADABLE as error:
        kind = " ".join(f"{type(error).__name__}: {error}".split())
        raise Damaged(f"{entry.folder}/{name}: no predictions as docs/formats.md says ({kind})") from None


def _packed_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of any other .npz, without pickles; one that unfolds into far more is refused."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        unfolded = sum(member.file_size for member in archive.infolist())
    if unfolded > max(MOST_UNFOLDED * len(content), 1 << 24):
        raise ValueError(f"{len(content)} bytes unfold into {unfolded}")
    with np.load(io.BytesIO(content), allow_pickle=False) as opened:
        return dict(opened)


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
