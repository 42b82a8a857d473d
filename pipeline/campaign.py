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
from pipeline.earlier_jobs import carry_over, without_overtaken
from pipeline.errors import UserError
from pipeline.experiment import Experiment
from pipeline.files import write_atomically
from pipeline.inventory import change_since_sharding, changed_tables
from pipeline.jobs import Job, TaskJob, arrays, pack
from pipeline.live import live
from pipeline.lock import Lock, TakenOver, lock
from pipeline.manifest import Task
from pipeline.preflight import preflight
from pipeline.preview import planned
from pipeline.printing import say
from pipeline.publication import bring_tables
from pipeline.running import LocalRun, LocalRuns
from pipeline.stages import GPU_STAGES
from pipeline.states import ALIVE, pending_tasks


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
            self.manifest, active = carry_over(self.manifest, self.path, cluster.name)
            active, overtaken = without_overtaken(self.manifest, stages, active)
            pending = self._startable(pending_tasks(self.manifest, stages, active), active)
            preflight(pending, sharded := self._sharded(pending))
            self._warn_of_changes(sharded)
            still = {task.id for task in pending_tasks(self.manifest, stages, active)}
            pending = [task for task in pending if task.id in still]  # another experiment shares the store
            if overtaken:
                slurm.cancel(overtaken, self.manifest.job_identities)
            self.manifest.write(self.path)
            if not pending and not active:
                self._bring_tables(stages)
                view.print_nothing_to_do(self.manifest, self.folder)
                return 0
            for task in pending:  # what an earlier attempt left must not be taken for this one's
                if path := self.manifest.damaged_receipt(task):
                    say(f"{path} is not as it was written: {task.id} runs again", stderr=True)
                for stale in ("error.json", "progress.json", "receipt.json"):
                    _remove(self.manifest.folder(task) / stale)
            if cluster.name == "local":
                return self._run_here(pending)
            self._submit(pending, active, cluster.profile, held)
        view.print_submitted(self.manifest, self.folder, len(pending), len(active), waiting=wait)
        if not wait:
            return 0
        asked = active | {task.id for task in pending}
        return self._wait([task for task in self.manifest.tasks if task.id in asked])

    def rehearse(self, stages: Sequence[str]) -> int:
        """Show what a launch would do, with the jobs as they would be asked for, and make all of its checks.

        Nothing is written, submitted or locked.

        Raises:
            UserError, slurm.SlurmError: all that a launch would refuse.
        """
        cluster = choose_cluster(self.where)
        view.print_cluster(cluster.name, cluster.profile, self.where)
        pending = pending_tasks(self.manifest, stages)
        jobs = pack(pending)
        view.print_plan(self.manifest, {task.id for task in pending}, jobs=len(jobs))
        asked: list[tuple[Sequence[Job], slurm.Request, str | None]] = []
        for array in arrays(jobs):
            if cluster.profile is None:
                request = request_of(array[0], gpu_there=bool(slurm.visible_gpus()))
                asked.append((array, request, None))
            else:
                request = self._request(array[0], cluster.profile)
                partition = cluster.profile.partition if request.partition is None else request.partition
                asked.append((array, request, partition or "the site's own"))
        view.print_jobs(asked)
        preflight(pending, self._sharded(pending))
        if pending:
            say("every check passed; nothing was written or submitted")
        return 0

    def _sharded(self, pending: Sequence[Task]) -> dict[str, Path]:
        """The folders of the data sets that need not be sharded, by task."""
        waiting = {task.id for task in pending}
        return {
            task.id: self.manifest.folder(task)
            for task in self.manifest.tasks
            if task.stage == "shard" and task.id not in waiting and self.manifest.receipt(task)
        }

    def _warn_of_changes(self, sharded: Mapping[str, Path]) -> None:
        """Say which data sets have changed since they were sharded, and which are sharded again for it."""
        here = (Path(self.manifest.store), self.folder.parent)
        for task in self.manifest.tasks:
            if task.stage != "shard":
                continue
            tables = changed_tables(task, self.path)
            if line := tables or change_since_sharding(task, sharded.get(task.id), but=here):
                say(f"warning: {line}", stderr=True)

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
        runs = LocalRuns(cpus=scheduler.cpus, gpus=len(scheduler.gpus))
        runs.jobs = [
            LocalRun(
                name=job.name,
                tasks=[task.id for task in job.tasks],
                after=list(job.after),
                cpus=asked.request.cpus,
                gpus=asked.request.gpus,
            )
            for job, asked in zip(jobs, local, strict=True)
        ]
        with live(self.manifest, jobs, runs, self.folder) as watcher:
            scheduler.run(local, on_event=watcher)
        return self._outcome(pending, watcher.failed)

    def _submit(
        self, pending: list[Task], active: set[str], profile: slurm.Profile | None, held: Lock
    ) -> None:
        """Submit what is pending; each array waits for those of its needs that have, or get, a live job."""
        assert profile is not None
        coming = active | {task.id for task in pending}
        to_submit = [(array, self._request(array[0], profile)) for array in arrays(pack(pending), active)]
        cluster_name = slurm.site_config().get("ClusterName", "")
        for array, request in to_submit:  # all of them can be asked for
            needed = [need for need in array[0].tasks[0].needs if need in coming]
            before = dict.fromkeys(self.manifest.jobs[need] for need in needed)
            if array[0].any_outcome:  # whole arrays: ten thousand ids do not fit on a command line
                before = dict.fromkeys(job.split("_")[0] for job in before)
            held.require()
            # A launcher that dies now leaves jobs whose ids nobody knows: the next finds them by their name.
            name = f"{self.experiment.name}-{array[0].stage}-{secrets.token_hex(6)}"
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
            self._remember(array, ids, slurm.Submission(name, os.getuid(), cluster_name))
        self._remember_times()

    def _request(self, job: Job, profile: slurm.Profile) -> slurm.Request:
        """What a job asks Slurm for.

        Raises:
            slurm.SlurmError: it cannot be had here.
        """
        gpu_there = job.computes_on_gpu and profile.has_gpus(job.stage)
        everywhere = profile.device == "cuda"
        return profile.request(job.stage, request_of(job, gpu_there=gpu_there, everywhere=everywhere))

    def _remember(self, array: list[Job], ids: Sequence[str], submission: slurm.Submission) -> None:
        """Write down job ids at once: a launcher that dies now must not submit them again."""
        jobs = {task.id: job_id for job, job_id in zip(array, ids, strict=True) for task in job.tasks}
        self.manifest = replace(self.manifest.with_jobs(jobs, submission), submitting="")
        self.manifest.write(self.path)
        view.print_array(array, ids)

    def _remember_times(self) -> None:
        """Write down when Slurm says that the jobs were submitted, by one question for all of them."""
        submissions = dict(self.manifest.submissions)
        untold = [number for number, said in submissions.items() if not said.submitted]
        try:
            times = slurm.submit_times(untold, submissions)
        except slurm.SlurmError:  # their names alone tell them from others
            return
        for number, submitted in times.items():
            submissions[number] = replace(submissions[number], submitted=submitted)
        self.manifest = replace(self.manifest, submissions=submissions)
        self.manifest.write(self.path)

    def _wait(self, asked: list[Task]) -> int:
        jobs = {task.id: self.manifest.jobs[task.id] for task in asked}
        ids = sorted(set(jobs.values()))
        ended = slurm.job_states(ids, self.manifest.job_identities)
        while any(state.state in ALIVE for state in ended.values()):
            time.sleep(5)
            ended = slurm.job_states(ids, self.manifest.job_identities)
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


