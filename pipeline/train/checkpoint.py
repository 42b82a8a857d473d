"""Checkpoints: whole or not there, checked before use, the newest few kept.

A file is named ``<step>-<SHA-256 of its bytes>.pt``: one rename makes file and checksum visible together.
It is read with ``weights_only=True``, so that a checkpoint can hold tensors and plain values but no code.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.files import write_atomically

_NAME = re.compile(r"^(\d{9})-([0-9a-f]{64})\.pt$")


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest ``keep``.

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
    _sync_folder(folder)
    for old in list_checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, the newest first; damaged ones are among them."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.match(path.name)]
    return sorted(found, key=lambda path: (path.name[:9], path.stat().st_mtime_ns), reverse=True)


def sound_checkpoint(folder: Path, *, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose bytes are those that were written, or None.

    Args:
        say: told of every damaged one that is passed over.
    """
    for path in list_checkpoints(folder):
        named = _NAME.match(path.name)
        assert named is not None
        if _digest(path) == named.group(2):
            return path
        say(f"checkpoint {path} is damaged (its SHA-256 is not the one in its name); trying the one before")
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
