"""Jobs on one machine: in dependency order, as many at once as it holds, by submitit's local executor."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slurm.errors import SlurmError
from slurm.job import LOCAL_LOGS, Call
from slurm.resources import Request
from slurm.submission import private_folder

if TYPE_CHECKING:
    from submitit import LocalExecutor

POLL_S = 0.1
GOODBYE_S = 10.0  # controllers end their ranks within seconds; what is left then is killed


@dataclass(frozen=True)
class LocalJob:
    """A call with what it asks for and the names of the jobs it waits for.

    Attributes:
        name: unique among the jobs of one run.
        call: picklable; runs on every rank.
        after_ok: jobs that must succeed first; if one fails, this one is cancelled.
        after_any: jobs that must have ended first, however they ended.
    """

    name: str
    call: Callable[[], Any]
    request: Request = field(default_factory=Request)
    after_ok: tuple[str, ...] = ()
    after_any: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobEvent:
    """What happened to a job.

    Attributes:
        kind: started | finished | failed | cancelled (a job it needs failed, so it was never started).
        name: the job's name.
        job_id: its id in the names of its log files; empty if cancelled.
        logs: the files with each rank's errors (``…_log.err``; beside each lies ``…_log.out``).
        exit_status: 0 if all ranks succeeded; None before the end.
    """

    kind: Literal["started", "finished", "failed", "cancelled"]
    name: str
    job_id: str = ""
    logs: tuple[Path, ...] = ()
    exit_status: int | None = None


@dataclass
class _Running:
    job: LocalJob
    job_id: str
    process: subprocess.Popen[bytes]
    logs: tuple[Path, ...]
    cpus: int
    gpus: tuple[str, ...]


class _OnGpus:
    """A call that sees only the GPUs given to its job. (Submitit's own way takes numbers, but no UUIDs.)"""

    def __init__(self, call: Callable[[], Any], gpus: Sequence[str]) -> None:
        self.call, self.gpus = call, tuple(gpus)

    def __call__(self) -> Any:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        return self.call()


class LocalScheduler:
    """Runs jobs on this machine, without time limits: a laptop takes longer than a queue's limits say.

    Pickled calls lie in a folder of their own under the system's temporary one, for this user alone.

    Args:
        folder: for logs.
        cpus: how many CPUs jobs may use at once; default: all that this process may use.
        gpus: likewise GPUs; default: those in CUDA_VISIBLE_DEVICES, else those that nvidia-smi lists.
    """

    def __init__(self, folder: str | Path, *, cpus: int | None = None, gpus: int | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.cpus = cpus or _usable_cpus()
        self.gpus = visible_gpus() if gpus is None else tuple(str(number) for number in range(gpus))
        self._numbers = itertools.count(1)
        self._prefix = f"{time.strftime('%y%m%d-%H%M%S')}-{os.getpid()}"

    def run(
        self, jobs: Sequence[LocalJob], on_event: Callable[[JobEvent], None] = lambda event: None
    ) -> bool:
        """Run jobs until each has ended or was cancelled.

        Jobs start in the given order as soon as what they wait for has ended and the machine has room; one
        that is larger than the machine runs alone. On any exception (KeyboardInterrupt too) the processes of
        the running jobs are ended before it goes on. Of a launcher that was killed, the jobs in this folder
        get ``GOODBYE_S`` to end before the first one starts.

        Args:
            on_event: called with each event, at once.

        Returns:
            Whether all jobs succeeded.

        Raises:
            SlurmError: a name twice, a dependency that is none of the jobs or a circle of them, more GPUs
                than there are, a folder that cannot be used, or processes of an earlier launch in it.
        """
        self._check(jobs)
        private_folder(self.folder, runs_code=False)
        with _alone(self.folder / "jobs.lock") as held, tempfile.TemporaryDirectory(prefix="cass-") as calls:
            self._calls = private_folder(calls)
            return self._run(jobs, on_event, held)

    def _run(self, jobs: Sequence[LocalJob], on_event: Callable[[JobEvent], None], held: int) -> bool:
        waiting = {job.name: job for job in jobs}
        running: dict[str, _Running] = {}
        succeeded: dict[str, bool] = {}
        try:
            while waiting or running:
                for name, run in list(running.items()):
                    status = run.process.poll()
                    if status is not None:
                        if status < 0:  # killed: it could not end its ranks, which are in its group
                            with contextlib.suppress(ProcessLookupError, PermissionError):
                                os.killpg(run.process.pid, signal.SIGKILL)
                        del running[name]
                        succeeded[name] = status == 0
                        kind: Literal["finished", "failed"] = "finished" if status == 0 else "failed"
                        on_event(JobEvent(kind, name, run.job_id, run.logs, status))
                # In the given order; a parent comes before its children or is met again a moment later.
                for name, job in list(waiting.items()):
                    if any(succeeded.get(parent) is False for parent in job.after_ok):
                        del waiting[name]
                        succeeded[name] = False
                        on_event(JobEvent("cancelled", name))
                    elif all(parent in succeeded for parent in (*job.after_ok, *job.after_any)):
                        if not self._has_room(job, running):
                            break  # nothing overtakes a large job, or it would wait for ever
                        del waiting[name]
                        running[name] = started = self._start(job, running, held)
                        on_event(JobEvent("started", name, started.job_id, started.logs))
                if running:
                    time.sleep(POLL_S)
        finally:
            _end(running.values())
        return all(succeeded.values())

    def _check(self, jobs: Sequence[LocalJob]) -> None:
        known: set[str] = set()
        for job in jobs:
            if job.name in known:
                raise SlurmError(f"two jobs are named {job.name!r}")
            known.add(job.name)
            if job.request.gpus > len(self.gpus):
                raise SlurmError(
                    f"{job.name} asks for {job.request.gpus} GPUs; this machine has {len(self.gpus)}"
                )
            if job.request.gpus > 1 and any(gpu.startswith("MIG-") for gpu in self.gpus):
                raise SlurmError(
                    f"{job.name} asks for {job.request.gpus} GPUs, and this machine's are slices (MIG), which"
                    " serve one rank each and cannot be joined: set ranks_per_node to 1"
                )
        ended: set[str] = set()
        left = list(jobs)
        while left:
            ready = [job for job in left if ended.issuperset((*job.after_ok, *job.after_any))]
            if not ready:
                job = left[0]
                lacking = [name for name in (*job.after_ok, *job.after_any) if name not in ended]
                why = (
                    "which waits for it in turn" if known.issuperset(lacking) else "which is none of the jobs"
                )
                raise SlurmError(f"{job.name} waits for {lacking[0]!r}, {why}")
            ended.update(job.name for job in ready)
            left = [job for job in left if job.name not in ended]

    def _has_room(self, job: LocalJob, running: dict[str, _Running]) -> bool:
        cpus_free = self.cpus - sum(run.cpus for run in running.values())
        gpus_free = len(self.gpus) - sum(len(run.gpus) for run in running.values())
        return not running or (job.request.cpus <= cpus_free and job.request.gpus <= gpus_free)

    def _start(self, job: LocalJob, running: dict[str, _Running], held: int) -> _Running:
        taken = {gpu for run in running.values() for gpu in run.gpus}
        gpus = tuple(gpu for gpu in self.gpus if gpu not in taken)[: job.request.gpus]
        job_id = f"{self._prefix}-{next(self._numbers)}"
        environment = {**_environment_of_no_job(), "OMP_NUM_THREADS": str(job.request.cpus_per_rank)}
        executor = _executor(self._calls, self.folder, job_id, environment, held)
        executor.update_parameters(tasks_per_node=job.request.ranks)
        call = Call(_OnGpus(job.call, gpus) if gpus else job.call)
        started = executor.submit(call)
        process: subprocess.Popen[bytes] = started._process  # type: ignore[attr-defined]
        logs = tuple(self.folder / started.task(rank).paths.stderr.name for rank in range(job.request.ranks))
        return _Running(job, job_id, process, logs, job.request.cpus, gpus)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[int]:
    """Hold a file as long as this process, or a controller that it started, lives; yields its descriptor.

    The kernel lets it go when the last of those has ended, however it did: so a launch after one that was
    killed waits here while that one's controllers still end their ranks. On a file system without locks
    nobody waits.

    Raises:
        SlurmError: it is held for more than ``GOODBYE_S``, or cannot be made.
    """
    deadline = time.monotonic() + GOODBYE_S
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SlurmError(f"cannot write {path}: {error.strerror}") from None
    try:
        with contextlib.suppress(OSError):
            while not _taken(descriptor):
                if time.monotonic() > deadline:
                    raise SlurmError(
                        f"processes of an earlier launch still run and hold {path}: end them (`ps` shows"
                        " slurm.local_controller and this folder), or remove it if there are none"
                    )
                time.sleep(POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int) -> bool:
    """Lock an open file unless somebody else has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _executor(folder: Path, logs: Path, job_id: str, environment: dict[str, str], held: int) -> LocalExecutor:
    """Submitit's local executor with our own controller around the ranks; it inherits the open file ``held``.

    Its calls lie in ``folder``, and what they print goes to ``logs``.

    Submitit's own names jobs by process ids (which come again, so that new logs are appended to old ones),
    reports success whatever the ranks did, waits for the other ranks of a failed one, shares the terminal's
    Ctrl-C and its traceback with the launcher, and lives on when the launcher is killed.
    """
    from submitit import LocalExecutor
    from submitit.local.local import LocalJob as SubmititJob

    class Executor(LocalExecutor):
        def _submit_command(self, command: str) -> SubmititJob[Any]:
            ranks = self.parameters["tasks_per_node"]
            controller = [sys.executable, "-m", "slurm.local_controller", str(folder), str(logs), job_id]
            with open(logs / f"{job_id}_controller.log", "w", encoding="utf-8") as log:
                process = subprocess.Popen(
                    [*controller, str(os.getpid())],
                    env={
                        **environment,
                        LOCAL_LOGS: str(logs),
                        "SUBMITIT_EXECUTOR": "local",
                        "SUBMITIT_LOCAL_COMMAND": command,
                        "SUBMITIT_LOCAL_NTASKS": str(ranks),
                        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
                        "SUBMITIT_LOCAL_NODEID": "0",
                        "SUBMITIT_LOCAL_TIMEOUT_S": "0",
                        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
                        "SUBMITIT_LOCAL_WITH_SHELL": "",
                        "SUBMITIT_STDERR_TO_STDOUT": "",
                        "CUDA_VISIBLE_DEVICES": "",
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(held,),
                )
            return SubmititJob(folder=folder, job_id=job_id, process=process, tasks=list(range(ranks)))

    return Executor(folder)


def _end(running: Collection[_Running]) -> None:
    """End the processes of running jobs: controllers give their ranks a moment to write a checkpoint."""
    for run in running:
        with contextlib.suppress(ProcessLookupError):
            run.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GOODBYE_S
    for run in running:
        try:
            run.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def _environment_of_no_job() -> dict[str, str]:
    """This environment without what a surrounding Slurm job, torchrun or submitit says about ranks."""
    ranks = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    hidden = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "TORCHELASTIC_")
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ranks and (name == "SLURM_CONF" or not name.startswith(hidden))
    }


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return tuple(gpu.strip() for gpu in said.split(",") if gpu.strip() and gpu.strip() != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    gpus: list[tuple[str, list[str]]] = []  # each with its slices, if it is cut into some
    for line in listed.splitlines():
        uuid = re.search(r"\(UUID: ([^)]+)\)", line)
        if line.startswith("GPU "):
            gpus.append((uuid[1] if uuid else str(len(gpus)), []))
        elif line.strip().startswith("MIG ") and uuid and gpus:
            gpus[-1][1].append(uuid[1])
    if not any(slices for _, slices in gpus):
        return tuple(str(number) for number in range(len(gpus)))
    return tuple(name for gpu, slices in gpus for name in slices or [gpu])