def request_of(job: Job, *, gpu_there: bool, everywhere: bool = False) -> slurm.Request:
    """What a job asks its cluster for: one GPU a rank where its tasks compute on one, or are told to.

    Args:
        gpu_there: whether there are GPUs for tasks whose device is ``auto``.
        everywhere: a GPU for pretrainings without steps too, which compute on none: a profile says
            ``device: cuda``, since partitions of GPUs may take no job without one.
    """
    resources = job.resources
    wanted = resources.device == "auto" and gpu_there
    asked_for = resources.device == "cuda" or (everywhere and resources.device == "auto")
    cuda = job.stage in GPU_STAGES and (asked_for or (wanted and job.computes_on_gpu))
    return slurm.Request(
        nodes=resources.nodes,
        ranks_per_node=resources.ranks_per_node,
        cpus_per_rank=resources.cpus_per_rank,
        memory_gb=resources.memory_gb,
        minutes=resources.minutes,
        gpus_per_rank=1 if cuda else 0,
    )


def _remove(path: Path) -> None:
    """Remove a file, or a link or pipe in its place.

    Raises:
        UserError: it is a folder.
    """
    try:
        path.unlink(missing_ok=True)
    except NotADirectoryError:  # below a file in the place of the task's folder: the job says so
        return
    except OSError:
        if not path.is_dir():
            raise
        raise UserError(f"{path} is a folder; expected a file: remove it") from None


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        write_atomically(probe, b"?", sync=False)  # an empty file fits on a full disk
        probe.unlink()
    except FileExistsError:
        raise UserError(f"{folder} is a file; expected a folder, or a name that is free") from None
    except OSError as error:
        raise UserError(f"{folder} is not writable: {error.strerror}") from None
