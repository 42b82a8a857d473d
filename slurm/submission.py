"""Submitting calls as Slurm jobs, through submitit."""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slurm.commands import ask, one_line, require_slurm, site_config
from slurm.errors import SlurmError
from slurm.gpus import gpu_options
from slurm.job import HOLD_SIGNALS, MARKER, Call
from slurm.profiles import Profile
from slurm.resources import Request

# Submitit counts time-outs (and, with limits under ten minutes, preemptions) and gives up after so many.
MAX_TIMEOUTS = 1000
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def submit_array(
    calls: Sequence[Callable[[], Any]],
    *,
    name: str,
    request: Request,
    profile: Profile,
    folder: str | Path,
    after_ok: Sequence[str] = (),
    after_any: Sequence[str] = (),
) -> list[str]:
    """Submit calls that ask for the same, as one array or, beyond the site's MaxArraySize, as several.

    A job whose ``after_ok`` parent fails is cancelled by Slurm, and not left in the queue.

    Args:
        calls: one job each; picklable. Each runs on every rank of its job.
        name: the jobs' name in the queue.
        request: what each job asks for.
        profile: how this site wants it asked.
        folder: for pickles and logs; shared by all nodes. Made private: who writes there decides what runs.
        after_ok: ids of jobs that must succeed first: ``123``, ``123_4``, or an array as a whole.
        after_any: ids of jobs that must have ended first, however they ended.

    Returns:
        A job id for each call, in order: ``123_4``, or ``123`` for a job on its own.

    Raises:
        SlurmError: no Slurm here, a folder of somebody else's, or Slurm refuses the jobs; then none is left.
    """
    if not calls:
        return []
    require_slurm()
    folder = private_folder(folder)
    size = profile.max_array_size or max_array_size()
    chunks = [calls[start : start + size] for start in range(0, len(calls), size)]
    ids: list[str] = []
    with _outside_any_job():
        for number, chunk in enumerate(chunks):
            at_once = _share(profile.array_limit or len(calls), len(chunks), number)
            dependency = _dependency(after_ok, after_any)
            try:
                ids += _submit(chunk, name, request, profile, folder, dependency, at_once)
            except SlurmError:
                if ids:
                    ask(["scancel", *dict.fromkeys(job.split("_")[0] for job in ids)])
                raise
    return ids


def _submit(
    calls: Sequence[Callable[[], Any]],
    name: str,
    request: Request,
    profile: Profile,
    folder: Path,
    dependency: str | None,
    at_once: int,
) -> list[str]:
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(folder, max_num_timeout=MAX_TIMEOUTS, python=python_command(profile))
    executor.update_parameters(**parameters(name, request, profile, folder, dependency, at_once))
    try:
        jobs = executor.submit_array([Call(call) for call in calls])
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"Slurm refuses the jobs '{name}': {one_line(str(error))}") from None
    except OSError as error:
        raise SlurmError(f"{folder}: {error.strerror or error}") from None
    return [job.job_id for job in jobs]


