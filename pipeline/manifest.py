"""The files that chain the stages: one manifest an experiment, one receipt a task. Imports no torch.

``runs/<experiment>/manifest.json`` holds the resolved experiment and every task with its key, needs, folder
and job; only the launcher writes it, under :func:`pipeline.lock.lock`. A task's own folder in the store holds
its ``receipt.json``, written last: no receipt, or one with another key, means not done.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import UserError, nearest, printable
from pipeline.files import MOST_BYTES, open_regular, read_regular, sync_folder, write_atomically
from pipeline.garbage import no_garbage_collection
from pipeline.metrics import are_sound
from pipeline.stages import STAGES
from slurm.identity import Submission, number_of

Made = TypeVar("Made")
FORMAT = 1  # of the manifest, the receipts and the store's layout
_HUGE = re.compile(
    rb"[ :,\[\n]-?[0-9][0-9.]*(?:(?<=[0-9.]{300})|[eE]\+?[0-9]{3})"
)  # may overflow to infinity
_SUM, _SUM_END = b',\n "sum": "', b'"\n}\n'  # around the checksum at the end of a receipt
# Nothing there, or something in its place that is no file: a folder, a link, a pipe, a device.
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO)
MOST_OF_AN_ERROR = 1 << 20  # bytes of an error.json
BOOKKEEPING = {"receipt.json", "error.json", "progress.json"}  # never part of a receipt's files


@dataclass(frozen=True)
class Task:
    """One unit of work; ``key`` identifies its result.

    Attributes:
        id: such as ``pretrain/pbc-dino-cnn``, unique in an experiment.
        stage: one of ``pipeline.stages.STAGES``.
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
        inputs: which results it was made of (``pipeline.states.inputs_of``).
        sum: SHA-256 of the file up to this entry, its last; empty before it is read from there.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", defer_build=True)
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
    inputs: str = ""
    sum: str = field(default="", compare=False)
    format: int = FORMAT

    def write(self, folder: Path, *, sync: bool = True) -> None:
        """Write ``receipt.json``."""
        said = {name: value for name, value in asdict(self).items() if name != "sum"}
        head = _as_text(said).removesuffix("\n}").encode()
        content = head + _SUM + hashlib.sha256(head).hexdigest().encode() + _SUM_END
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "receipt.json", content, sync=sync)

    @classmethod
    def read(cls, folder: Path, key: str) -> Receipt | None:
        """The receipt in ``folder`` if it is there, as it was written, and of this key; else None.

        Raises:
            UserError: the folder was written by another format version.
            OSError: it is there and cannot be read now.
        """
        try:
            content = read_regular(f"{folder}/receipt.json")
        except OSError as error:
            if error.errno in NO_FILE:
                return None
            raise
        head, mark, said_sum = content.rpartition(_SUM)  # those of the first versions have none
        if mark and said_sum != hashlib.sha256(head).hexdigest().encode() + _SUM_END:
            return None
        receipt = _read_strictly(_RECEIPTS, content)
        if receipt is None or receipt.format != FORMAT:
            said = _object_in(content)
            if said is not None and said.get("format") != FORMAT:
                raise UserError(
                    f"{folder} was written by format version {said.get('format')}, this program writes"
                    f" {FORMAT}; use another --store"
                )
            return None
        sound = receipt.key == key and all(_sound_entry(*entry) for entry in receipt.files.items())
        return receipt if sound and are_sound(receipt.stage, receipt.metrics) else None


