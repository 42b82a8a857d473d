"""``launch clean``: what lies in a store and no present experiment refers to, listed or removed."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.lock import lock_holder
from pipeline.manifest import Manifest
from pipeline.printing import print_table, say
from pipeline.stages import STAGES

LISTED = 30  # folders named one by one


@dataclass(frozen=True)
class Unused:
    """A folder of the store that no manifest refers to."""

    path: Path
    size: int  # bytes
    age: float  # seconds since its last change


def clean(store: Path, runs: Path, *, yes: bool) -> int:
    """List the folders of a store that no manifest in ``runs`` refers to; with ``yes`` remove them.

    A folder in which a task runs stays, links are never followed, and only folders of stages count. Manifests
    elsewhere cannot be seen.

    Raises:
        UserError: there is no store, no manifest to tell what is in use, or one that cannot be read.
    """
    if not store.is_dir():
        raise UserError(f"there is no store {store}")
    found = list(_unused(store, _referred(store, runs)))
    total = _readable(sum(one.size for one in found))
    if not found:
        say(f"nothing to clean: every folder of {store} belongs to an experiment in {runs}")
        return 0
    largest = sorted(found, key=lambda one: -one.size)[:LISTED]
    rows = [(str(one.path.relative_to(store)), _readable(one.size), _days(one.age)) for one in largest]
    print_table(("folder", "size", "changed"), rows)
    if len(found) > LISTED:
        say(f"… and {len(found) - LISTED} more")
    if not yes:
        say(f"{len(found)} folders ({total}) that no experiment in {runs} refers to; --yes removes them.")
        say("An experiment that was launched with another --runs is not seen here.")
        return 0
    removed = 0
    for one in _unused(store, _referred(store, runs)):  # a launch may have come meanwhile
        removed += one.size
        (one.path / "receipt.json").unlink(missing_ok=True)  # half of it must not count as done
        shutil.rmtree(one.path)
    say(f"removed {len(found)} folders ({_readable(removed)})")
    return 0


def _referred(store: Path, runs: Path) -> set[str]:
    """The folders below the store that manifests refer to, as ``stage/name``."""
    found: set[str] = set()
    paths = sorted(runs.glob("*/manifest.json"))
    if not paths:
        raise UserError(f"there is no manifest in {runs}, so nothing tells what of {store} is in use")
    for path in paths:
        manifest = Manifest.read(path)
        if os.path.realpath(manifest.store) == os.path.realpath(store):
            found |= {task.folder for task in manifest.tasks}
    return found


def _unused(store: Path, referred: set[str]) -> Iterator[Unused]:
    for stage in STAGES:
        top = store / stage
        if not _is_folder(top):
            continue
        for path in sorted(top.iterdir()):
            if f"{stage}/{path.name}" in referred or not _is_folder(path):
                continue
            if lock_holder(path / ".lock") is not None:
                continue
            facts = [entry.lstat() for entry in [path, *path.rglob("*")]]
            newest = max(fact.st_mtime for fact in facts)
            yield Unused(path, sum(fact.st_size for fact in facts), time.time() - newest)


def _is_folder(path: Path) -> bool:
    """Whether it is a folder itself, not a link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _days(seconds: float) -> str:
    days = int(seconds // 86400)
    return "today" if days < 1 else f"{days} day{'s' if days > 1 else ''} ago"
