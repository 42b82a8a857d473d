"""Jobs on this machine as they run: bars on a terminal, a line an event elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import view
from pipeline.eta import Durations, in_words
from pipeline.jobs import Job
from pipeline.manifest import Manifest
from pipeline.printing import console
from pipeline.progress import read_progress
from pipeline.running import LocalRun, LocalRuns
from pipeline.states import receipts_of
from slurm import JobEvent

ETA_SECONDS = 2.0  # how often the time left is estimated


@contextlib.contextmanager
def live(manifest: Manifest, jobs: Sequence[Job], runs: LocalRuns, folder: Path) -> Iterator[LocalWatcher]:
    """Watch jobs on this machine: bars on a terminal, a line an event elsewhere.

    Args:
        runs: the same jobs as ``status`` is told of them.
        folder: the experiment's, where that is written.
    """
    watcher = LocalWatcher(manifest, jobs, runs, folder)
    runs.write(folder)
    try:
        if not sys.stdout.isatty():
            yield watcher
            return
        from rich.live import Live

        shown = Live(get_renderable=watcher.render, console=console(), refresh_per_second=4, transient=True)
        with shown:
            yield watcher
    finally:
        LocalRuns.remove(folder)


class LocalWatcher:
    """Follows jobs through the scheduler's events and the progress files of their tasks."""

    def __init__(
        self,
        manifest: Manifest,
        jobs: Sequence[Job],
        runs: LocalRuns | None = None,
        folder: Path | None = None,
    ) -> None:
        self.manifest = manifest
        self.jobs = {job.name: job for job in jobs}
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.failed: dict[str, tuple[Path, ...]] = {}  # job → its log files
        self.lines = not sys.stdout.isatty()
        self.folder = folder
        self.runs = runs or LocalRuns(
            jobs=[LocalRun(name=job.name, tasks=[task.id for task in job.tasks]) for job in jobs]
        )
        self._run_of = {run.name: run for run in self.runs.jobs}
        self._receipts = receipts_of(manifest)
        self._durations = Durations(manifest.tasks, self._receipts)
        self._startups: list[float] = []
        self._left, self._left_at = "", float("-inf")

    def __call__(self, event: JobEvent) -> None:
        if event.kind == "started":
            self.started[event.name] = time.monotonic()
        else:
            self.ended[event.name] = time.monotonic()
            if event.kind == "failed":
                self.failed[event.name] = event.logs
        self._note(event)
        if self.lines:
            job = self.jobs[event.name]
            tasks = f" ({len(job.tasks)} tasks)" if len(job.tasks) > 1 else ""
            took = self.ended.get(event.name, 0) - self.started.get(event.name, 0)
            seconds = f" after {took:.0f} s" if event.kind in ("finished", "failed") else ""
            count = f"{time.strftime('%H:%M:%S')} {len(self.ended)}/{len(self.jobs)}"
            left = f", {self._eta()}" if event.kind == "finished" and len(self.ended) < len(self.jobs) else ""
            print(f"{count} {event.kind:9} {event.name}{tasks}{seconds}{left}", flush=True)
        if event.kind == "finished" and len(self.ended) < len(self.jobs):  # else the outcome says it now
            view.print_warnings(self.manifest, self.jobs[event.name].tasks)

    def render(self) -> Any:
        """The whole view: one bar for all jobs, one for each that runs."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for _ in range(4):
            table.add_column(no_wrap=True)
        failed = f", [red]{len(self.failed)} failed[/]" if self.failed else ""
        table.add_row(
            "[bold]jobs[/]",
            ProgressBar(total=len(self.jobs), completed=len(self.ended), width=28),
            f"{len(self.ended)}/{len(self.jobs)}{failed}",
            self._eta(),
        )
        for name, started in self.started.items():
            if name not in self.ended:
                task, done, total, text = self._current(self.jobs[name])
                bar = ProgressBar(total=total or 1, completed=done, width=28)
                table.add_row(Text(task), bar, Text(text), f"{time.monotonic() - started:.0f} s")
        return Group(table)

    def _current(self, job: Job) -> tuple[str, float, float, str]:
        """What a job is at: its task (or how many of them), done, total, and a word."""
        if len(job.tasks) > 1:
            done = sum(
                (self.manifest.folder(task) / "receipt.json").exists()
                or (self.manifest.folder(task) / "error.json").exists()
                for task in job.tasks
            )
            return job.tasks[0].id, done, len(job.tasks), f"{done}/{len(job.tasks)} tasks"
        said = read_progress(self.manifest.folder(job.tasks[0])) or (0, 1, "starting")
        return job.name, *said

    def _note(self, event: JobEvent) -> None:
        """Write down for ``status`` what has started and ended, and learn from what it took."""
        run = self._run_of[event.name]
        if event.kind == "started":
            run.started, run.log = time.time(), str(event.logs[0]) if event.logs else ""
        else:
            run.ended = True
            tasks = self.jobs[event.name].tasks
            self._receipts |= {task.id: self.manifest.receipt(task) for task in tasks}
            self._durations = Durations(self.manifest.tasks, self._receipts)
            self._left_at = float("-inf")
            took = [receipt.seconds for task in tasks if (receipt := self._receipts[task.id]) is not None]
            if event.kind == "finished" and event.name in self.started:
                whole = self.ended[event.name] - self.started[event.name]
                self._startups.append(max(0.0, whole - sum(took)))
                self.runs.startup = sum(self._startups) / len(self._startups)
        if self.folder is not None:
            self.runs.write(self.folder)

    def _eta(self) -> str:
        """Time left, once something has run that tells; estimated anew every few seconds."""
        if time.monotonic() - self._left_at > ETA_SECONDS:
            self._left = in_words(self.runs.seconds_left(self.manifest, self._durations))
            self._left_at = time.monotonic()
        return self._left
