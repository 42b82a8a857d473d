"""The training's log: JSON lines for programs, TensorBoard for people.

``log.jsonl`` holds only what the training determines, no clock times, so that a resumed run leaves the same
bytes as an undisturbed one. Speeds go to TensorBoard.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"
EMPTY = hashlib.sha256().hexdigest()


class Log:
    """Writes both logs.

    Args:
        folder: gets ``log.jsonl`` and ``tensorboard/``.
        position: bytes of ``log.jsonl`` to keep; what a run wrote after its last checkpoint is written anew.
        step: steps done, from which TensorBoard drops what it had.
    """

    def __init__(self, folder: Path, *, position: int = 0, step: int = 0) -> None:
        path = folder / LOG
        opened = _without_links(str(path), os.O_WRONLY | os.O_CREAT)
        os.ftruncate(opened, min(position, os.fstat(opened).st_size))
        os.close(opened)
        self._digest = hashlib.sha256(path.read_bytes())
        self._file = open(path, "ab", opener=_without_links)  # noqa: SIM115 - closed by close()
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def write(self, kind: str, *, step: int, epoch: float, **values: Any) -> None:
        """One line.

        Args:
            kind: ``step``, ``health`` or ``knn``.
            step, epoch: where the training stands.
            values: numbers, or dicts of numbers.
        """
        line = {"kind": kind, "step": step, "epoch": round(epoch, 6), **values}
        written = (json.dumps(_finite(line)) + "\n").encode()
        self._file.write(written)
        self._file.flush()
        self._digest.update(written)
        for name, number in _flat(values):
            self._board.add_scalar(f"{kind}/{name}", number, step)

    def speed(self, images_per_second: float, *, step: int) -> None:
        """For TensorBoard only: it differs from run to run."""
        self._board.add_scalar("step/images_per_second", images_per_second, step)

    def position(self) -> int:
        """Bytes of ``log.jsonl``: those kept and those written."""
        return self._file.tell()

    def sha256(self) -> str:
        """Of these bytes, whatever the disk makes of them."""
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Put on disk what has been written. Safe to call from another thread."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def begins_with(path: Path, *, position: int, sha256: str) -> bool:
    """Whether a file's first ``position`` bytes are there and have this SHA-256; no file is an empty one."""
    content = path.read_bytes()[:position] if path.exists() else b""
    return len(content) == position and hashlib.sha256(content).hexdigest() == sha256


def read_log(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of ``log.jsonl``, of one kind or all."""
    with open(folder / LOG, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line for line in lines if kind in (None, line["kind"])]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            numbers += _flat(value, f"{prefix}{name}/")
        elif value is not None:
            numbers.append((f"{prefix}{name}", float(value)))
    return numbers


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
