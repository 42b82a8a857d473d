"""Decoded images in a file on the node's own disk, made once for all processes there and kept for later ones.

The file has a place for every row of a shard folder at one size. Whoever needs a row decodes it, unless
somebody has: a byte a row in a second file says which are there. Ranks, and tasks that read the same images
at the same time, share the work by locking a block of rows each, begin in different places, and what one
leaves undone by dying another does. The operating system keeps in memory, once for all, what is read often.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch

import pipeline
from pipeline.errors import UserError

FOLDER_VARIABLE = "CASS_CACHE"
BLOCK = 256  # rows that are locked, decoded and put on disk at a time


class DiskCache:
    """Squares of the rows of one shard folder.

    Args:
        name: what the pixels depend on besides the versions of this package and of Pillow; JSON.
        rows: of the shard folder.
        shape: (C, S, S) of a row.
        folder: where the files lie; default: :func:`cache_folder`.

    Raises:
        UserError: the folder belongs to somebody else or cannot be written.
    """

    def __init__(
        self, name: dict[str, object], *, rows: int, shape: tuple[int, int, int], folder: Path | None = None
    ) -> None:
        versions = {"pipeline": pipeline.__version__, "pillow": PIL.__version__, "shape": shape}
        digest = hashlib.sha256(json.dumps({**name, **versions}, sort_keys=True).encode()).hexdigest()
        self.path = (folder or cache_folder()) / f"{digest[:32]}.pixels"
        self._bytes = int(np.prod(shape))
        with _writing(self.path):
            self._pixels = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            done = self.path.with_suffix(".done")
            self._done = os.open(done, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._pixels, rows * self._bytes)
            os.ftruncate(self._done, rows)
        mapped = np.memmap(self.path, np.uint8, "r+", shape=(rows, *shape))
        self.pixels = torch.from_numpy(mapped)  # (rows, C, S, S); what nobody has decoded is black
        self._rows = rows

    def __del__(self) -> None:
        for name in ("_pixels", "_done"):
            if name in self.__dict__:
                os.close(self.__dict__[name])

    def fill(self, rows: np.ndarray, decode: Callable[[np.ndarray], torch.Tensor]) -> None:
        """See to it that some rows are there.

        Args:
            rows: (N,) row numbers.
            decode: (B,) row numbers → (B, C, S, S) uint8.

        Raises:
            UserError: the disk is full.
        """
        rows = np.unique(rows)
        blocks = np.unique(rows // BLOCK)
        if not len(blocks):
            return
        begin = os.getpid() % len(blocks)
        waiting = []
        for block in np.roll(blocks, -begin).tolist():
            if not self._fill_block(block, rows, decode, wait=False):
                waiting.append(block)
        for block in waiting:
            self._fill_block(block, rows, decode, wait=True)

    def _fill_block(
        self, block: int, rows: np.ndarray, decode: Callable[[np.ndarray], torch.Tensor], *, wait: bool
    ) -> bool:
        """Decode what is missing of a block. Returns False if somebody else is at it and we do not wait."""
        first = block * BLOCK
        count = min(BLOCK, self._rows - first)
        wanted = rows[(rows >= first) & (rows < first + count)]
        if len(self._missing(wanted)) == 0:
            return True
        with self._locked(first, count, wait=wait) as ours:
            if not ours:
                return False
            missing = self._missing(wanted)
            if len(missing):
                pixels = decode(missing).numpy()
                with _writing(self.path):
                    for row, square in zip(missing.tolist(), pixels, strict=True):
                        _write(self._pixels, square.tobytes(), row * self._bytes)
                    os.fdatasync(self._pixels)  # before it is said to be there: a loss of power leaves no gap
                    for row in missing.tolist():
                        _write(self._done, b"\x01", row)
        return True

    def _missing(self, rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return rows
        first = int(rows[0])
        done = np.frombuffer(os.pread(self._done, int(rows[-1]) + 1 - first, first), np.uint8)
        return rows[done[rows - first] == 0]

    @contextmanager
    def _locked(self, first: int, count: int, *, wait: bool) -> Iterator[bool]:
        """Hold the bytes of some rows; the system lets go of them if this process dies."""
        try:
            fcntl.lockf(self._done, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), count, first)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._done, fcntl.LOCK_UN, count, first)


def cache_folder() -> Path:
    """``CASS_CACHE``, or a folder of this user's alone where temporary files go (``TMPDIR``, else /tmp).

    Raises:
        UserError: it cannot be made, or belongs to another user.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"cass-cache-{os.getuid()}"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.lstat() if not chosen else folder.stat()
    if not stat.S_ISDIR(found.st_mode) or (not chosen and found.st_uid != os.getuid()):
        raise UserError(
            f"{folder} is no folder of yours: set {FOLDER_VARIABLE} to one where decoded images may be kept"
        )
    return folder


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"decoded images cannot be kept at {path} (cache: disk): {error.strerror}. Set {FOLDER_VARIABLE}"
            " to a folder with room on the node's own disk, or cache to ram or none"
        ) from None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """All of it, where a call may write a part."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
