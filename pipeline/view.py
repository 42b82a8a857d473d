"""What the launcher prints: plans, states, the live view, and the next commands to type."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.jobs import Job
from pipeline.manifest import Manifest, Task, read_error
from pipeline.specs import STAGES, Resources
from pipeline.stages.work import WARNING_STAGES, Entry, read_progress, warnings_of
from pipeline.states import ORDER, TaskState, counts

if TYPE_CHECKING:
    from rich.console import Console

    from slurm import JobEvent, Profile


PIPE_COLUMNS = 160


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    # Beyond a terminal (a log file, a pipe) lines are not folded, and tables get the room they need.
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        highlight=False,
        emoji=False,  # ":cat:" in a path is no cat
        soft_wrap=True,
        width=None if stream.isatty() else PIPE_COLUMNS,
    )


def print_experiments(ready: Mapping[str, Path]) -> None:
    """Each ready experiment with the first line of its opening comment."""
    from rich.table import Table

    table = Table("name", "what it is", box=None, header_style="bold")
    for name, path in sorted(ready.items()):
        table.add_row(name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    console().print(table)
    console().print(
        "\nrun one:   python -m pipeline.launch all NAME\nread one:  python -m pipeline.launch show NAME"
    )


def print_yaml(value: Any) -> None:
    import yaml

    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")


def print_cluster(name: str, profile: Profile | None, asked: str) -> None:
    where = (
        "this machine"
        if name == "local"
        else f"Slurm{f' ({asked})' if asked not in ('auto', 'slurm') else ''}"
    )
    why = " (no sbatch on the PATH)" if (name, asked) == ("local", "auto") else ""
    console().print(f"cluster: {where}{why}", markup=False)


def print_plan(manifest: Manifest, pending: set[str], *, jobs: int) -> None:
    """Every task: what it needs and runs on, whether it is done, and whether this command would run it."""
    rows = []
    resources: dict[str, str] = {}
    for task in manifest.tasks:
        done = task.id not in pending and manifest.receipt(task) is not None
        state = "[green]done[/]" if done else "to run" if task.id in pending else "[dim]not chosen[/]"
        asked = str(task.resources)
        if asked not in resources:
            resources[asked] = _resources(task)
        rows.append((task.id, _few(task.needs), resources[asked], state))
    _print_table(("task", "needs", "resources", "state"), rows)
    by_stage = ", ".join(f"{sum(task.stage == stage for task in manifest.tasks)} {stage}" for stage in STAGES)
    console().print(
        f"\n{len(manifest.tasks)} tasks ({by_stage}); {len(pending)} to run in {jobs} jobs"
        f"\nstore: {manifest.store}",
        markup=False,
    )


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without lines. Rich, slow with ten thousand rows, lays it out only where some must fold.

    Args:
        rows: cells; only those of the last column may have markup.
    """
    from rich.text import Text

    out = console()
    plain = [[*row[:-1], Text.from_markup(row[-1]).plain] for row in (header, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*plain)]
    if sum(widths) + 2 * len(widths) > out.width:
        from rich.table import Table

        table = Table(*header, box=None, header_style="bold")
        for row in rows:
            table.add_row(*row)
        out.print(table)
        return
    lines = []
    for number, (row, text) in enumerate(zip((header, *rows), plain)):
        padded = "".join(f" {cell:{width}} " for cell, width in zip(row[:-1], widths))
        line = f"{padded} {row[-1]}{' ' * (1 + widths[-1] - len(text[-1]))}"
        lines.append(line if number else f"[bold]{line}[/]")
    out.print("\n".join(lines))


def print_nothing_to_do(manifest: Manifest, folder: Path) -> None:
    console().print("everything is done; nothing to run")
    print_tables(folder)
    print_warnings(manifest, manifest.tasks)
    _print_next(folder)


def left_out(lacking: Mapping[str, Sequence[str]]) -> str:
    """Which tasks lack which needs, on one line."""
    needs = list(dict.fromkeys(need for missing in lacking.values() for need in missing))
    verb = "needs" if len(lacking) == 1 else "need"
    return f"{_few(list(lacking))} {verb} {_few(needs)}, not done"


def print_array(array: Sequence[Job], ids: Sequence[str]) -> None:
    tasks = sum(len(job.tasks) for job in array)
    jobs = f"job {ids[0]}" if len(ids) == 1 else f"{len(ids)} jobs {ids[0]} … {ids[-1]}"
    what = array[0].name if len(array) == 1 else f"{array[0].name} and {len(array) - 1} more"
    console().print(f"submitted {tasks} {array[0].stage} task{'s' * (tasks > 1)} as {jobs}: {what}")


def print_submitted(manifest: Manifest, folder: Path, submitted: int, active: int, *, waiting: bool) -> None:
    running = f"; {active} were submitted before and are still on their way" if active else ""
    rest = "Waiting for them; Ctrl-C leaves them running." if waiting else "Nothing has to stay alive here."
    console().print(f"{submitted} task{'s' * (submitted != 1)} submitted{running}. {rest}")
    if not waiting:
        print_warnings(manifest, manifest.tasks)
        _print_next(folder)


