"""How far each task of a manifest is: manifest, receipts and one question to the cluster, joined."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.manifest import Manifest, Receipt, Task, read_error
from pipeline.progress import read_progress

if TYPE_CHECKING:
    from slurm import JobState

# Slurm's words
RUNNING = ("RUNNING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED")
ALIVE = RUNNING + QUEUED
STARTING = ("CONFIGURING",)
ORDER = ("done", "running", "starting", "queued", "failed", "cancelled", "waiting")


@dataclass(frozen=True)
class TaskState:
    """One task's state.

    Attributes:
        state: done | running | starting (its job runs, and has not come to it yet or not far enough to say
            so) | queued | failed | cancelled | waiting (nobody has been asked to run it).
        detail: why, in words: a queue reason, an error message, a share of the work.
        log: where to read more, if anywhere.
    """

    task: Task
    state: str
    detail: str = ""
    job: str | None = None
    log: str | None = None


def inputs_of(task: Task, receipts: Mapping[str, Receipt | None]) -> str:
    """Which results a task read or would read: a SHA-256 over the receipts of what it needs, where they are.

    Empty where one of them is of a version that wrote no checksum.
    """
    sums = ["" if receipt is None else receipt.sum or "?" for receipt in map(receipts.get, task.needs)]
    return "" if "?" in sums else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def is_done(task: Task, receipts: Mapping[str, Receipt | None]) -> bool:
    """Whether a task needs no run: it has a receipt, made of what the tasks that it needs have now.

    Args:
        receipts: its own and those of its needs, by task id.
    """
    receipt = receipts.get(task.id)
    if receipt is None:
        return False
    missing = set(receipt.metrics.get("unfinished", ())) if task.stage == "aggregate" else ()
    if any(need in missing and receipts.get(need) is not None for need in task.needs):
        return False
    now = inputs_of(task, receipts)
    return not receipt.inputs or not now or receipt.inputs == now


def pending_tasks(manifest: Manifest, stages: Iterable[str], active: Iterable[str] = ()) -> list[Task]:
    """The tasks of some stages that are neither done nor with a job that is still alive, in plan order.

    A task is pending too whenever anything that it reads is: what it made of the old may not fit the new.

    Args:
        active: ids of the tasks whose jobs are queued or running.
    """
    stages, active = set(stages), set(active)
    pending: list[Task] = []
    unfinished: set[str] = set()
    receipts: dict[str, Receipt | None] = {}
    for task in manifest.tasks:
        receipts[task.id] = manifest.receipt(task)
        done = unfinished.isdisjoint(task.needs) and is_done(task, receipts)
        if not done and task.id in active:
            unfinished.add(task.id)
        elif not done and task.stage in stages:
            unfinished.add(task.id)
            pending.append(task)
    return pending


def receipts_of(manifest: Manifest) -> dict[str, Receipt | None]:
    """Every task's receipt."""
    return {task.id: manifest.receipt(task) for task in manifest.tasks}


def done_tasks(manifest: Manifest, receipts: Mapping[str, Receipt | None] | None = None) -> set[str]:
    """The ids of the tasks that need no run.

    Args:
        receipts: of all tasks, where they have been read: to read ten thousand takes a while.
    """
    receipts = receipts_of(manifest) if receipts is None else receipts
    return {task.id for task in manifest.tasks if is_done(task, receipts)}


def task_states(
    manifest: Manifest,
    done: Collection[str],
    jobs: Mapping[str, JobState],
    *,
    launcher_alive: bool,
    started: Iterable[Sequence[str]] = (),
) -> list[TaskState]:
    """Every task's state.

    Args:
        done: what :func:`done_tasks` says; to read ten thousand receipts takes a while.
        jobs: what the cluster says, by job id; empty on one machine.
        launcher_alive: whether a launcher holds this manifest (then its undone tasks are on their way).
        started: the tasks of each job that runs on this machine, in their order.
    """
    errors = {task.id: read_error(manifest.folder(task)) for task in manifest.tasks if task.id not in done}
    progress = {task: read_progress(manifest.folder(manifest.task(task))) for task in errors}
    running = [list(tasks) for tasks in started] + _running_jobs(manifest, jobs)
    in_turn = _in_turn(running, lambda task: task not in done and errors[task] is None, progress)
    states = []
    for task in manifest.tasks:
        job_id = manifest.jobs.get(task.id)
        if task.id in done:
            states.append(TaskState(task, "done", job=job_id))
            continue
        job = jobs.get(job_id) if job_id else None
        error, said = errors[task.id], progress[task.id]
        if error is not None:
            states.append(TaskState(task, "failed", error["message"], job_id, error["log"]))
        elif task.id in in_turn:
            states.append(TaskState(task, in_turn[task.id], _share(said), job_id))
        elif launcher_alive and said and not running:
            states.append(TaskState(task, "running", _share(said), job_id))
        elif job is not None and job.state in STARTING:
            states.append(TaskState(task, "starting", job.reason, job_id))
        elif job is not None and job.state in (*QUEUED, *RUNNING):
            states.append(TaskState(task, "queued", job.reason, job_id))
        elif job is not None and job.state.startswith("CANCELLED"):
            states.append(TaskState(task, "cancelled", job.reason, job_id))
        elif job is not None and job.state not in ("UNKNOWN", "COMPLETED"):
            states.append(TaskState(task, "failed", f"its job ended {job.state}", job_id))
        else:
            states.append(TaskState(task, "queued" if launcher_alive else "waiting", "", job_id))
    return states


def _running_jobs(manifest: Manifest, jobs: Mapping[str, JobState]) -> list[list[str]]:
    """The tasks of each job that runs on the cluster, in their order."""
    found: dict[str, list[str]] = {}
    for task in manifest.tasks:
        job = manifest.jobs.get(task.id)
        if job is not None and job in jobs and jobs[job].state in RUNNING:
            found.setdefault(job, []).append(task.id)
    return list(found.values())


def _in_turn(
    running: Iterable[Sequence[str]], open_: Callable[[str], bool], progress: Mapping[str, object]
) -> dict[str, str]:
    """Of each running job the task at work (``running``), or the first that will be (``starting``)."""
    found: dict[str, str] = {}
    for tasks in running:
        left = [task for task in tasks if open_(task)]
        at_work = [task for task in left if progress[task] is not None]
        if at_work:
            found |= dict.fromkeys(at_work, "running")
        elif left:
            found[left[0]] = "starting"
    return found


def _share(progress: tuple[float, float, str] | None) -> str:
    if progress is None:
        return ""
    return f"{100 * progress[0] / max(progress[1], 1e-9):.0f} % {progress[2]}".strip()


def counts(states: Iterable[TaskState]) -> dict[str, dict[str, int]]:
    """Stage → state → number of tasks."""
    table: dict[str, dict[str, int]] = {}
    for state in states:
        row = table.setdefault(state.task.stage, dict.fromkeys(ORDER, 0))
        row[state.state] += 1
    return table


def to_json(manifest: Manifest, states: list[TaskState], *, eta: float | None = None) -> dict[str, Any]:
    """What ``status --json`` says; ``eta_seconds`` is None where nothing runs, or nothing tells."""
    return {
        "experiment": manifest.experiment["name"],
        "cluster": manifest.cluster,
        "store": manifest.store,
        "counts": counts(states),
        "eta_seconds": None if eta is None else round(eta),
        "tasks": [
            {
                "id": state.task.id,
                "state": state.state,
                "detail": state.detail,
                "job": state.job,
                "log": state.log,
                "folder": str(manifest.folder(state.task)),
            }
            for state in states
        ],
    }
