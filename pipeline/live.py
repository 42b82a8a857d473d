"""Jobs on this machine as they run: bars on a terminal, a line an event elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import view
from pipeline.jobs import Job
from pipeline.manifest import Manifest
from pipeline.printing import console
from pipeline.progress import read_progress
from slurm import JobEvent


@contextlib.contextmanager
def live(manifest: Manifest, jobs: Sequence[Job]) -> Iterator[LocalWatcher]:
    """Watch jobs on this machine: bars on a terminal, a line an event elsewhere."""
    watcher = LocalWatcher(manifest, jobs)
    if not sys.stdout.isatty():
        yield watcher
        return
    from rich.live import Live

    with Live(get_renderable=watcher.render, console=console(), refresh_per_second=4, transient=True):
        yield watcher


class LocalWatcher:
    """Follows jobs through the scheduler's events and the progress files of their tasks."""

    def __init__(self, manifest: Manifest, jobs: Sequence[Job]) -> None:
        self.manifest = manifest
        self.jobs = {job.name: job for job in jobs}
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.failed: dict[str, tuple[Path, ...]] = {}  # job → its log files
        self.lines = not sys.stdout.isatty()

    def __call__(self, event: JobEvent) -> None:
        if event.kind == "started":
            self.started[event.name] = time.monotonic()
        else:
            self.ended[event.name] = time.monotonic()
            if event.kind == "failed":
                self.failed[event.name] = event.logs
        if self.lines:
            job = self.jobs[event.name]
            tasks = f" ({len(job.tasks)} tasks)" if len(job.tasks) > 1 else ""
            took = self.ended.get(event.name, 0) - self.started.get(event.name, 0)
            seconds = f" after {took:.0f} s" if event.kind in ("finished", "failed") else ""
            count = f"{time.strftime('%H:%M:%S')} {len(self.ended)}/{len(self.jobs)}"
            print(f"{count} {event.kind:9} {event.name}{tasks}{seconds}", flush=True)
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

    def _eta(self) -> str:
        """Time left, once a job of each stage has ended: the others are taken to last as long."""
        means: dict[str, float] = {}
        for stage in {job.stage for job in self.jobs.values()}:
            took = [
                self.ended[name] - self.started[name]
                for name in self.ended
                if name in self.started and self.jobs[name].stage == stage
            ]
            if took:
                means[stage] = sum(took) / len(took)
        left, unknown = 0.0, False
        for name, job in self.jobs.items():
            if name in self.ended:
                continue
            if job.stage not in means:
                unknown = unknown or job.stage != "aggregate"
                continue
            spent = time.monotonic() - self.started[name] if name in self.started else 0
            left += max(0.0, means[job.stage] - spent)
        width = max(1, len(self.started) - len([name for name in self.ended if name in self.started]))
        if unknown:
            return "ETA –"
        minutes, seconds = divmod(int(left / width), 60)
        return f"ETA {minutes}:{seconds:02d}"
