"""The tables beside the manifest: copies of what the aggregate task left in the store."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.manifest import Damaged, Manifest, Receipt, Task, read_sound
from pipeline.states import done_tasks

MADE = ".made"  # in the tables' folder: the names that were published, to remove those that are made no more


def tables_of(manifest: Manifest) -> tuple[Task, Receipt] | None:
    """The aggregate task of an experiment and its receipt; None where its tables are still to be made."""
    for task in manifest.tasks:
        receipt = manifest.receipt(task) if task.stage == "aggregate" else None
        if receipt is not None and task.id in done_tasks(manifest):
            return task, receipt
    return None


def is_published(receipt: Receipt, tables: Path) -> bool:
    """Whether each table and plot that a receipt names lies in the folder, as the receipt says."""
    for name, said in receipt.files.items():
        path = tables / Path(name).name
        try:
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        except OSError:
            return False
        if content is None or len(content) != said["bytes"]:
            return False
        if hashlib.sha256(content).hexdigest() != said["sha256"]:
            return False
    return True


def publish(folder: Path, receipt: Receipt, tables: Path) -> None:
    """Copy the tables and plots beside the manifest, where people look for them.

    What an earlier experiment of this name left there, and is no longer made, goes; other files stay.

    Args:
        folder: of the aggregate task, in the store.
        receipt: the task's.
        tables: where to.

    Raises:
        UserError: they cannot be written there, or are not in the store as the receipt says.
    """
    made = {Path(name).name for name in receipt.files}
    try:
        tables.mkdir(parents=True, exist_ok=True)
        for name in receipt.files:
            write_atomically(tables / Path(name).name, read_sound(folder, receipt, name), sync=False)
        listed = tables / MADE
        if listed.is_file():
            before = listed.read_text(encoding="utf-8", errors="replace").splitlines()
            for name in {Path(line).name for line in before} - made - {""}:
                (tables / name).unlink(missing_ok=True)
        write_atomically(listed, "".join(f"{name}\n" for name in sorted(made)).encode(), sync=False)
    except Damaged as error:
        raise UserError(
            f"{receipt.task} is damaged: {error}; `python -m pipeline.launch verify {Path(folder).name}"
            " --repair` makes the next launch run it again"
        ) from None
    except OSError as error:
        raise UserError(
            f"the tables cannot be put into {tables}: {error.strerror or error}; they are in {folder}, and"
            " the same command publishes them once it can"
        ) from None


def bring_tables(manifest: Manifest, runs: Path) -> bool:
    """Publish an experiment's tables if they are made and not beside the manifest; whether they are there.

    Args:
        runs: the experiment's folder with its manifest.

    Raises:
        UserError: as :func:`publish` does.
    """
    found = tables_of(manifest)
    if found is None:
        return False
    task, receipt = found
    if not is_published(receipt, runs / "tables"):
        publish(manifest.folder(task), receipt, runs / "tables")
        if os.path.lexists(manifest.folder(task) / "error.json"):  # of the job that could not publish them
            (manifest.folder(task) / "error.json").unlink(missing_ok=True)
    return True
