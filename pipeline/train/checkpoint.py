"""Checkpoints: whole or not there, checked before use, the newest few kept.

A file is named ``<step>-<SHA-256 of its bytes>.pt``: one rename makes file and checksum visible together.
It is read with ``weights_only=True``, so that a checkpoint can hold tensors and plain values but no code.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline.files import write_atomically
from pipeline.manifest import sha256_file

_NAME = re.compile(r"^(\d{9})-([0-9a-f]{64})\.pt$")


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write a checkpoint; remove those of the same or a later step, and all but the newest ``keep``.

    A training that writes an earlier step than there was has started over or gone back: what lies after it
    belongs to a history that was given up.

    Args:
        folder: is made where missing.
        state: tensors, numbers, strings, lists and dicts.
        step: steps done.
        keep: how many to leave, this one included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"{step:09d}-{hashlib.sha256(content).hexdigest()}.pt"
    write_atomically(path, content)
    others = [other for other in list_checkpoints(folder) if other != path]
    given_up = [other for other in others if int(other.name[:9]) >= step]
    for old in given_up + others[len(given_up) :][keep - 1 :]:
        old.unlink(missing_ok=True)
    return path


class CheckpointWriter:
    """Writes checkpoints in a thread while the training goes on, one at a time.

    Args:
        folder, keep: as for :func:`save_checkpoint`.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def write(self, state: dict[str, Any], *, step: int, first: Callable[[], None] = lambda: None) -> None:
        """Begin to write; where the checkpoint before is not written yet, wait for it.

        Args:
            state: as for :func:`save_checkpoint`; it is copied to host memory before this returns.
            step: steps done.
            first: called in the thread before the checkpoint appears, for what must be on disk by then.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.settle()
        copy = snapshot(state)

        def work() -> None:
            first()
            save_checkpoint(self.folder, copy, step=step, keep=self.keep)

        self._writing = self._thread.submit(work)

    @property
    def busy(self) -> bool:
        """Whether the thread is at work."""
        return self._writing is not None and not self._writing.done()

    def settle(self, *, wait: bool = True) -> None:
        """Wait until the newest checkpoint is on disk.

        Args:
            wait: false only looks whether it has failed.

        Raises:
            OSError: it could not be written; those before it are as they were.
        """
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()


def snapshot(value: Any) -> Any:
    """A copy in host memory of tensors in dicts, lists and tuples; other values as they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: snapshot(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(part) for part in value)
    return value


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, the newest first; damaged ones are among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.match(path.name)]
    return sorted(found, key=lambda path: (path.name[:9], path.stat().st_mtime_ns), reverse=True)


def sound_checkpoint(
    folder: Path,
    *,
    say: Callable[[str], None],
    misfit: Callable[[dict[str, Any]], str | None] = lambda state: None,
) -> Path | None:
    """The newest checkpoint whose bytes are those that were written and that fits, or None.

    Args:
        say: told of every one that is passed over, and why.
        misfit: why a state cannot be gone on from, to be read after "checkpoint …"; None where it can.
    """
    for path in list_checkpoints(folder):
        named = _NAME.match(path.name)
        assert named is not None
        wrong: str | None = "is damaged (its SHA-256 is not the one in its name)"
        if sha256_file(path) == named.group(2):
            wrong = misfit(load_checkpoint(path))
        if wrong is None:
            return path
        say(f"checkpoint {path} {wrong}; trying the one before")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def remove_remains(folder: Path) -> None:
    """Remove what a writer that was killed has left half-written. Nobody may be writing."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
