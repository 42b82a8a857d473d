"""Run one task on this rank: check what it needs, call its stage, leave a receipt or an error.

Every job ends here, and so does ``python -m pipeline.stages.STAGE`` (``command.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import shards
import slurm
from pipeline.errors import UserError, one_line, redacted_traceback, storage_error
from pipeline.files import look_for_new_files, make_folder_below, odd_entries
from pipeline.garbage import no_garbage_collection
from pipeline.installed import check_torch
from pipeline.lock import Held, Lock, TakenOver, lock
from pipeline.manifest import (
    Manifest,
    Receipt,
    Task,
    damaged_files,
    describe_files,
    now,
    read_error,
    write_json,
)
from pipeline.publication import publish
from pipeline.ranks import Ranks, host, rank_environment
from pipeline.specs import Resources
from pipeline.stages import TRAINING_STAGES
from pipeline.stages.work import Done, Entry, Interrupted, Outcome, Work
from pipeline.states import inputs_of, is_done

RANK_LOST = 76  # exit code: another rank was not heard from any more
POLL_S = 0.5
ENDING_S = 60.0  # for a process that was told to end
REQUIRE_S = 5.0


def user_errors() -> tuple[type[Exception], ...]:
    """Every exception that is shown as one line and exit code 2."""
    return UserError, shards.InputError, slurm.SlurmError


def run_task(
    manifest_path: Path,
    task_id: str,
    *,
    key: str | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    no_more_time: Callable[[], bool] = lambda: False,
    log: str | None = None,
    patience_s: float = 0,
    profile_steps: int | None = None,
) -> bool:
    """Run a task of a manifest unless it is done. (An aggregation is never done: it reads what is there now.)

    Args:
        manifest_path: the manifest.
        task_id: which of its tasks.
        key: that the task must have; None: whichever it has.
        stop_requested: asked at step boundaries; true makes the stage stop after a checkpoint.
        no_more_time: asked of a task that was stopped and keeps no checkpoint: whether it had all the time
            that a job gets. To start it again would not help.
        log: the file that this process's errors go to, for ``error.json``.
        patience_s: how long to wait for the receipts of the tasks it needs, which a shared file system may
            show later than Slurm starts this job.
        profile_steps: of a training, in place of what its resources say.

    Raises:
        UserError: a task it needs is not done, another process runs this one, or the input is wrong.
        Interrupted: it stopped because it was asked to.
        Exception: whatever the stage raised; ``error.json`` in its folder says so too.
    """
    manifest = Manifest.read(manifest_path)
    task = manifest.task(task_id)
    if key not in (None, task.key):
        raise UserError(f"{task.id} is not what this job was submitted for: the experiment was changed since")
    ranks = rank_environment()
    if task.stage != "aggregate" and _is_done(manifest, task):
        print(f"{task.id}: done before", flush=True)
        return False
    folder = manifest.folder(task)
    with _alone(manifest, task, ranks) as require:
        if ranks.rank == 0 and task.stage != "aggregate" and _is_done(manifest, task):
            if ranks.world_size > 1:  # the others wait for this rank to meet them
                raise UserError(f"{task.id} has been done by another process meanwhile")
            print(f"{task.id}: done by another process meanwhile", flush=True)
            return False
        print(f"{task.id}: rank {ranks.rank} of {ranks.world_size} on {host()}", flush=True)
        started, clock = now(), time.monotonic()

        def rank_lost(text: str) -> None:
            """The main thread may be waiting for that rank in a collective, for half an hour: end it all."""
            _leave_error(folder, UserError(text), ranks, log)
            print(f"error: {task.id}: {text}", file=sys.stderr, flush=True)
            os._exit(RANK_LOST)

        try:
            work = Work(
                task=task,
                folder=folder,
                inputs=_inputs(manifest, task, ranks, patience_s),
                everything=_everything(manifest, task, look_twice=patience_s > 0),
                resources=Resources.model_validate(
                    task.resources | ({} if profile_steps is None else {"profile_steps": profile_steps})
                ),
                ranks=ranks,
                stop_requested=lambda: require() or stop_requested(),
                rank_lost=rank_lost,
            )
            work.progress(0, 1)  # `status` sees that it is here
            if task.stage in (*TRAINING_STAGES, "finetune"):
                check_torch()
            stage = importlib.import_module(f"pipeline.stages.{task.stage}")
            outcome: Outcome = stage.run(work)
            seconds = time.monotonic() - clock
            if ranks.rank == 0:
                require(at_once=True)
                receipt = _leave_receipt(work, outcome, started, seconds)
                if task.stage == "aggregate":
                    publish(folder, receipt, manifest_path.parent / "tables")
                print(f"{task.id}: done in {seconds:.1f} s", flush=True)
            return True
        except TakenOver:
            raise
        except Interrupted:
            if task.stage in TRAINING_STAGES or not no_more_time():
                raise
            late = UserError(
                f"{task.id} does not fit into the {work.resources.minutes} minutes of its job:"
                f" resources.{task.stage}.minutes must be more"
            )
            _leave_error(folder, late, ranks, log)
            raise late from None
        except Exception as error:
            shown = storage_error(error, folder) or error
            _leave_error(folder, shown, ranks, log)
            if shown is not error:
                raise shown from error
            raise


class _Require:
    """Makes sure now and then that this process still holds its task's folder; ranks other than 0 hold none.

    Raises:
        TakenOver: it stood still for so long that another process runs the task now.
    """

    def __init__(self, held: Lock | None) -> None:
        self.held, self.at = held, time.monotonic()

    def __call__(self, *, at_once: bool = False) -> bool:
        if self.held is not None and (at_once or time.monotonic() - self.at > REQUIRE_S):
            self.held.require()
            self.at = time.monotonic()
        return False


@contextlib.contextmanager
def _alone(manifest: Manifest, task: Task, ranks: Ranks) -> Iterator[_Require]:
    """Make a task's folder and hold it on rank 0: two processes that write one log would spoil it.

    Links, pipes and devices that somebody has put into the folder are removed: what is written there must not
    go elsewhere.

    Raises:
        Held: another process runs the task, and goes on doing so.
        UserError: the store is not writable, or leads elsewhere.
    """
    folder = manifest.folder(task)
    with contextlib.ExitStack() as stack:
        held = None
        try:
            make_folder_below(Path(manifest.store), task.folder)
            if ranks.rank == 0:
                held = _hold(stack, folder / ".lock", task.id)
                for odd in odd_entries(folder):
                    print(f"{odd} is no file: removed", file=sys.stderr, flush=True)
                    odd.unlink()
                (folder / "error.json").unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"the store is not writable: {folder}: {error.strerror}") from None
        yield _Require(held)


def _hold(stack: contextlib.ExitStack, path: Path, name: str) -> Lock:
    """Hold a lock until the stack ends; a holder that is about to end is waited for."""
    deadline = time.monotonic() + ENDING_S
    while True:
        try:
            return stack.enter_context(lock(path, what=name))
        except Held:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _leave_receipt(work: Work, outcome: Outcome, started: str, seconds: float) -> Receipt:
    (work.folder / "progress.json").unlink(missing_ok=True)
    task = work.task
    receipt = Receipt(
        key=task.key,
        task=task.id,
        stage=task.stage,
        metrics=outcome.metrics,
        files=describe_files(work.folder, without=(*outcome.discard, *outcome.spare)),
        started=started,
        ended=now(),
        seconds=round(seconds, 3),
        hosts=_hosts(work.ranks),
        world_size=work.ranks.world_size if task.stage in TRAINING_STAGES else 1,
        images_seen=outcome.images_seen,
        device=outcome.device,
        device_seconds=round(outcome.device_seconds, 3),
        peak_memory_bytes=outcome.peak_memory_bytes,
        versions=_versions(),
        inputs=inputs_of(task, _read_by(work)),
    )
    receipt.write(work.folder)
    for name in outcome.discard:  # only now: until there is a receipt, a restart needs them
        shutil.rmtree(work.folder / name, ignore_errors=True)
    return receipt


def _is_done(manifest: Manifest, task: Task) -> bool:
    receipts = {task.id: manifest.receipt(task)}
    if receipts[task.id] is not None:
        receipts |= {need: manifest.receipt(manifest.task(need)) for need in task.needs}
    return is_done(task, receipts)


def _read_by(work: Work) -> dict[str, Receipt | None]:
    """The receipts of the tasks whose results a stage was given, by task id."""
    given: list[Done | Entry] = [done for several in work.inputs.values() for done in several]
    return {each.task.id: each.receipt for each in given + work.everything}


def _inputs(manifest: Manifest, task: Task, ranks: Ranks, patience_s: float) -> dict[str, list[Done]]:
    """The finished tasks that this one reads, every file of them as its receipt says."""
    inputs: dict[str, list[Done]] = {}
    if task.stage == "aggregate":  # reads whatever is there
        return inputs
    deadline = time.monotonic() + patience_s
    for need in map(manifest.task, task.needs):
        folder = manifest.folder(need)
        while (receipt := manifest.receipt(need)) is None:
            if time.monotonic() >= deadline:
                raise UserError(f"{task.id} needs {need.id}, which is not done ({folder})")
            time.sleep(POLL_S)
            look_for_new_files(folder)
        if ranks.local_rank == 0:  # one a node: each may have its own copy in memory
            _require_sound(need, folder, receipt, manifest.experiment.get("name", ""))
        inputs.setdefault(need.stage, []).append(Done(need, folder, receipt))
    return inputs


_sound: set[tuple[str, str]] = set()  # folders and keys that this process has looked at


def _require_sound(task: Task, folder: Path, receipt: Receipt, experiment: str) -> None:
    """Raises UserError where a file of a finished task is missing or not what its receipt says."""
    if (str(folder), task.key) in _sound:
        return
    for odd in odd_entries(folder):
        if not odd.is_file():
            raise UserError(f"{task.id} is damaged: {odd} is no file; remove it")
    problems = damaged_files(folder, receipt)
    if problems:
        raise UserError(
            f"{task.id} is damaged: {problems[0]}; `python -m pipeline.launch verify {experiment} --repair`"
            " makes the next launch run it again"
        )
    _sound.add((str(folder), task.key))


@no_garbage_collection()
def _everything(manifest: Manifest, task: Task, *, look_twice: bool = False) -> list[Entry]:
    """For an aggregation every other task; one whose log is drawn and damaged failed.

    Predictions are checked when they are read.

    Args:
        look_twice: for receipts that a shared file system may show late.
    """
    entries: list[Entry] = []
    if task.stage != "aggregate":
        return entries
    for other in manifest.tasks:
        if other.id == task.id:
            continue
        folder = manifest.folder(other)
        receipt = manifest.receipt(other)
        error = read_error(folder) if receipt is None else None
        if look_twice and receipt is None and error is None:
            look_for_new_files(folder)
            receipt = manifest.receipt(other)
        drawn = ["log.jsonl"] if other.stage == "pretrain" else []
        if receipt is not None and drawn and (problems := damaged_files(folder, receipt, drawn)):
            receipt, error = None, {"kind": "Damaged", "message": problems[0]}
        entries.append(Entry(other, folder, receipt, error))
    return entries


def _leave_error(folder: Path, error: Exception, ranks: Ranks, log: str | None) -> None:
    """Say what went wrong where ``status`` and the tables look for it; the first rank to fail is heard."""
    if (folder / "error.json").exists():
        return
    said = {
        "kind": type(error).__name__,
        "message": one_line(error),
        "user_error": isinstance(error, user_errors()),
        "rank": ranks.rank,
        "host": host(),
        "at": now(),
        "log": log,
        "traceback": redacted_traceback(error).splitlines()[-12:],
    }
    with contextlib.suppress(OSError):
        write_json(folder / "error.json", said)


def _hosts(ranks: Ranks) -> list[str]:
    if ranks.source == "slurm" and ranks.world_size > ranks.local_world_size:
        return [os.environ.get("SLURM_STEP_NODELIST", host())]
    return [host()]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "timm", "torchvision", "cass-pipeline"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
