"""What the launcher prints: plans, states, outcomes, and the next commands to type."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import one_line, printable
from pipeline.eta import in_words
from pipeline.files import open_regular
from pipeline.manifest import Manifest, Task, read_error
from pipeline.printing import console, print_table, say
from pipeline.progress import WARNING_STAGES, warnings_of
from pipeline.stages import STAGES, computes_on_gpu
from pipeline.states import ORDER, TaskState, counts

if TYPE_CHECKING:
    import slurm
    from pipeline.jobs import Job
    from slurm import Profile

MOST_OF_A_LOG = 1 << 22  # bytes at its end that are looked through


def print_experiments(ready: Mapping[str, Path]) -> None:
    """Each ready experiment with the first line of its opening comment."""
    rows = [
        (name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
        for name, path in sorted(ready.items())
    ]
    print_table(("name", "what it is"), rows)
    say("\nrun one:   python -m pipeline.launch all NAME\nread one:  python -m pipeline.launch show NAME")


def print_yaml(value: Any) -> None:
    import yaml

    print(printable(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)), end="")


def print_cluster(name: str, profile: Profile | None, asked: str) -> None:
    where = (
        "this machine"
        if name == "local"
        else f"Slurm{f' ({asked})' if asked not in ('auto', 'slurm') else ''}"
    )
    why = " (no sbatch on the PATH)" if (name, asked) == ("local", "auto") else ""
    say(f"cluster: {where}{why}")


def print_plan(manifest: Manifest, pending: set[str], *, jobs: int) -> None:
    """Every task: what it needs and runs on, whether it is done, and whether this command would run it."""
    rows = []
    resources: dict[str, str] = {}
    for task in manifest.tasks:
        done = task.id not in pending and manifest.receipt(task) is not None
        state = "done" if done else "to run" if task.id in pending else "not chosen"
        asked = f"{computes_on_gpu(task.stage, task.spec)} {task.resources}"
        if asked not in resources:
            resources[asked] = _resources(task)
        rows.append((task.id, _few(task.needs), resources[asked], state))
    print_table(("task", "needs", "resources", "state"), rows)
    by_stage = ", ".join(f"{sum(task.stage == stage for task in manifest.tasks)} {stage}" for stage in STAGES)
    say(
        f"\n{len(manifest.tasks)} tasks ({by_stage}); {len(pending)} to run in {jobs} jobs"
        f"\nstore: {manifest.store}"
    )


def print_jobs(asked: Sequence[tuple[Sequence[Job], slurm.Request, str | None]]) -> None:
    """The jobs of a launch, those of one request together, with what each of them is asked for.

    Args:
        asked: jobs that are submitted as one array, their request, and on Slurm the partition.
    """
    rows: dict[tuple[str, ...], int] = {}
    for array, request, partition in asked:
        ranks = request.nodes * request.ranks_per_node
        row = (
            array[0].stage,
            *(() if partition is None else (partition,)),
            str(request.nodes),
            str(ranks),
            str(request.cpus_per_rank),
            f"{ranks * request.gpus_per_rank}",
            *_limits(request, on_slurm=partition is not None),
        )
        rows[row] = rows.get(row, 0) + len(array)
    if rows:
        where = ("partition",) if any(partition is not None for _, _, partition in asked) else ()
        header = ("jobs", "stage", *where, "nodes", "ranks", "CPUs a rank", "GPUs", "memory a node", "limit")
        say("")
        print_table(header, [(str(count), *row) for row, count in rows.items()])


def _limits(request: slurm.Request, *, on_slurm: bool) -> tuple[str, str]:
    """Memory of a node and time; this machine limits neither."""
    if not on_slurm:
        return "-", "-"
    memory = "the site's default" if request.memory_gb is None else f"{request.memory_gb:g} GiB"
    return memory, f"{request.minutes} min"


def print_nothing_to_do(manifest: Manifest, folder: Path) -> None:
    say("everything is done; nothing to run")
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
    say(f"submitted {tasks} {array[0].stage} task{'s' * (tasks > 1)} as {jobs}: {what}")


def print_submitted(manifest: Manifest, folder: Path, submitted: int, active: int, *, waiting: bool) -> None:
    running = f"; {active} were submitted before and are still on their way" if active else ""
    rest = "Waiting for them; Ctrl-C leaves them running." if waiting else "Nothing has to stay alive here."
    say(f"{submitted} task{'s' * (submitted != 1)} submitted{running}. {rest}")
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
    reasons: dict[str, list[str]] = {}
    for task, error in errors.items():
        if error:
            kind = "" if error.get("user_error") else f"{error.get('kind')}: "
            reasons.setdefault(f"{kind}{error.get('message')}", []).append(task)
    for message, tasks in reasons.items():
        _complain("error", "red", _few(tasks), message)
        first = errors[tasks[0]] or {}
        if first.get("log") and not first.get("user_error"):  # the user's errors need no log
            say(f"  log: {first['log']}", stderr=True)
    unstarted = [task for task, error in errors.items() if not error]
    for name, logs in (broken or {}).items():
        if name in unstarted or name.split(" ")[0] in unstarted:
            _complain("error", "red", f"the job {name} ended early", _last_line(logs))
            say(f"  log: {', '.join(map(str, logs))}", stderr=True)
    if unstarted:
        say(f"not run: {_few(unstarted)}")
    _print_next(folder)
    if not errors:
        return 0
    return 2 if any(error and error.get("user_error") for error in errors.values()) else 1


def _error_in_logs(task: str, logs: Iterable[Sequence[Path]]) -> dict[str, Any] | None:
    """A user's error that a job could only print, as error.json would say it."""
    start = f"error: {task}: "
    for log in (log for some in logs for log in some):
        for line in _lines_of(log):
            if line.startswith(start):
                return {"user_error": True, "message": line.removeprefix(start)}
    return None


