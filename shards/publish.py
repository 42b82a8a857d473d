"""A dataset folder appears whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import InputError
from shards.index import INDEX


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder`` that is gone at the end; an OSError becomes an InputError."""
    me = f"{socket.gethostname()}-{os.getpid()}"
    partial = folder.parent / f".{folder.name}.{me}.partial"
    existed = folder.is_dir()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        partial.mkdir()
        yield partial
    except OSError as error:
        raise InputError(f"cannot write dataset {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed and folder.is_dir() and not (folder / INDEX).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Remove what a killed writer on this host left of this dataset."""
    for left in folder.parent.glob(f".{folder.name}.{socket.gethostname()}-*.partial"):
        number = left.name.rsplit("-", 1)[1].removesuffix(".partial")
        if number.isdigit() and (int(number) == os.getpid() or not Path(f"/proc/{number}").exists()):
            shutil.rmtree(left, ignore_errors=True)


def publish(partial: Path, folder: Path) -> None:
    """Move the finished files to ``folder``, so that an index.json there always has its dataset beside it."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return
    (folder / INDEX).unlink(missing_ok=True)
    names = sorted(path.name for path in partial.iterdir())
    for old in folder.glob("*.tar"):
        if re.fullmatch(r"(train|val|test)-\d{6}\.tar", old.name) and old.name not in names:
            old.unlink()
    names.remove(INDEX)
    for name in [*names, INDEX]:
        os.replace(partial / name, folder / name)
