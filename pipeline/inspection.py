"""Looking at what was launched: status, cancel, verify. They read the manifest, never the experiment file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import slurm
from pipeline import view
from pipeline.earlier_jobs import out_of_reach, require_within_reach
from pipeline.errors import UserError
from pipeline.eta import Durations, JobRun, seconds_left
from pipeline.lock import end_holder, is_here, lock, lock_holder
from pipeline.manifest import Manifest, Receipt, Task, damaged_files, read_error
from pipeline.printing import say
from pipeline.progress import read_progress
from pipeline.publication import is_published
from pipeline.running import LocalRuns
from pipeline.states import ALIVE, RUNNING, TaskState, done_tasks, receipts_of, task_states, to_json

ENDING_S = 60.0  # for a launcher that was told to end: its jobs get ten seconds


def status(folder: Path, *, as_json: bool = False) -> int:
    """Print how far an experiment is; the exit code is 1 if a task failed."""
    manifest = Manifest.read(folder / "manifest.json")
    states, eta = current_states(manifest, folder)
    if as_json:
        print(json.dumps(to_json(manifest, states, eta=eta), indent=1))
    else:
        view.print_states(manifest, states, eta=eta)
    return int(any(state.state == "failed" for state in states))


def current_states(manifest: Manifest, folder: Path) -> tuple[list[TaskState], float | None]:
    """Every task's state now, with one question to the cluster at most, and the seconds that are left.

    The latter is None where nothing runs, or nothing has run that tells.
    """
    jobs = {}
    receipts = receipts_of(manifest)
    done = done_tasks(manifest, receipts)
    undone = {job for task, job in manifest.jobs.items() if task not in done}
    if manifest.cluster == "slurm" and undone:
        if why := out_of_reach(manifest):
            print(f"{why}: nothing can be said of them here", file=sys.stderr)
        jobs = slurm.job_states(sorted(undone), manifest.job_identities)
    alive = manifest.cluster == "local" and lock_holder(folder / "manifest.lock") is not None
    here = LocalRuns.read(folder) if alive else None
    started = [run.tasks for run in here.jobs if run.runs] if here is not None else []
    started = [tasks for tasks in started if all(manifest.has(task) for task in tasks)]
    states = task_states(manifest, done, jobs, launcher_alive=alive, started=started)
    eta = None
    if here is not None and all(manifest.has(task) for run in here.jobs for task in run.tasks):
        eta = here.seconds_left(manifest, Durations(manifest.tasks, receipts))
    elif any(state.state == "running" for state in states) and jobs:
        eta = _eta_on_slurm(manifest, receipts, states, jobs)
    return [_published(manifest, state, folder) for state in states], eta


def _eta_on_slurm(
    manifest: Manifest,
    receipts: Mapping[str, Receipt | None],
    states: Sequence[TaskState],
    jobs: Mapping[str, slurm.JobState],
) -> float | None:
    """Seconds left if as many jobs go on running at once as do now."""
    tasks: dict[str, list[Task]] = {}
    for state in states:
        if state.job is not None and state.state in ("running", "starting", "queued"):
            tasks.setdefault(state.job, []).append(state.task)
    job_of = {task.id: job for job, several in tasks.items() for task in several}
    runs = []
    for job, several in tasks.items():
        after = frozenset(job_of[need] for task in several for need in task.needs if need in job_of)
        running = jobs[job].state in RUNNING
        elapsed = slurm.seconds(jobs[job].elapsed) if running else None
        said = read_progress(manifest.folder(several[0])) if running and len(several) == 1 else None
        share = None if said is None or said[1] <= 0 else min(1.0, said[0] / said[1])
        runs.append(JobRun(job, several, after - {job}, elapsed=elapsed, progress=share))
    at_once = max(1, sum(run.elapsed is not None for run in runs))
    return seconds_left(runs, Durations(manifest.tasks, receipts), cpus=at_once)


def _published(manifest: Manifest, state: TaskState, folder: Path) -> TaskState:
    """The state; of tables that are made and do not lie beside the manifest: that these are still to come."""
    if state.task.stage != "aggregate" or state.state != "done":
        return state
    receipt, tables = manifest.receipt(state.task), folder / "tables"
    if receipt is None or is_published(receipt, tables):
        return state
    error = read_error(manifest.folder(state.task))
    if error is not None:
        return replace(state, state="failed", detail=str(error.get("message", "")), log=error.get("log"))
    detail = f"its tables are made, but not in {tables}: the same launch puts them there"
    return replace(state, state="waiting", detail=detail)


def cancel(folder: Path) -> int:
    """Cancel every job of the experiment that is still alive; on this machine, end its launcher."""
    manifest = Manifest.read(folder / "manifest.json")
    if manifest.cluster != "slurm":
        return _end_launcher(folder / "manifest.lock")

    require_within_reach(manifest, folder / "manifest.json")
    with lock(folder / "manifest.lock"):
        states = slurm.job_states(sorted(set(manifest.jobs.values())), manifest.job_identities)
        alive = sorted(job for job, state in states.items() if state.state in ALIVE)
        if alive:
            slurm.cancel(alive, manifest.job_identities)
        if manifest.submitting:  # by a launcher that died
            slurm.cancel_named(manifest.submitting)
    print(f"cancelled {len(alive)} jobs" if alive else "nothing to cancel")
    return 0


def _end_launcher(path: Path) -> int:
    """Have the launcher on this machine end as by Ctrl-C: its jobs get a moment for a checkpoint.

    Args:
        path: of the lock that it holds.

    Raises:
        UserError: it runs on another machine, is another user's, or does not end.
    """
    holder = lock_holder(path)
    if holder is None:
        print("nothing to cancel")
        return 0
    if not is_here(holder):
        raise UserError(
            f"this experiment runs on {holder.get('host', '?')} (process {holder.get('pid', '?')}):"
            " cancel it there"
        )
    try:
        end_holder(holder)
    except ProcessLookupError:
        pass
    except PermissionError:
        who = holder.get("user", "?")
        raise UserError(f"this experiment is run by {who}, who alone can cancel it") from None
    deadline = time.monotonic() + ENDING_S
    while (now := lock_holder(path)) is not None and now.get("pid") == holder["pid"]:
        if time.monotonic() > deadline:
            raise UserError(
                f"the launcher (process {holder['pid']}) was told to end and has not within {ENDING_S:.0f} s"
            )
        time.sleep(0.1)
    print(f"cancelled: the launcher (process {holder['pid']}) has ended its jobs; the same command goes on")
    return 0


def verify(folder: Path, *, repair: bool = False) -> int:
    """Hash every finished task's files again; the exit code is 1 if any differs.

    Args:
        repair: withdraw the receipts of damaged tasks, so that the next launch runs them, and what depends on
            them, again.
    """
    manifest = Manifest.read(folder / "manifest.json")
    finished = 0
    damaged: dict[str, list[str]] = {}
    for task in manifest.tasks:
        receipt = manifest.receipt(task)
        finished += receipt is not None
        if found := _damage(manifest, task, receipt):
            damaged[task.id] = found
    problems = [problem for found in damaged.values() for problem in found]
    for problem in problems:
        say(problem)
    print(f"{finished} of {len(manifest.tasks)} tasks are done; {len(problems)} damaged files")
    if repair and problems:
        with lock(folder / "manifest.lock"):
            for task_id in damaged:  # hashing takes hours: a launch may have run it again meanwhile
                task = manifest.task(task_id)
                if _damage(manifest, task, manifest.receipt(task)):
                    (manifest.folder(manifest.task(task_id)) / "receipt.json").unlink(missing_ok=True)
                    print(f"the next launch runs again: {task_id}, and what depends on it")
    return int(bool(problems))


def _damage(manifest: Manifest, task: Task, receipt: Receipt | None) -> list[str]:
    """What is damaged of a task: one line for each of its files, or for the receipt itself."""
    if receipt is not None:
        return damaged_files(manifest.folder(task), receipt)
    path = manifest.damaged_receipt(task)
    return [f"{path}: is not as it was written"] if path else []
