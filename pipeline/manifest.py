"""The files that chain the stages: one manifest an experiment, one receipt a task. Imports no torch.

``runs/<experiment>/manifest.json`` holds the resolved experiment and every task with its key, needs, folder
and job; only the launcher writes it, under :func:`pipeline.lock.lock`. A task's own folder in the store holds
its ``receipt.json``, written last: no receipt, or one with another key, means not done.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, nearest
from pipeline.files import write_atomically

FORMAT = 1  # of the manifest, the receipts and the store's layout
BOOKKEEPING = {"receipt.json", "error.json", "progress.json"}  # never part of a receipt's files


@dataclass(frozen=True)
class Task:
    """One unit of work; ``key`` identifies its result.

    Attributes:
        id: such as ``pretrain/pbc-dino-cnn``, unique in an experiment.
        stage: one of ``pipeline.specs.STAGES``.
        spec: all that decides the result, as JSON values.
        needs: ids of the tasks whose results it reads.
        key: SHA-256 over stage, format, spec and the keys of its needs.
        resources: ``pipeline.specs.Resources`` as JSON; no part of the key.
    """

    id: str
    stage: str
    spec: dict[str, Any]
    needs: tuple[str, ...]
    key: str
    resources: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.id.split("/", 1)[1]

    @property
    def folder(self) -> str:
        """Where its result lives, below the store."""
        return f"{self.stage}/{self.name}-{self.key[:8]}"


@dataclass(frozen=True)
class Receipt:
    """What a finished task says of itself.

    Attributes:
        files: relative path → {"sha256", "bytes"} of every file in the folder.
        started, ended: ISO 8601, UTC.
        seconds: wall-clock time of the successful run.
        device_seconds: training time times ranks, on ``device`` (``cpu`` or ``cuda``).
    """

    key: str
    task: str
    stage: str
    metrics: dict[str, Any]
    files: dict[str, dict[str, Any]]
    started: str
    ended: str
    seconds: float
    hosts: list[str]
    world_size: int
    images_seen: int = 0
    device: str = "cpu"
    device_seconds: float = 0.0
    peak_memory_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / "receipt.json", asdict(self))

    @classmethod
    def read(cls, folder: Path, key: str) -> Receipt | None:
        """The receipt in ``folder`` if it is there, whole, and of this key; else None.

        Raises:
            UserError: the folder was written by another format version.
        """
        try:
            said = json.loads((folder / "receipt.json").read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(said, dict):
            return None
        if said.get("format") != FORMAT:
            raise UserError(
                f"{folder} was written by format version {said.get('format')}, this program writes {FORMAT};"
                " use another --store"
            )
        known = cls.__dataclass_fields__.keys()
        if said.get("key") != key or set(said) - set(known):
            return None
        try:
            return cls(**said)
        except TypeError:
            return None


@dataclass(frozen=True)
class Manifest:
    """An experiment's tasks in an order in which every task comes after those it needs."""

    experiment: dict[str, Any]
    store: str
    tasks: tuple[Task, ...]
    jobs: dict[str, str] = field(default_factory=dict)  # task id → job id
    cluster: str = ""  # where the jobs are: local | slurm
    submitting: str = ""  # name of the jobs that are being submitted, until their ids are in `jobs`
    format: int = FORMAT

    @cached_property
    def _by_id(self) -> dict[str, Task]:
        return {task.id: task for task in self.tasks}

    def task(self, task_id: str) -> Task:
        if task_id in self._by_id:
            return self._by_id[task_id]
        known = [task.id for task in self.tasks]
        hint = nearest(task_id, known) or f"; expected one of its {len(known)}, such as {known[:1]}"
        raise UserError(f"no task {task_id!r} in this manifest{hint}")

    def folder(self, task: Task) -> Path:
        return Path(self.store) / task.folder

    def receipt(self, task: Task) -> Receipt | None:
        return Receipt.read(self.folder(task), task.key)

    def with_jobs(self, jobs: dict[str, str]) -> Manifest:
        return replace(self, jobs={**self.jobs, **jobs})

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            UserError: missing, damaged, or of another format version.
        """
        try:
            said = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"cannot read the manifest {path}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"the manifest {path} is damaged: not valid JSON") from None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            version = said.get("format") if isinstance(said, dict) else None
            raise UserError(
                f"the manifest {path} is of format {version}, expected {FORMAT}; use another --runs"
            )
        try:
            tasks = tuple(Task(**{**task, "needs": tuple(task["needs"])}) for task in said.pop("tasks"))
            return cls(tasks=tasks, **said)
        except (KeyError, TypeError):
            raise UserError(f"the manifest {path} is damaged: keys missing or unknown") from None


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=str)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{text}\n".encode(), mode=0o640, sync=sync)


def read_error(folder: Path) -> dict[str, Any] | None:
    """What a failed task left in ``error.json``, or None."""
    try:
        said = json.loads((folder / "error.json").read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_files(folder: Path, *, without: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """SHA-256 and bytes of every result file in a task's folder, by relative path.

    Args:
        without: folders below it that hold no results.
    """
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in BOOKKEEPING
        and not path.name.startswith(".")
        and path.relative_to(folder).parts[0] not in without
    }


def damaged_files(folder: Path, receipt: Receipt, names: Collection[str] | None = None) -> list[str]:
    """Re-hash a finished task: one line for each file that is missing or not what the receipt says.

    Args:
        names: look at these of its files only.
    """
    problems = []
    for name, said in receipt.files.items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != said["bytes"]:
            problems.append(f"{path}: {path.stat().st_size} bytes, expected {said['bytes']}")
        elif sha256_file(path) != said["sha256"]:
            problems.append(f"{path}: its SHA-256 differs from the receipt's")
    return problems