def print_outcome(
    manifest: Manifest,
    folder: Path,
    asked: Sequence[Task],
    broken: Mapping[str, Sequence[Path]] | None = None,
) -> int:
    """The table, warnings, what failed and where to read about it, the next commands. Returns the exit code.

    Args:
        asked: the tasks that were to be run.
        broken: jobs that ended without leaving a word, with their logs.
    """
    if any(task.stage == "aggregate" for task in asked):  # else they are of an earlier run
        print_tables(folder)
    print_warnings(manifest, manifest.tasks)
    logs_of_broken = list((broken or {}).values())
    errors = {
        # Where the disk is full there is no error.json, but the log has it.
        task.id: read_error(manifest.folder(task)) or _error_in_logs(task.id, logs_of_broken)
        for task in asked
        if manifest.receipt(task) is None
    }
    out = console(stderr=True)
    reasons: dict[str, list[str]] = {}
    for task, error in errors.items():
        if error:
            kind = "" if error.get("user_error") else f"{error.get('kind')}: "
            reasons.setdefault(f"{kind}{error.get('message')}", []).append(task)
    for message, tasks in reasons.items():
        out.print(f"[red]error[/]: {_few(tasks)}: ", end="")
        out.print(message, markup=False)
        first = errors[tasks[0]] or {}
        if first.get("log") and not first.get("user_error"):  # the user's errors need no log
            out.print(f"  log: {first['log']}", markup=False)
    unstarted = [task for task, error in errors.items() if not error]
    for name, logs in (broken or {}).items():
        if name in unstarted or name.split(" ")[0] in unstarted:
            out.print(f"[red]error[/]: the job {name} ended early: ", end="")
            out.print(_last_line(logs), markup=False)
            out.print(f"  log: {', '.join(map(str, logs))}", markup=False)
    if unstarted:
        console().print(f"not run: {_few(unstarted)}")
    _print_next(folder)
    if not errors:
        return 0
    return 2 if any(error and error.get("user_error") for error in errors.values()) else 1


def _error_in_logs(task: str, logs: Iterable[Sequence[Path]]) -> dict[str, Any] | None:
    """A user's error that a job could only print, as error.json would say it."""
    start = f"error: {task}: "
    for log in (log for some in logs for log in some if log.is_file()):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(start):
                return {"user_error": True, "message": line.removeprefix(start)}
    return None


def _last_line(logs: Sequence[Path]) -> str:
    for log in logs:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
        said = [line for line in lines if line.strip()]
        if said:
            return said[-1]
    return "its log is empty"


def print_warnings(manifest: Manifest, tasks: Iterable[Task], *, stderr: bool = True) -> None:
    """What those of some tasks that are done warn of; one warning of many tasks is said once."""
    entries = [
        Entry(task, manifest.folder(task), manifest.receipt(task), None)
        for task in tasks
        if task.stage in WARNING_STAGES
    ]
    out = console(stderr=stderr)
    for line, warned in warnings_of(entries).items():
        out.print("[yellow]warning[/]: ", end="")
        out.print(f"{_few(warned)}: {line}", markup=False)


def print_tables(folder: Path) -> None:
    """The summary table and where the CSVs are, once there are any."""
    tables = folder / "tables"
    if (tables / "summary.csv").is_file():
        from pipeline.report.terminal import terminal

        console().print(terminal(tables / "summary.csv"))
        names = sorted(path.name for path in tables.iterdir() if path.suffix in (".csv", ".md"))
        console().print(f"tables: {tables}/ ({', '.join(names)})", markup=False)


def print_states(manifest: Manifest, states: Sequence[TaskState]) -> None:
    """Counts a stage, then every task that is running, failed or waits for something."""
    from rich.table import Table

    out = console()
    table = Table("stage", *ORDER, box=None, header_style="bold")
    for stage, row in counts(states).items():
        table.add_row(stage, *(str(row[name]) if row[name] else "[dim]·[/]" for name in ORDER))
    out.print(
        f"{manifest.experiment['name']} on {manifest.cluster or 'no cluster yet'}, store {manifest.store}",
        markup=False,
    )
    out.print(table)
    for name in ("running", "failed", "cancelled"):
        chosen = [state for state in states if state.state == name]
        for state in chosen[:20]:
            job = f" (job {state.job})" if state.job else ""
            out.print(f"{name}: {state.task.id}{job}", end="")
            out.print(f": {state.detail}" if state.detail else "", markup=False)
            if state.log:
                out.print(f"  log: {state.log}", markup=False)
        if len(chosen) > 20:
            out.print(f"{name}: {len(chosen) - 20} more (--json lists all)")
    reasons: dict[str, int] = {}
    for state in states:
        if state.state == "queued" and state.detail:
            reasons[state.detail] = reasons.get(state.detail, 0) + 1
    for reason, number in reasons.items():
        out.print(f"queued: {number} because: {reason}", markup=False)
    print_warnings(manifest, manifest.tasks, stderr=False)


def _print_next(folder: Path) -> None:
    name = folder.name
    runs = "" if folder.parent == Path("runs").absolute() else f" --runs {shlex.quote(str(folder.parent))}"
    summary = shlex.quote(str(folder / "tables" / "summary.csv"))
    console().print(
        f"next:  python -m pipeline.launch status {name}{runs}   (logs: {folder / 'logs'})\n"
        f"       column -s, -t < {summary} | less -S",
        markup=False,
    )


def _few(names: Sequence[str], most: int = 2) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "-"


def _resources(task: Task) -> str:
    resources = Resources.model_validate(task.resources)
    ranks = resources.nodes * resources.ranks_per_node
    where = f"{resources.nodes} nodes × " if resources.nodes > 1 else ""
    each = (
        f"{resources.ranks_per_node} rank{'s' * (resources.ranks_per_node > 1)}" if ranks > 1 else "1 process"
    )
    return f"{where}{each}, {resources.cpus_per_rank} cpu, {resources.device}, {resources.minutes} min"


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
            print_warnings(self.manifest, self.jobs[event.name].tasks)

    def render(self) -> Any:
        """The whole view: one bar for all jobs, one for each that runs."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

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
                table.add_row(task, bar, text, f"{time.monotonic() - started:.0f} s")
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