def parameters(
    name: str,
    request: Request,
    profile: Profile,
    folder: Path,
    dependency: str | None,
    at_once: int,
) -> dict[str, Any]:
    """The parameters of submitit's Slurm executor; what is None is left to the site."""
    return {
        "job_name": name,
        "partition": (profile.partition if request.partition is None else request.partition) or None,
        "account": profile.account,
        "qos": (profile.qos if request.qos is None else request.qos) or None,
        "constraint": (profile.constraint if request.constraint is None else request.constraint) or None,
        "exclude": profile.exclude,
        "time": request.minutes,
        "nodes": request.nodes,
        "ntasks_per_node": request.ranks_per_node,
        "cpus_per_task": request.cpus_per_rank,
        "mem": None if request.memory_gb is None else f"{round(request.memory_gb * 1024)}M",
        "dependency": dependency,
        "array_parallelism": at_once,
        # Slurm would send it at once to a job that is given less time than this.
        "signal_delay_s": min(profile.signal_seconds, request.minutes * 60 // 4),
        "setup": setup_lines(request, profile, folder),
        # Since Slurm 22.05 srun does not take over sbatch's CPUs per task. A failed rank ends its job: the
        # others would wait for it in a collective until their own time-out.
        "srun_args": [f"--cpus-per-task={request.cpus_per_rank}", "--kill-on-bad-exit=1"],
        "wckey": None,  # submitit's own default is refused by some sites
        "additional_parameters": {
            "kill-on-invalid-dep": "yes",
            "requeue" if profile.requeue else "no-requeue": True,
            **gpu_options(request, profile),
        },
    }


def setup_lines(request: Request, profile: Profile, folder: Path) -> list[str]:
    """What the batch script does before ``srun``.

    Nothing may follow ``srun``: its exit code is the job's, and ``afterok`` goes by it. So what has to be
    done at the end hangs on a trap, which keeps the exit code.
    """
    marker = f"{shlex.quote(str(folder / MARKER))}$job"
    environment = {"OMP_NUM_THREADS": str(request.cpus_per_rank), **profile.environment}
    return [
        "set -eo pipefail",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        f"rm -f {marker}",
        f"trap 'if [ -e {_in_single_quotes(marker)} ]; then scontrol requeue \"$job\"; fi' EXIT",
        *profile.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
    ]


def _in_single_quotes(text: str) -> str:
    return text.replace("'", "'\"'\"'")


def python_command(profile: Profile) -> str:
    """The shell command that starts Python in a job: the profile's, in its container if it names one."""
    # In a container this machine's own interpreter is, as a rule, not to be found.
    python = shlex.quote(profile.python or ("python3" if profile.container else sys.executable))
    python = f"{python} -c {shlex.quote(HOLD_SIGNALS)}"
    return f"{profile.container} {python}" if profile.container else python


def private_folder(folder: str | Path, *, runs_code: bool = True) -> Path:
    """Make a folder that this user alone can enter, at a place that no stranger can give to another folder.

    Whoever owns a folder above it, or is in a group that may write there, is trusted.

    Args:
        folder: where.
        runs_code: whether what lies there is run, as pickled calls are; else its place may be anywhere.

    Raises:
        SlurmError: it belongs to somebody else, is a link, held files while others could write to it, lies
            where anybody can replace it, cannot be made, or has characters that Slurm would misread.
    """
    folder = Path(folder).absolute()
    if "%" in str(folder):
        raise SlurmError(
            f"{folder}: Slurm replaces '%' in the names of log files; choose a folder without it"
        )
    if "\\" in str(folder) or not str(folder).isprintable():
        raise SlurmError(
            f"{str(folder)!r}: Slurm misreads backslashes and control characters in the names of log files;"
            " choose a folder without them"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if runs_code:
            _require_safe_way(folder)
        # What is looked at and changed is what was opened, whatever the name stands for a moment later.
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _make_private(folder, opened)
        finally:
            os.close(opened)
    except OSError as error:
        if folder.is_symlink():
            raise SlurmError(
                f"{folder} is a link; jobs run what lies there, so it must be a folder"
            ) from None
        raise SlurmError(f"{folder}: {error.strerror}") from None
    return folder


def _make_private(folder: Path, opened: int) -> None:
    found = os.fstat(opened)
    if found.st_uid != os.getuid():
        raise SlurmError(f"{folder} belongs to another user; jobs run what lies there, so it must be yours")
    if stat.S_IMODE(found.st_mode) != 0o700:
        os.fchmod(opened, 0o700)
    if found.st_mode & WRITABLE_BY_OTHERS and os.listdir(opened):
        raise SlurmError(
            f"{folder} could be written to by others until now, and jobs run what lies there: look at its"
            " files, then remove them, or start the command again if they are yours"
        )
    if os.fstat(opened).st_mode & WRITABLE_BY_OTHERS:
        raise SlurmError(
            f"{folder} can be written to by others, and its file system does not let that change"
        )


def _require_safe_way(folder: Path) -> None:
    """Refuse a place where anybody can put another folder under the same name: pickles in it would be run."""
    trusted = (0, os.getuid())
    for way in dict.fromkeys((folder, folder.resolve())):
        for name, above in zip((way, *way.parents), way.parents):
            found = above.stat()
            if not found.st_mode & stat.S_IWOTH:
                continue
            # With the sticky bit only the owners of a folder and of what is in it can rename the latter.
            if not (
                found.st_mode & stat.S_ISVTX and found.st_uid in trusted and name.lstat().st_uid in trusted
            ):
                raise SlurmError(
                    f"{folder}: in {above} any user can replace it, and jobs run what lies there: take that"
                    f" right from others (chmod o-w {shlex.quote(str(above))}), or choose another place"
                )


def max_array_size() -> int:
    """The most elements an array may have here (its greatest index is one less)."""
    return max(1, int(site_config().get("MaxArraySize", "1")))


def _dependency(after_ok: Sequence[str], after_any: Sequence[str]) -> str | None:
    kinds = (("afterok", after_ok), ("afterany", after_any))
    return ",".join(":".join([kind, *dict.fromkeys(ids)]) for kind, ids in kinds if ids) or None


def _share(limit: int, arrays: int, number: int) -> int:
    """How many elements of the ``number``-th of several arrays may run at once under one limit for all."""
    return max(1, limit // arrays + (number < limit % arrays))


@contextlib.contextmanager
def _outside_any_job() -> Iterator[None]:
    """Hide the surrounding job from the jobs that are submitted from within it.

    Otherwise they take over, among others, its CPU binding, and run at a third of their speed.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    from submitit.helpers import clean_env

    # Where the configuration is, and the user's own defaults for sbatch, hold inside a job as well.
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name.startswith("SBATCH_") and "_BIND" not in name)
    }
    with clean_env():
        os.environ.update(kept)
        yield
