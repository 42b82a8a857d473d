"""What a launcher on this machine has started: ``runs/EXPERIMENT/running.json``, for ``status`` elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.eta import STARTUP_S, Durations, JobRun, seconds_left
from pipeline.files import read_regular
from pipeline.manifest import Manifest, write_json
from pipeline.progress import read_progress

RUNNING = "running.json"


class LocalRun(BaseModel):
    """One job of the launcher.

    Attributes:
        started: seconds since 1970 by this machine's clock; None: it waits.
        ended: whether it has, however it did.
        log: of its first rank.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    tasks: list[str]
    after: list[str] = []
    cpus: int = 1
    gpus: int = 0
    started: float | None = None
    ended: bool = False
    log: str = ""

    @property
    def runs(self) -> bool:
        return self.started is not None and not self.ended


class LocalRuns(BaseModel):
    """All jobs of the launcher, the machine they share, and what a job takes besides its tasks."""

    model_config = ConfigDict(extra="forbid", strict=True)
    cpus: int = 1
    gpus: int = 0
    startup: float = STARTUP_S
    jobs: list[LocalRun] = []

    def write(self, folder: Path) -> None:
        """Write it into an experiment's folder; a disk that is full does not matter."""
        with contextlib.suppress(OSError):
            write_json(folder / RUNNING, self.model_dump(), sync=False)

    @classmethod
    def read(cls, folder: Path) -> LocalRuns | None:
        """What the launcher that holds the folder has last written; None: nothing yet."""
        try:
            return cls.model_validate(json.loads(read_regular(folder / RUNNING)))
        except (OSError, ValueError, ValidationError, RecursionError):
            return None

    @staticmethod
    def remove(folder: Path) -> None:
        with contextlib.suppress(OSError):
            os.unlink(folder / RUNNING)

    def seconds_left(self, manifest: Manifest, durations: Durations) -> float | None:
        """Until the last job has ended; None: nothing has run that tells."""
        now = time.time()
        unfinished = [job for job in self.jobs if not job.ended]
        runs = [
            JobRun(
                job.name,
                [manifest.task(task) for task in job.tasks],
                frozenset(job.after),
                job.cpus,
                job.gpus,
                None if job.started is None else max(0.0, now - job.started),
                _progress(manifest, job.tasks) if job.runs else None,
            )
            for job in unfinished
        ]
        room = {"cpus": self.cpus, "gpus": self.gpus}
        return seconds_left(runs, durations, **room, startup=self.startup) if runs else None


def _progress(manifest: Manifest, tasks: Sequence[str]) -> float | None:
    """The share of a job's only task that is done."""
    said = read_progress(manifest.folder(manifest.task(tasks[0]))) if len(tasks) == 1 else None
    return None if said is None or said[1] <= 0 else min(1.0, said[0] / said[1])
