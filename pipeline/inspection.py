"""Looking at what was launched: status, cancel, verify. They read the manifest, never the experiment file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import slurm
from pipeline import view
from pipeline.earlier_jobs import out_of_reach, require_within_reach
from pipeline.errors import UserError
from pipeline.lock import lock, lock_holder
from pipeline.manifest import Manifest, Receipt, Task, damaged_files, read_error
from pipeline.printing import say
from pipeline.publication import is_published
from pipeline.states import ALIVE, TaskState, done_tasks, task_states, to_json


def status(folder: Path, *, as_json: bool = False) -> int:
    """Print how far an experiment is; the exit code is 1 if a task failed."""
    manifest = Manifest.read(folder / "manifest.json")
    states = current_states(manifest, folder)
    if as_json:
        print(json.dumps(to_json(manifest, states), indent=1))
    else:
        view.print_states(manifest, states)
    return int(any(state.state == "failed" for state in states))


def current_states(manifest: Manifest, folder: Path) -> list[TaskState]:
    """Every task's state now, with one question to the cluster at most."""
    jobs = {}
    done = done_tasks(manifest)
    undone = {job for task, job in manifest.jobs.items() if task not in done}
    if manifest.cluster == "slurm" and undone:
        if why := out_of_reach(manifest):
            print(f"{why}: nothing can be said of them here", file=sys.stderr)
        jobs = slurm.job_states(sorted(undone), manifest.job_identities)
    alive = manifest.cluster == "local" and lock_holder(folder / "manifest.lock") is not None
    states = task_states(manifest, done, jobs, launcher_alive=alive)
    return [_published(manifest, state, folder) for state in states]


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
    """Cancel every job of the experiment that is still alive."""
    manifest = Manifest.read(folder / "manifest.json")
    if manifest.cluster != "slurm":
        if lock_holder(folder / "manifest.lock") is not None:
            raise UserError("this experiment runs on this machine: stop its launcher with Ctrl-C")
        print("nothing to cancel")
        return 0

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