@dataclass(frozen=True)
class Manifest:
    """An experiment's tasks in an order in which every task comes after those it needs."""

    __pydantic_config__ = ConfigDict(extra="forbid", defer_build=True)
    experiment: dict[str, Any]
    store: str
    tasks: tuple[Task, ...]
    jobs: dict[str, str] = field(default_factory=dict)  # task id → job id
    submissions: dict[str, Submission] = field(
        default_factory=dict
    )  # number of a job or an array → what it is
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

    def has(self, task_id: str) -> bool:
        return task_id in self._by_id

    def folder(self, task: Task) -> Path:
        return Path(self.store) / task.folder

    def receipt(self, task: Task) -> Receipt | None:
        receipt = Receipt.read(self.folder(task), task.key)
        return receipt if receipt is None or receipt.stage == task.stage else None

    def damaged_receipt(self, task: Task) -> Path | None:
        """The file of a receipt that is there and does not count; None if it counts or is not there."""
        path = self.folder(task) / "receipt.json"
        return path if os.path.lexists(path) and self.receipt(task) is None else None

    @property
    def job_identities(self) -> dict[str, Submission]:
        """What was submitted under each number; where an earlier version did not say, by the name it gave."""
        older = {
            number_of(job): Submission(f"{self.experiment['name']}-{task.split('/')[0]}-*")
            for task, job in self.jobs.items()
        }
        return older | self.submissions

    def with_jobs(self, jobs: dict[str, str], submission: Submission | None = None) -> Manifest:
        """The manifest with more jobs; an older job of the same number is no more.

        Args:
            jobs: task id → job id.
            submission: what they were submitted as.
        """
        numbers = {number_of(job) for job in jobs.values()}
        kept = {task: job for task, job in self.jobs.items() if number_of(job) not in numbers}
        made = dict.fromkeys(numbers, submission) if submission is not None else {}
        submissions = {number: said for number, said in self.submissions.items() if number not in numbers}
        submissions |= {number: said for number, said in made.items() if said is not None}
        changed = replace(self, jobs={**kept, **jobs}, submissions=submissions)
        # Tasks are written anew for every array that is submitted, but made into text only once.
        changed.__dict__["_tasks_as_json"] = self._tasks_as_json
        return changed

    def write(self, path: Path) -> None:
        """Write it with one line a task."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tasks"}
        fields["submissions"] = {number: asdict(said) for number, said in self.submissions.items()}
        lines = [f' "{name}": {_as_json(value)},\n' for name, value in sorted(fields.items())]
        text = "".join(["{\n", *lines, ' "tasks": [\n', self._tasks_as_json, "\n ]\n}\n"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())

    @cached_property
    def _tasks_as_json(self) -> str:
        names = Task.__dataclass_fields__
        return ",\n".join(
            f"  {_as_json({name: getattr(task, name) for name in names})}" for task in self.tasks
        )

    @classmethod
    @no_garbage_collection()
    def read(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            UserError: missing, damaged, or of another format version.
        """
        try:
            content = read_regular(path, follow=True)
        except OSError as error:
            raise UserError(f"cannot read the manifest {path}: {error.strerror}") from None
        manifest = _read_strictly(_MANIFESTS, content)
        if manifest is None or manifest.format != FORMAT:
            raise cls._damage(path, content)
        if not isinstance(manifest.experiment.get("name"), str):
            raise UserError(f"the manifest {path} is damaged: the experiment has no name")
        if problem := _problem(manifest.tasks):
            raise UserError(f"the manifest {path} is damaged: {problem}")
        return manifest

    @classmethod
    def _damage(cls, path: Path, content: bytes) -> UserError:
        """What is wrong with a file that is no manifest."""
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            return UserError(f"the manifest {path} is damaged: not valid JSON")
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            version = said.get("format") if isinstance(said, dict) else None
            return UserError(
                f"the manifest {path} is of format {version}, expected {FORMAT}; use another --runs"
            )
        if unknown := sorted(set(said) - set(cls.__dataclass_fields__)):
            return UserError(f"the manifest {path} is damaged: unknown key {unknown[0]!r}")
        try:
            _MANIFESTS.validate_json(json.dumps(said, allow_nan=False), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            return UserError(f"the manifest {path} is damaged: {where}: {first['msg']}")
        except ValueError:
            return UserError(f"the manifest {path} is damaged: a number is not finite")
        return UserError(f"the manifest {path} is damaged")


_RECEIPTS = TypeAdapter(Receipt)
_MANIFESTS = TypeAdapter(Manifest)


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, default=str)


def _as_text(value: Any) -> str:
    """For people too: indented."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=str)


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{_as_text(value)}\n".encode(), sync=sync)


def read_error(folder: Path) -> dict[str, Any] | None:
    """What a failed task left in ``error.json``, or None: texts on one line, without control characters."""
    try:
        said = _object_in(read_regular(folder / "error.json", most=MOST_OF_AN_ERROR))
    except OSError:
        return None
    if said is None:
        return None
    error: dict[str, Any] = {name: _text(said.get(name)) for name in ("kind", "message", "host", "at")}
    trace = said.get("traceback")
    return error | {
        "user_error": said.get("user_error") is True,
        "rank": said["rank"] if isinstance(said.get("rank"), int) else None,
        "log": _text(said["log"]) if isinstance(said.get("log"), str) else None,
        "traceback": [_text(line) for line in trace] if isinstance(trace, list) else [],
    }


def _text(value: Any) -> str:
    return " ".join(printable(value).split()) if isinstance(value, str) else ""


def _object_in(content: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _read_strictly(adapter: TypeAdapter[Made], content: bytes) -> Made | None:
    """What JSON says, in one pass, if every key is known, every value of its type and every number finite."""
    if b"NaN" in content or b"Infinity" in content or _HUGE.search(content):  # in a text? The slow way tells
        said = _object_in(content)
        try:
            content = json.dumps(said, allow_nan=False).encode()
        except ValueError:
            return None
    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError:
        return None


def _sound_entry(name: str, said: dict[str, Any]) -> bool:
    """Whether a receipt's entry is of a file below its folder."""
    below = name not in ("", ".") and not name.startswith("/") and ".." not in name.split("/")
    return below and isinstance(said.get("sha256"), str) and isinstance(said.get("bytes"), int)


