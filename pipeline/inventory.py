"""What lay in a data set's folders when it was sharded, and what has changed since: names, sizes, times."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import read_regular, write_atomically
from pipeline.manifest import Manifest, Task
from pipeline.specs import Dataset, ShardSpec

INVENTORY = "inventory.csv"  # in a shard task's folder
Files = dict[str, tuple[int, int]]  # absolute path → bytes, nanoseconds of its last change


@dataclass(frozen=True)
class Changes:
    """How a data set's files differ from those that were sharded; ``touched`` ones have other times only."""

    added: list[str]
    removed: list[str]
    resized: list[str]
    touched: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.resized or self.touched)

    def __str__(self) -> str:
        kinds = [
            (self.added, "added"),
            (self.removed, "removed"),
            (self.resized, "of another size"),
            (self.touched, "of the same size with another time of change"),
        ]
        return ", ".join(f"{len(paths)} {kind} (such as {paths[0]})" for paths, kind in kinds if paths)


def take_inventory(dataset: Dataset) -> Files:
    """Every file below a data set's folders but for hidden ones; nothing of what cannot be read."""
    if dataset.root is None:
        return {}
    root = Path(os.path.abspath(Path(dataset.root).expanduser()))
    found: Files = {}
    for top in [root, *(Path(os.path.join(root, folder)) for folder in dataset.unlabelled)]:
        _walk(top, found)
    return found


def _walk(top: Path, found: Files) -> None:
    seen: set[tuple[int, int]] = set()  # a link may lead to a folder again
    waiting = [str(top)]
    while waiting:
        folder = waiting.pop()
        try:
            facts = os.stat(folder)
            if (facts.st_dev, facts.st_ino) in seen:
                continue
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif entry.is_file():
                        facts = entry.stat()
                        found[entry.path] = facts.st_size, facts.st_mtime_ns
        except OSError:
            continue


def write_inventory(folder: Path, files: Mapping[str, tuple[int, int]]) -> None:
    """Write ``inventory.csv``: path, bytes, changed (nanoseconds since 1970)."""
    lines = ["path,bytes,changed"]
    for path, (size, changed) in sorted(files.items()):
        quoted = '"' + path.replace('"', '""') + '"'
        lines.append(f"{quoted},{size},{changed}")
    text = "\n".join(lines) + "\n"
    write_atomically(folder / INVENTORY, text.encode("utf-8", "surrogateescape"), sync=False)


def read_inventory(folder: Path) -> Files | None:
    """What :func:`write_inventory` wrote; None where it is not there, or is no such file."""
    try:
        text = read_regular(folder / INVENTORY).decode("utf-8", "surrogateescape")
        rows = csv.reader(io.StringIO(text, newline=""))
        next(rows)
        return {path: (int(size), int(changed)) for path, size, changed in rows}
    except (OSError, ValueError, StopIteration, csv.Error):
        return None


def changes(before: Files, now: Files, *, but: Collection[Path] = ()) -> Changes:
    """What has changed between two inventories.

    Args:
        but: folders whose files do not count, such as a store within the data set's folder.
    """

    def counts(path: str) -> bool:
        return not any(path.startswith(f"{folder}{os.sep}") for folder in but)

    both = [path for path in before if path in now and before[path] != now[path] and counts(path)]
    return Changes(
        added=sorted(path for path in now if path not in before and counts(path)),
        removed=sorted(path for path in before if path not in now and counts(path)),
        resized=sorted(path for path in both if before[path][0] != now[path][0]),
        touched=sorted(path for path in both if before[path][0] == now[path][0]),
    )


def change_since_sharding(task: Task, folder: Path | None, *, but: Collection[Path] = ()) -> str:
    """What has changed below a data set's root since it was sharded, and what to do; empty where nothing has.

    Args:
        task: of the shard stage.
        folder: its finished folder; None where it is not done.
        but: folders whose files do not count.
    """
    dataset = ShardSpec.model_validate(task.spec).dataset
    if folder is None or dataset.root is None or not os.path.isdir(dataset.root):
        return ""
    before = read_inventory(folder)
    if before is None:
        return ""
    found = changes(before, take_inventory(dataset), but=but)
    if not found:
        return ""
    return (
        f"{dataset.root} has changed since it was sharded: {found}; results are of the files as they were."
        f" To shard it again: dataset.version: {dataset.version + 1}"
    )


def changed_tables(task: Task, manifest: Path) -> str:
    """Which tables of labels have another content than at the last launch; empty where none has.

    Args:
        task: of the shard stage.
        manifest: the file that the last launch left, if there was one.
    """
    if not manifest.is_file():
        return ""
    before = [other for other in Manifest.read(manifest).tasks if other.id == task.id]
    now = task.spec["contents"]
    said = [name for other in before for name in now if other.spec.get("contents", {}).get(name) != now[name]]
    if not said:
        return ""
    return f"{', '.join(said)} has changed since the last launch: the data set is sharded again"
