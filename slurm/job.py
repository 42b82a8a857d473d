"""The job's side: what runs around a call on each rank, how it notices a signal, how it is queued again.

Before a time limit Slurm sends SIGUSR2 to every rank (``signal_seconds`` ahead), at a preemption SIGTERM.
Submitit answers SIGUSR2 from within the signal handler, wherever the training just is, and does nothing about
SIGTERM. A training run does better: it installs a :class:`StopFlag`, which replaces submitit's handlers and
only remembers the signal; looks at it at a step boundary, where all ranks agree to stop; writes its
checkpoint; and calls :func:`requeue` on every rank. The job then starts again with the same id, and the call
goes on from its checkpoint. A signal that comes while Python is still importing would end it: so the job's
Python is started with both signals held back, until there is a handler for them. Once the work is done, both
are ignored.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from slurm.commands import ask
from slurm.errors import SlurmError

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
# A program for `python -c`: becomes Python with its further arguments, with the signals held back.
HOLD_SIGNALS = (
    "import os, signal, sys;"
    " signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM]);"
    " os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
LOCAL_LOGS = "CASS_LOCAL_LOGS"  # environment variable: where the ranks' logs of a job on this machine lie
MARKER = ".requeue-"  # followed by the job's id: a file that asks the batch script to queue the job again
WAIT_S = 60.0  # for Slurm to end this process after a requeue


class StopFlag:
    """Turns SIGUSR2 and SIGTERM into a question: ``if stop(): …``.

    Attributes:
        number: the first of these signals that came, None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def install(self) -> StopFlag:
        """Replace the handlers of both signals, submitit's among them. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        release_signals()
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    def __call__(self) -> bool:
        return self.number is not None


def release_signals() -> None:
    """Let the signals in that the job's Python was started without; those that came meanwhile come now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _ignore_signals() -> None:
    """For what is left to do once the work is done.

    Python takes its handlers away before it ends: a warning of the time limit that comes then would end it
    by a signal, and Slurm would call the job failed.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def job_id() -> str:
    """This job's id as scontrol and sacct know it: ``123``, or ``123_4`` for an array's element.

    Raises:
        SlurmError: this is no Slurm job.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise SlurmError("this process is not part of a Slurm job: SLURM_JOB_ID is not set")
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def log_of_this_job() -> str | None:
    """The file that this rank's errors go to; None if submitit has not started it."""
    import submitit

    try:
        path: Path = submitit.JobEnvironment().paths.stderr
    except RuntimeError:
        return None
    logs = os.environ.get(LOCAL_LOGS)
    return str(Path(logs) / path.name if logs else path)


def requeue() -> None:
    """Put this job (of an array: this element alone) back into the queue, and wait for Slurm to end it.

    A job that is being cancelled is left to its end. Call this on every rank. Rank 0 asks Slurm; the others
    must not end before it has, since a rank that ends with an error takes its job along. In a container
    without ``scontrol`` the batch script asks in its place.

    Raises:
        SlurmError: this is no Slurm job, or Slurm refuses (the site or the profile allows no requeue).
    """
    this = job_id()
    if int(os.environ.get("SLURM_PROCID", "0")) == 0:
        if shutil.which("scontrol") is None:
            (Path(os.environ["SUBMITIT_FOLDER"]) / f"{MARKER}{this}").touch()
            return  # rank 0 ends, its step ends with it, and the batch script goes on
        if _runs(this):  # else it is being cancelled (or queued again) already
            ask(["scontrol", "requeue", this])
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # with a StopFlag left in place, Slurm would have to kill it
    time.sleep(WAIT_S)


def _runs(job: str) -> bool:
    """Whether Slurm still means a job to run: one that was cancelled gets a SIGTERM as well."""
    said = ask(["scontrol", "--oneliner", "show", "job", job]).split()
    return "JobState=RUNNING" in said


class Call:
    """What submitit pickles and runs: the call, after clearing away what an interrupted start left behind.

    A call with a true ``installs_stop_flag`` begins with installing a :class:`StopFlag`; signals wait for it.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def __call__(self) -> Any:
        import submitit

        if not getattr(self.call, "installs_stop_flag", False):
            release_signals()

        # A temporary file of a start that was killed while writing makes submitit refuse to write ever after.
        paths = submitit.JobEnvironment().paths
        stale = [paths.result_pickle] + [paths.submitted_pickle] * (paths.task_id == 0)
        for path in stale:
            path.with_suffix(path.suffix + ".save_tmp").unlink(missing_ok=True)
        result = self.call()
        _ignore_signals()
        return result

    def checkpoint(self) -> Any:
        """Submitit calls this (only a method of this name) on SIGUSR2 if the call installed no StopFlag.

        Returns:
            What to run after the requeue: the same call.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
