"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(
    path: Path, content: bytes | memoryview, *, mode: int | None = None, sync: bool = True
) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of either.

    Args:
        path: its folder must exist.
        mode: the file's permissions; None: those of any new file.
        sync: whether to wait for the disk before the file appears under its name.

    Raises:
        OSError: the old file is as it was, and nothing else is left.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if mode is not None:
            os.chmod(part, mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