def _problem(tasks: tuple[Task, ...]) -> str | None:
    """What is wrong with a manifest's tasks, whose names become folders: none may lead out of the store."""
    known: set[str] = set()
    for task in tasks:
        stage, _, name = task.id.partition("/")
        if (
            stage not in STAGES
            or stage != task.stage
            or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)
        ):
            return f"{task.id!r} is no id of a {task.stage!r} task"
        if not re.fullmatch(r"[0-9a-f]{64}", task.key):
            return f"the key of {task.id} is no SHA-256"
        if task.id in known:
            return f"{task.id} is there twice"
        if missing := set(task.needs) - known:
            return f"{task.id} needs {min(missing)!r}, which does not stand before it"
        known.add(task.id)
    return None


def now() -> str:
    """The only clock that is read: for people, who may compare it between hosts; no program does."""
    return datetime.datetime.fromtimestamp(time.time(), datetime.timezone.utc).isoformat(timespec="seconds")


def sha256_file(path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Args:
        sync: whether to wait until they are on disk.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        if sync:
            os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe_files(
    folder: Path, *, without: Collection[str] = (), sync: bool = True
) -> dict[str, dict[str, Any]]:
    """Put a task's result files on disk; returns SHA-256 and bytes of each, by relative path.

    A receipt that is written then is never there with files that a loss of power has emptied.

    Args:
        without: folders below it that hold no results.
        sync: whether to wait for the disk, for the files and the folders that hold them.

    Raises:
        OSError: a file cannot be read or put on disk.
    """
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in BOOKKEEPING
        and not path.name.startswith(".")
        and path.relative_to(folder).parts[0] not in without
    ]
    described = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_file(path, sync=sync),
            "bytes": path.stat().st_size,
        }
        for path in paths
    }
    if sync:
        holders = {folder, *(parent for name in described for parent in (folder / name).parents)}
        for holder in sorted(holders - set(folder.parents)):
            sync_folder(holder)
    return described


def damaged_files(folder: Path, receipt: Receipt, names: Collection[str] | None = None) -> list[str]:
    """Re-hash a finished task: one line for each file that is missing or not what the receipt says.

    Args:
        names: look at these of its files only.
    """
    problems = []
    for name, said in receipt.files.items():
        if names is not None and name not in names:
            continue
        if problem := file_problem(folder / name, said):
            problems.append(problem)
    return problems


def file_problem(path: Path, said: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that should have the ``sha256`` and ``bytes`` said; None if nothing is."""
    if not os.path.isfile(path):
        return f"{path}: missing"
    if path.stat().st_size != said["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, expected {said['bytes']}"
    if sha256_file(path) != said["sha256"]:
        return f"{path}: its SHA-256 differs from the receipt's"
    return None


class Damaged(Exception):
    """A file of a finished task is missing or not what its receipt says; the text is one line."""


def read_sound(folder: Path, receipt: Receipt, name: str) -> bytes:
    """A small file of a finished task, checked on the bytes that are returned.

    Raises:
        Damaged: as :func:`damaged_files` would say it.
    """
    path, said = f"{folder}/{name}", receipt.files.get(name)
    try:
        content = read_regular(path, follow=True, most=MOST_BYTES if said is None else said["bytes"])
    except OSError as error:
        if error.errno == errno.EFBIG and said is not None:
            raise Damaged(f"{path}: {os.stat(path).st_size} bytes, expected {said['bytes']}") from None
        if error.errno in NO_FILE:
            raise Damaged(f"{path}: missing") from None
        raise
    if said is not None and len(content) != said["bytes"]:
        raise Damaged(f"{path}: {len(content)} bytes, expected {said['bytes']}")
    if said is not None and hashlib.sha256(content).hexdigest() != said["sha256"]:
        raise Damaged(f"{path}: its SHA-256 differs from the receipt's")
    return content
