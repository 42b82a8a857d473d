"""Decoded images in a file on the node's own disk, made once for all processes there and kept for later ones.

The file has a place for every row of a shard folder at one size, and behind them a byte a row that says
whether it is there. Whoever needs a row decodes it, unless somebody has. Ranks, and tasks that read the same
images at the same time, share the work by locking the bytes of some rows each, begin in different places, and
what one leaves undone by dying another does. The operating system keeps in memory, once for all, what is read
often.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import platform
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
AT_A_TIME = 256  # rows that are decoded and put on disk while others wait for them


class DiskCache:
    """Squares of the rows of one shard folder.

    Args:
        name: what the pixels depend on besides this package, Pillow and torch, each in its version; JSON.
        rows: of the shard folder.
        shape: (C, S, S) of a row.

    Attributes:
        path: of the file. Its name holds the node's too: a folder that nodes share costs room, no more.
        pixels: (rows, C, S, S) uint8, read as it is needed; what nobody has decoded is black.

    Raises:
        UserError: the folder belongs to somebody else or cannot be written.
    """

    def __init__(self, name: dict[str, object], *, rows: int, shape: tuple[int, int, int]) -> None:
        made_by = {"pipeline": pipeline.__version__, "pillow": PIL.__version__, "torch": torch.__version__}
        whole = {**name, **made_by, "shape": shape, "node": platform.node()}
        digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
        self.path = cache_folder() / f"{digest[:32]}.squares"
        self._bytes = int(np.prod(shape))
        self._flags = rows * self._bytes  # where the byte of the first row is
        with _writing(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._file, self._flags + rows)
            mapped = mmap.mmap(self._file, self._flags, prot=mmap.PROT_READ)
        self.pixels = np.frombuffer(mapped, np.uint8).reshape(rows, *shape)

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            os.close(self._file)

    def fill(self, rows: np.ndarray, decode: Callable[[np.ndarray], torch.Tensor]) -> None:
        """See to it that some rows are there.

        Args:
            rows: (N,) row numbers.
            decode: (B,) row numbers → (B, C, S, S) uint8.

        Raises:
            UserError: the disk is full.
        """
        missing = self._missing(np.unique(rows))
        parts = [missing[first : first + AT_A_TIME] for first in range(0, len(missing), AT_A_TIME)]
        begin = os.getpid() % max(1, len(parts))
        busy = [part for part in parts[begin:] + parts[:begin] if not self._fill(part, decode, wait=False)]
        for part in busy:
            self._fill(part, decode, wait=True)

    def _fill(self, rows: np.ndarray, decode: Callable[[np.ndarray], torch.Tensor], *, wait: bool) -> bool:
        """Decode what is missing of some rows. Returns False if somebody else is at it and we do not wait."""
        with self._locked(rows, wait=wait) as ours:
            if not ours:
                return False
            missing = self._missing(rows)
            if len(missing):
                pixels = decode(missing).numpy()
                with _writing(self.path):
                    for row, square in zip(missing.tolist(), pixels, strict=True):
                        _write(self._file, square.tobytes(), row * self._bytes)
                    os.fdatasync(self._file)  # before it is said to be there: a loss of power leaves no gap
                    for row in missing.tolist():
                        _write(self._file, b"\x01", self._flags + row)
        return True

    def _missing(self, rows: np.ndarray) -> np.ndarray:
        """Which of some rows, ascending, nobody has decoded yet."""
        if not len(rows):
            return rows
        first, last = int(rows[0]), int(rows[-1])
        done = np.frombuffer(os.pread(self._file, last + 1 - first, self._flags + first), np.uint8)
        return rows[done[rows - first] == 0]

    @contextmanager
    def _locked(self, rows: np.ndarray, *, wait: bool) -> Iterator[bool]:
        """Hold the bytes of some rows; the system lets go of them if this process dies."""
        first, last = int(rows[0]), int(rows[-1])
        place = last + 1 - first, self._flags + first
        with _writing(self.path):
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), *place)
                ours = True
            except BlockingIOError:
                ours = False
        try:
            yield ours
        finally:
            if ours:
                fcntl.lockf(self._file, fcntl.LOCK_UN, *place)


def cache_folder() -> Path:
    """A folder of this user's alone in ``CASS_CACHE``, or where temporary files go (``TMPDIR``, else /tmp).

    Raises:
        UserError: it cannot be made, or belongs to another user.
    """
    parent = Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())
    folder = parent / f"cass-cache-{os.getuid()}"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
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
            f"decoded images cannot be kept at {path} (cache: disk): {error.strerror or error}. Set"
            f" {FOLDER_VARIABLE} to a folder with room on the node's own disk, or cache to ram or none"
        ) from None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """All of it, where a call may write a part."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
