"""One launch of an experiment: what is left to do, given to this machine or to Slurm."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import slurm
from pipeline import view
from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.files import look_for_new_files
from pipeline.jobs import Job, TaskJob, arrays, pack
from pipeline.live import live
from pipeline.lock import Lock, TakenOver, lock
from pipeline.manifest import Manifest, Task
from pipeline.preflight import preflight
from pipeline.preview import planned
from pipeline.publication import bring_tables
from pipeline.stages import GPU_STAGES
from pipeline.states import ALIVE, done_tasks, pending_tasks


@dataclass(frozen=True)
class Cluster:
    """Where jobs go: ``local`` (profile None) or ``slurm`` with a profile."""

    name: str
    profile: slurm.Profile | None = None


def choose_cluster(where: str) -> Cluster:
    """Make a cluster of ``auto``, ``local``, ``slurm`` or a profile's path.

    Raises:
        slurm.SlurmError: Slurm was asked for and is not there, or the profile is wrong.
    """
    if where == "local" or (where == "auto" and not slurm.available()):
        return Cluster("local")
    if where not in ("auto", "slurm") and not where.endswith((".yaml", ".yml")):
        raise UserError(f"--cluster {where}: expected auto, local, slurm or a profile such as cluster.yaml")
    profile = slurm.load_profile(where) if where not in ("auto", "slurm") else slurm.Profile()
    slurm.require_controller()
    return Cluster("slurm", profile)


class Campaign:
    """An experiment, its tasks, and the folders it works in."""

    def __init__(self, experiment: Experiment, *, store: Path, runs: Path, cluster: str) -> None:
        self.where = cluster
        self.folder = runs.absolute() / experiment.name
        self.path = self.folder / "manifest.json"
        self.manifest = planned(experiment, store)
        self.experiment = experiment

    def launch(self, stages: Sequence[str], *, wait: bool = False) -> int:
        """Run or submit whatever of these stages is not done; returns the command's exit code.

        Raises:
            UserError: the store is not writable, another launcher holds the manifest, a check failed.
        """
        cluster = choose_cluster(self.where)
        view.print_cluster(cluster.name, cluster.profile, self.where)
        for folder in (Path(self.manifest.store), self.folder):
            _require_writable(folder)
        if "aggregate" in stages and os.path.lexists(self.folder / "tables"):
            _require_writable(self.folder / "tables")
        with lock(self.folder / "manifest.lock") as held:
            active = self._carry_over_jobs(cluster)
            active, overtaken = self._overtaken(stages, active)
            pending = self._startable(pending_tasks(self.manifest, stages, active), active)
            preflight(pending, self._sharded(pending))
            still = {task.id for task in pending_tasks(self.manifest, stages, active)}
            pending = [task for task in pending if task.id in still]  # another experiment shares the store
            if overtaken:
                slurm.cancel(overtaken)
            self.manifest.write(self.path)
            if not pending and not active:
                self._bring_tables(stages)
                view.print_nothing_to_do(self.manifest, self.folder)
                return 0
            for task in pending:  # what an earlier attempt left must not be taken for this one's
                if path := self.manifest.damaged_receipt(task):
                    print(f"{path} is not as it was written: {task.id} runs again", file=sys.stderr)
                for stale in ("error.json", "progress.json", "receipt.json"):
                    (self.manifest.folder(task) / stale).unlink(missing_ok=True)
            if cluster.name == "local":
                return self._run_here(pending)
            self._submit(pending, active, cluster.profile, held)
        view.print_submitted(self.manifest, self.folder, len(pending), len(active), waiting=wait)
        if not wait:
            return 0
        asked = active | {task.id for task in pending}
        return self._wait([task for task in self.manifest.tasks if task.id in asked])

    def _carry_over_jobs(self, cluster: Cluster) -> set[str]:
        """Take the job ids of an earlier launch; returns the tasks whose jobs are alive.

        Raises:
            UserError: jobs are alive of tasks that the experiment has no more, or while it is to run here.
        """
        jobs: dict[str, str] = {}
        if self.path.is_file():
            before = Manifest.read(self.path)
            if before.cluster == "slurm" and cluster.name == "local":
                self._require_ended(before)
            elif before.cluster == "slurm":  # the jobs of a local launch ended with its launcher
                jobs = self._jobs_of_unchanged_tasks(before)
                if before.submitting:  # a launcher that died while it submitted them
                    slurm.cancel_named(before.submitting)
        self.manifest = replace(self.manifest, jobs=jobs, cluster=cluster.name)
        done = done_tasks(self.manifest)
        unfinished = {task: job for task, job in jobs.items() if task not in done}
        states = slurm.job_states(sorted(set(unfinished.values()))) if unfinished else {}
        for task, job in unfinished.items():
            if job in states and states[job].state == "COMPLETED":
                look_for_new_files(self.manifest.folder(self.manifest.task(task)))
        return {task for task, job in unfinished.items() if job in states and states[job].state in ALIVE}

    def _require_ended(self, before: Manifest) -> None:
        """Raises UserError where Slurm has, or may have, jobs of an earlier launch that are to run here."""
        done = done_tasks(before)
        jobs = sorted({job for task, job in before.jobs.items() if task not in done})
        if not jobs and not before.submitting:
            return
        if not slurm.available():
            raise UserError(
                "jobs of this experiment were given to Slurm, which cannot be asked from here:"
                f" launch it there, or remove {self.path} if they have ended"
            )
        if any(state.state in ALIVE for state in slurm.job_states(jobs).values()) or before.submitting:
            raise UserError(
                "jobs of this experiment are on Slurm: use --cluster slurm, or end them with"
                f" `python -m pipeline.launch cancel {self.experiment.name}`"
            )

    def _jobs_of_unchanged_tasks(self, before: Manifest) -> dict[str, str]:
        """An earlier launch's job ids of tasks that are as they were; tables are made anew all the same.

        Raises:
            UserError: jobs of other tasks are alive.
        """
        was = {task.id: task.key for task in before.tasks}
        kept = {
            task.id: before.jobs[task.id]
            for task in self.manifest.tasks
            if task.id in before.jobs and was[task.id] == task.key
        }
        ours = set(kept.values())
        others = {
            before.jobs[task.id]: task.stage
            for task in before.tasks
            if task.id in before.jobs and before.jobs[task.id] not in ours
        }
        states = slurm.job_states(sorted(others)) if others else {}
        alive = [job for job in others if job in states and states[job].state in ALIVE]
        lost = [job for job in alive if others[job] != "aggregate"]
        if lost:
            raise UserError(
                f"{len(lost)} jobs are queued or running of tasks that this experiment had before it was"
                f" changed: `python -m pipeline.launch cancel {self.experiment.name}` ends them; or give the"
                " changed one another name"
            )
        if alive:
            slurm.cancel(alive)
        return kept

    def _overtaken(self, stages: Sequence[str], active: set[str]) -> tuple[set[str], list[str]]:
        """Tasks with live jobs that need one which is to run first: these wait for what will not come.

        Returns:
            The tasks whose jobs may stay, and the ids of the jobs that may not.
        """
        stay = set(active)
        while stay:
            coming = {task.id for task in pending_tasks(self.manifest, stages, stay)}
            late = {
                task.id
                for task in self.manifest.tasks
                if task.id in stay and task.stage in stages and not coming.isdisjoint(task.needs)
            }
            stay -= late
            if not late:
                break
        return stay, sorted({self.manifest.jobs[task] for task in active - stay})

    def _sharded(self, pending: Sequence[Task]) -> dict[str, Path]:
        """The folders of the data sets that need not be sharded, by task."""
        waiting = {task.id for task in pending}
        return {
            task.id: self.manifest.folder(task)
            for task in self.manifest.tasks
            if task.stage == "shard" and task.id not in waiting and self.manifest.receipt(task)
        }

    def _startable(self, pending: list[Task], active: set[str]) -> list[Task]:
        """Leave out, with a word, the tasks whose needs neither are done nor will be run.

        Raises:
            UserError: no task would be left.
        """
        coming = active | {task.id for task in pending}
        startable: list[Task] = []
        lacking: dict[str, list[str]] = {}
        for task in pending:
            missing = [
                need
                for need in task.needs
                if need not in coming and self.manifest.receipt(self.manifest.task(need)) is None
            ]
            if missing and task.stage != "aggregate":
                lacking[task.id] = missing
                coming.discard(task.id)
            else:
                startable.append(task)
        if lacking:
            said = view.left_out(lacking)
            if not startable and not active:
                raise UserError(f"nothing can be run: {said}; leave out --only, or add that stage to it")
            print(f"left out: {said}", file=sys.stderr)
        return startable

    def _run_here(self, pending: list[Task]) -> int:
        jobs = pack(pending)
        scheduler = slurm.LocalScheduler(self.folder / "logs")
        local = [
            slurm.LocalJob(
                name=job.name,
                call=TaskJob(self.path, job.tasks),
                request=request_of(job, gpu_there=bool(slurm.visible_gpus())),
                after_ok=() if job.any_outcome else job.after,
                after_any=job.after if job.any_outcome else (),
            )
            for job in jobs
        ]
        with live(self.manifest, jobs) as watcher:
            scheduler.run(local, on_event=watcher)
        return self._outcome(pending, watcher.failed)

    def _submit(
        self, pending: list[Task], active: set[str], profile: slurm.Profile | None, held: Lock
    ) -> None:
        """Submit what is pending; each array waits for those of its needs that have, or get, a live job."""
        assert profile is not None
        coming = active | {task.id for task in pending}
        to_submit = [(array, self._request(array[0], profile)) for array in arrays(pack(pending), active)]
        for array, request in to_submit:  # all of them can be asked for
            needed = [need for need in array[0].tasks[0].needs if need in coming]
            before = dict.fromkeys(self.manifest.jobs[need] for need in needed)
            if array[0].any_outcome:  # whole arrays: ten thousand ids do not fit on a command line
                before = dict.fromkeys(job.split("_")[0] for job in before)
            held.require()
            # A launcher that dies now leaves jobs whose ids nobody knows: the next finds them by their name.
            name = f"{self.experiment.name}-{array[0].stage}-{secrets.token_hex(3)}"
            self.manifest = replace(self.manifest, submitting=name)
            self.manifest.write(self.path)
            ids = slurm.submit_array(
                [TaskJob(self.path, job.tasks) for job in array],
                name=name,
                request=request,
                profile=profile,
                folder=self.folder / "logs",
                after_ok=() if array[0].any_outcome else list(before),
                after_any=list(before) if array[0].any_outcome else (),
            )
            try:
                held.require()
            except TakenOver:  # whoever holds the manifest now does not know of these
                slurm.cancel(ids)
                raise
            self._remember(array, ids)

    def _request(self, job: Job, profile: slurm.Profile) -> slurm.Request:
        """What a job asks Slurm for.

        Raises:
            slurm.SlurmError: it cannot be had here.
        """
        gpu_there = job.stage in GPU_STAGES and profile.has_gpus(job.stage)
        return profile.request(job.stage, request_of(job, gpu_there=gpu_there))

    def _remember(self, array: list[Job], ids: Sequence[str]) -> None:
        """Write down job ids at once: a launcher that dies now must not submit them again."""
        jobs = {task.id: job_id for job, job_id in zip(array, ids, strict=True) for task in job.tasks}
        self.manifest = replace(self.manifest.with_jobs(jobs), submitting="")
        self.manifest.write(self.path)
        view.print_array(array, ids)

    def _wait(self, asked: list[Task]) -> int:
        jobs = {task.id: self.manifest.jobs[task.id] for task in asked}
        ids = sorted(set(jobs.values()))
        ended = slurm.job_states(ids)
        while any(state.state in ALIVE for state in ended.values()):
            time.sleep(5)
            ended = slurm.job_states(ids)
        logs = self.folder / "logs"
        broken = {
            task: sorted(logs.glob(f"{job}_*_log.err"))
            for task, job in jobs.items()
            if ended[job].state not in ("COMPLETED", "CANCELLED")
        }
        return self._outcome(asked, broken)

    def _outcome(self, asked: Sequence[Task], broken: Mapping[str, Sequence[Path]]) -> int:
        """Say how what was asked for has ended; returns the exit code.

        A job publishes the tables that it makes; where it could not, this is tried once more.
        """
        failed: UserError | None = None
        try:
            self._bring_tables({task.stage for task in asked})
        except UserError as error:
            failed = error
        code = view.print_outcome(self.manifest, self.folder, asked, broken)
        if failed is not None:
            raise failed
        return code

    def _bring_tables(self, stages: Collection[str]) -> None:
        """Make sure that the tables that are made lie beside the manifest."""
        if "aggregate" in stages:
            bring_tables(self.manifest, self.folder)


def request_of(job: Job, *, gpu_there: bool) -> slurm.Request:
    """What a job asks its cluster for: one GPU a rank where its stage computes on one and is to."""
    resources = job.resources
    wanted = resources.device == "cuda" or (resources.device == "auto" and gpu_there)
    cuda = wanted and job.stage in GPU_STAGES
    return slurm.Request(
        nodes=resources.nodes,
        ranks_per_node=resources.ranks_per_node,
        cpus_per_rank=resources.cpus_per_rank,
        memory_gb=resources.memory_gb,
        minutes=resources.minutes,
        gpus_per_rank=1 if cuda else 0,
    )


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"?")  # an empty file fits on a full disk
        probe.unlink()
    except FileExistsError:
        raise UserError(f"{folder} is a file; expected a folder, or a name that is free") from None
    except OSError as error:
        raise UserError(f"{folder} is not writable: {error.strerror}") from None
