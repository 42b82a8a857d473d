"""The jobs that an earlier launch of the same experiment has given to Slurm: which of them still count."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import slurm
from pipeline.errors import UserError
from pipeline.files import look_for_new_files
from pipeline.manifest import Manifest
from pipeline.states import ALIVE, done_tasks, pending_tasks


def carry_over(manifest: Manifest, path: Path, cluster: str) -> tuple[Manifest, set[str]]:
    """Take over the job ids of an earlier launch.

    Args:
        manifest: of this launch, without jobs.
        path: the manifest's file, where the earlier one stands.
        cluster: ``local`` or ``slurm``.

    Returns:
        The manifest with them, and the tasks whose jobs are alive.

    Raises:
        UserError: jobs are alive of tasks that the experiment has no more, or while it is to run here; or
            they are on another cluster, or another user's.
    """
    jobs: dict[str, str] = {}
    submissions: dict[str, slurm.Submission] = {}
    if path.is_file():
        before = Manifest.read(path)
        if before.cluster == "slurm" and cluster == "local":
            _require_ended(before, path)
        elif before.cluster == "slurm":  # the jobs of a local launch ended with its launcher
            require_within_reach(before, path)
            jobs = _jobs_of_unchanged_tasks(manifest, before)
            numbers = {slurm.number_of(job) for job in jobs.values()}
            known = before.job_identities
            submissions = {number: known[number] for number in known if number in numbers}
            if before.submitting:  # a launcher that died while it submitted them
                slurm.cancel_named(before.submitting)
    manifest = replace(manifest, jobs=jobs, submissions=submissions, cluster=cluster)
    done = done_tasks(manifest)
    unfinished = {task: job for task, job in jobs.items() if task not in done}
    states = slurm.job_states(sorted(set(unfinished.values())), submissions) if unfinished else {}
    for task, job in unfinished.items():
        if job in states and states[job].state == "COMPLETED":
            look_for_new_files(manifest.folder(manifest.task(task)))
    alive = {task for task, job in unfinished.items() if job in states and states[job].state in ALIVE}
    return manifest, alive


def out_of_reach(manifest: Manifest) -> str:
    """Why the jobs of unfinished tasks can be neither seen nor cancelled from here; empty: they can.

    They are on another cluster than the one whose Slurm answers here, or belong to another user.
    """
    done = done_tasks(manifest)
    numbers = {slurm.number_of(job) for task, job in manifest.jobs.items() if task not in done}
    unfinished = [said for number, said in manifest.submissions.items() if number in numbers]
    here = slurm.site_config().get("ClusterName", "") if any(said.cluster for said in unfinished) else ""
    for said in unfinished:
        if here and said.cluster and said.cluster != here:
            return f"its jobs were given to the Slurm cluster {said.cluster!r}, and this is {here!r}"
        if said.user not in (None, os.getuid()):
            return f"its jobs were given to Slurm by the user with the id {said.user}"
    return ""


def require_within_reach(manifest: Manifest, path: Path) -> None:
    """Make sure that a launch or a cancel from here sees the jobs of an earlier launch.

    Raises:
        UserError: as :func:`out_of_reach` says.
    """
    if why := out_of_reach(manifest):
        raise UserError(
            f"{why}: launch or cancel it from there; once they have ended, remove {path} to launch it from"
            " here"
        )


def _require_ended(before: Manifest, path: Path) -> None:
    """Raises UserError where Slurm has, or may have, jobs of an earlier launch that are to run here."""
    done = done_tasks(before)
    jobs = sorted({job for task, job in before.jobs.items() if task not in done})
    if not jobs and not before.submitting:
        return
    if not slurm.available():
        raise UserError(
            "jobs of this experiment were given to Slurm, which cannot be asked from here:"
            f" launch it there, or remove {path} if they have ended"
        )
    require_within_reach(before, path)
    states = slurm.job_states(jobs, before.job_identities)
    if any(state.state in ALIVE for state in states.values()) or before.submitting:
        raise UserError(
            "jobs of this experiment are on Slurm: use --cluster slurm, or end them with"
            f" `python -m pipeline.launch cancel {before.experiment['name']}`"
        )


def _jobs_of_unchanged_tasks(manifest: Manifest, before: Manifest) -> dict[str, str]:
    """An earlier launch's job ids of tasks that are as they were; tables are made anew all the same.

    Raises:
        UserError: jobs of other tasks are alive.
    """
    was = {task.id: task.key for task in before.tasks}
    kept = {
        task.id: before.jobs[task.id]
        for task in manifest.tasks
        if task.id in before.jobs and was[task.id] == task.key
    }
    ours = set(kept.values())
    others = {
        before.jobs[task.id]: task.stage
        for task in before.tasks
        if task.id in before.jobs and before.jobs[task.id] not in ours
    }
    states = slurm.job_states(sorted(others), before.job_identities) if others else {}
    alive = [job for job in others if job in states and states[job].state in ALIVE]
    lost = [job for job in alive if others[job] != "aggregate"]
    if lost:
        raise UserError(
            f"{len(lost)} jobs are queued or running of tasks that this experiment had before it was"
            f" changed: `python -m pipeline.launch cancel {before.experiment['name']}` ends them; or give the"
            " changed one another name"
        )
    if alive:
        slurm.cancel(alive, before.job_identities)
    return kept


def without_overtaken(
    manifest: Manifest, stages: Sequence[str], active: set[str]
) -> tuple[set[str], list[str]]:
    """Leave out tasks with live jobs that need one which is to run first: they wait for what will not come.

    Returns:
        The tasks whose jobs may stay, and the ids of the jobs that may not.
    """
    stay = set(active)
    while stay:
        coming = {task.id for task in pending_tasks(manifest, stages, stay)}
        late = {
            task.id
            for task in manifest.tasks
            if task.id in stay and task.stage in stages and not coming.isdisjoint(task.needs)
        }
        stay -= late
        if not late:
            break
    return stay, sorted({manifest.jobs[task] for task in active - stay})
