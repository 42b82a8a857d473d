"""From pending tasks to jobs: what is packed together, what waits for what, what a job does."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import slurm
from pipeline.errors import one_line, redacted_traceback
from pipeline.files import chosen_umask
from pipeline.manifest import Task
from pipeline.process import set_up_process
from pipeline.specs import Resources
from pipeline.stages import computes_on_gpu

PATIENCE_S = 90.0  # for receipts to appear: a network file system remembers for a minute that there was none


@dataclass(frozen=True)
class Job:
    """Tasks of one stage that run one after another in one job.

    Attributes:
        after: names of the jobs it waits for.
        any_outcome: start when those have ended, however they ended (aggregate), not only when all succeeded.
    """

    name: str
    stage: str
    tasks: tuple[Task, ...]
    after: tuple[str, ...]
    any_outcome: bool = False

    @property
    def resources(self) -> Resources:
        return Resources.model_validate(self.tasks[0].resources)

    @property
    def computes_on_gpu(self) -> bool:
        """Whether its tasks do where there is a GPU; either all or none of them do."""
        return computes_on_gpu(self.stage, self.tasks[0].spec)


def pack(pending: Iterable[Task]) -> list[Job]:
    """Make jobs of tasks, in an order in which every job comes after those it waits for.

    Tasks of one stage with the same needs and resources, all on a GPU or none, share a job, ``tasks_per_job``
    at most. What a task needs and is not pending is taken to be done.

    Args:
        pending: the tasks to run, in plan order.
    """
    groups: dict[tuple, list[Task]] = {}
    for task in pending:
        asked = (computes_on_gpu(task.stage, task.spec), repr(sorted(task.resources.items())))
        groups.setdefault((task.stage, task.needs, *asked), []).append(task)
    jobs: list[Job] = []
    job_of: dict[str, str] = {}
    for tasks in groups.values():
        size = Resources.model_validate(tasks[0].resources).tasks_per_job
        # Even packs end together: 17 tasks at 16 a job make 8 and 9, not 16 and 1. Neighbours stay together,
        # since they share a backbone and with it decoded images and features.
        packs = -(-len(tasks) // size)
        for number in range(packs):
            chunk = tuple(tasks[len(tasks) * number // packs : len(tasks) * (number + 1) // packs])
            name = chunk[0].id if len(chunk) == 1 else f"{chunk[0].id} +{len(chunk) - 1}"
            after = dict.fromkeys(job_of[need] for need in chunk[0].needs if need in job_of)
            jobs.append(Job(name, chunk[0].stage, chunk, tuple(after), chunk[0].stage == "aggregate"))
        for job in jobs[-packs:]:
            job_of.update({task.id: job.name for task in job.tasks})
    return jobs


def arrays(jobs: Iterable[Job], alive: Collection[str] = ()) -> list[list[Job]]:
    """Jobs that can be submitted as one array: the same stage, resources and dependencies.

    Args:
        jobs: of :func:`pack`.
        alive: tasks whose jobs an earlier launch submitted; whoever needs them waits for these too.
    """
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        waits = () if job.any_outcome else tuple(need for need in job.tasks[0].needs if need in alive)
        asked = (job.computes_on_gpu, repr(sorted(job.tasks[0].resources.items())))
        groups.setdefault((job.stage, job.after, waits, *asked), []).append(job)
    return list(groups.values())


class JobFailed(Exception):
    """At least one task of a job failed; each one's error.json says why."""


class TaskJob:
    """What a job executes on each of its ranks: its tasks in turn. A failing task does not stop the next.

    Stopped by a signal, it asks Slurm to queue it again; the next start goes on from the last checkpoint.
    The launcher's choice of permissions comes along, whatever the job's environment.

    Args:
        manifest: the manifest.
        tasks: to run; one that has another key in the manifest by then is refused.
    """

    installs_stop_flag = True

    def __init__(self, manifest: Path, tasks: Iterable[Task]) -> None:
        self.manifest = manifest.absolute()
        self.tasks = {task.id: task.key for task in tasks}
        self.umask = chosen_umask()

    def __call__(self) -> None:
        os.umask(self.umask)
        set_up_process()
        stop = slurm.StopFlag().install()
        from pipeline.stages.runner import run_task, user_errors
        from pipeline.stages.work import Interrupted

        log = slurm.log_of_this_job()
        failed = []
        worked = False

        def no_more_time() -> bool:  # Slurm warns of the time limit, and this task began the job
            return stop.number == signal.SIGUSR2 and not worked

        for task, key in self.tasks.items():
            try:
                worked |= run_task(
                    self.manifest,
                    task,
                    key=key,
                    stop_requested=stop,
                    no_more_time=no_more_time,
                    log=log,
                    patience_s=PATIENCE_S,
                )
            except Interrupted:
                if "SLURM_JOB_ID" in os.environ:
                    slurm.requeue()
                raise
            except user_errors() as error:
                print(f"error: {task}: {one_line(error)}", file=sys.stderr, flush=True)
                failed.append(task)
            except Exception as error:
                print(f"error: {task}:\n{redacted_traceback(error)}", file=sys.stderr, flush=True)
                failed.append(task)
        if failed:
            raise JobFailed(f"{len(failed)} of {len(self.tasks)} tasks failed: {', '.join(failed)}")