def _last_line(logs: Sequence[Path]) -> str:
    for log in logs:
        said = [line for line in _lines_of(log) if line.strip()]
        if said:
            return said[-1]
    return "its log is empty"


def _lines_of(log: Path) -> list[str]:
    """The end of a log; nothing where there is none."""
    try:
        with open_regular(log) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - MOST_OF_A_LOG))
            return file.read(MOST_OF_A_LOG).decode("utf-8", errors="replace").split("\n")
    except OSError:
        return []


def print_warnings(manifest: Manifest, tasks: Iterable[Task], *, stderr: bool = True) -> None:
    """What those of some tasks that are done warn of; one warning of many tasks is said once."""
    warning = [(task, manifest.receipt(task)) for task in tasks if task.stage in WARNING_STAGES]
    for line, warned in warnings_of(warning).items():
        _complain("warning", "yellow", _few(warned), line, stderr=stderr)


def _complain(what: str, style: str, who: str, message: str, *, stderr: bool = True) -> None:
    say(what, style=style, stderr=stderr, end="")
    say(f": {who}: ", stderr=stderr, end="")
    say(message, stderr=stderr)


def print_tables(folder: Path) -> None:
    """The summary table and where the CSVs are, once there are any."""
    tables = folder / "tables"
    if (tables / "summary.csv").is_file():
        from pipeline.report.terminal import terminal

        try:
            console().print(terminal(tables / "summary.csv"))
        except (ValueError, KeyError, TypeError, OSError) as error:
            say(f"{tables / 'summary.csv'} cannot be shown: {one_line(error)}", stderr=True)
        names = sorted(path.name for path in tables.iterdir() if path.suffix in (".csv", ".md"))
        say(f"tables: {tables}/ ({', '.join(names)})")


def print_states(manifest: Manifest, states: Sequence[TaskState], *, eta: float | None = None) -> None:
    """Counts a stage, then every task that is running, failed or waits for something, and the time left.

    Args:
        eta: seconds; None: nothing runs, or nothing has run that tells.
    """
    say(f"{manifest.experiment['name']} on {manifest.cluster or 'no cluster yet'}, store {manifest.store}")
    print_table(
        ("stage", *ORDER),
        [
            (stage, *(str(row[name]) if row[name] else "·" for name in ORDER))
            for stage, row in counts(states).items()
        ],
    )
    for name in ("running", "starting", "failed", "cancelled"):
        chosen = [state for state in states if state.state == name]
        for state in chosen[:20]:
            job = f" (job {state.job})" if state.job else ""
            say(f"{name}: {state.task.id}{job}", end="")
            say(f": {state.detail}" if state.detail else "")
            if state.log:
                say(f"  log: {state.log}")
        if len(chosen) > 20:
            say(f"{name}: {len(chosen) - 20} more (--json lists all)")
    for state in states:
        if state.state == "waiting" and state.detail:
            say(f"waiting: {state.task.id}: {state.detail}")
    reasons: dict[str, int] = {}
    for state in states:
        if state.state == "queued" and state.detail:
            reasons[state.detail] = reasons.get(state.detail, 0) + 1
    for reason, number in reasons.items():
        say(f"queued: {number} because: {reason}")
    if eta is not None:
        queue = ", if as many jobs go on running at once as now" if manifest.cluster == "slurm" else ""
        say(f"{in_words(eta)}{queue}")
    print_warnings(manifest, manifest.tasks, stderr=False)


def _print_next(folder: Path) -> None:
    name = folder.name
    runs = "" if folder.parent == Path("runs").absolute() else f" --runs {shlex.quote(str(folder.parent))}"
    logs = f"   (logs: {folder / 'logs'})" if (folder / "logs").is_dir() else ""
    say(f"next:  python -m pipeline.launch status {shlex.quote(name)}{runs}{logs}")
    summary = folder / "tables" / "summary.csv"
    if summary.is_file():
        say(f"       column -s, -t < {shlex.quote(str(summary))} | less -S")


def _few(names: Sequence[str], most: int = 2) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown or "-"


def _resources(task: Task) -> str:
    from pipeline.specs import Resources

    resources = Resources.model_validate(task.resources)
    ranks = resources.nodes * resources.ranks_per_node
    where = f"{resources.nodes} nodes × " if resources.nodes > 1 else ""
    each = (
        f"{resources.ranks_per_node} rank{'s' * (resources.ranks_per_node > 1)}" if ranks > 1 else "1 process"
    )
    device = resources.device if computes_on_gpu(task.stage, task.spec) else "cpu"
    return f"{where}{each}, {resources.cpus_per_rank} cpu, {device}, {resources.minutes} min"
