"""What a job does with its tasks: whose, for how long."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.jobs import JobFailed, TaskJob
from pipeline.manifest import Manifest, Receipt, Task
from pipeline.stages import runner
from pipeline.stages.work import Interrupted, Outcome


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A manifest with two tasks, whose stage does what ``given.stage`` does."""
    tasks = tuple(
        Task(f"shard/{name}", "shard", {}, (), letter * 64, {"minutes": 7}) for name, letter in ("xa", "yb")
    )
    manifest = Manifest({"name": "x"}, str(tmp_path / "store"), tasks)
    manifest.write(tmp_path / "manifest.json")
    made = SimpleNamespace(path=tmp_path / "manifest.json", manifest=manifest, tasks=tasks)
    monkeypatch.setattr("pipeline.stages.shard.run", lambda work: made.stage(work))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("sys.excepthook", None)
    return made


def test_job_does_not_run_what_the_experiment_has_become_since(given, capfd):
    given.stage = lambda work: Outcome({})
    submitted = [replace(given.tasks[0], key="0" * 64), given.tasks[1]]
    with pytest.raises(JobFailed, match="1 of 2"):
        TaskJob(given.path, submitted)()
    assert "shard/x is not what this job was submitted for" in capfd.readouterr().err
    assert not given.manifest.folder(given.tasks[0]).exists()
    assert given.manifest.receipt(given.tasks[1]) is not None


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_task_that_a_whole_job_is_too_short_for_is_not_started_again_and_again(given, number, monkeypatch):
    """It keeps no checkpoint: each start would end as this one."""

    def stage(work):
        if work.task.name == "y":
            os.kill(os.getpid(), number)
            assert work.stop_requested()
            raise Interrupted
        return Outcome({})

    given.stage = stage
    job = TaskJob(given.path, given.tasks)
    with pytest.raises(Interrupted):  # the task before it took some of the time
        job()
    error = given.manifest.folder(given.tasks[1]) / "error.json"
    assert not error.exists()
    if number == signal.SIGTERM:  # preempted: nobody knows how much time it would have had
        with pytest.raises(Interrupted):
            job()
        return
    with pytest.raises(JobFailed):
        job()
    assert json.loads(error.read_text())["message"] == (
        "shard/y does not fit into the 7 minutes of its job: resources.shard.minutes must be more"
    )


def test_task_that_is_done_is_not_run_again_unless_what_it_read_was(given):
    def stage(work):
        ran.append(work.task.id)
        return Outcome({})

    ran: list[str] = []
    given.stage = stage
    behind = replace(given.tasks[1], needs=("shard/x",))
    replace(given.manifest, tasks=(given.tasks[0], behind)).write(given.path)
    job = TaskJob(given.path, [given.tasks[0], behind])
    job()
    job()
    assert ran == ["shard/x", "shard/y"]
    folder = given.manifest.folder(given.tasks[0])
    replace(Receipt.read(folder, given.tasks[0].key), seconds=99.0).write(folder)
    job()
    assert ran == ["shard/x", "shard/y", "shard/y"]


HOLD = "from pathlib import Path; from pipeline.lock import lock; import sys, time\n"
HOLD += "with lock(Path(sys.argv[1])): print(flush=True); time.sleep(60)"


def test_task_that_another_process_runs_is_left_to_it(given, monkeypatch, capfd):
    monkeypatch.setattr(runner, "ENDING_S", 0.0)
    folder = given.manifest.folder(given.tasks[0])
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.readline()
    given.stage = lambda work: Outcome({})
    job = TaskJob(given.path, given.tasks[:1])
    with pytest.raises(JobFailed):
        job()
    assert f"shard/x is held by {getpass.getuser()} on" in capfd.readouterr().err
    assert [path.name for path in folder.iterdir()] == [".lock"], "it is the other's folder"
    other.kill()
    other.wait()
    job()
    assert given.manifest.receipt(given.tasks[0]) is not None
    assert not (folder / ".lock").exists()


def test_task_that_another_process_has_taken_over_leaves_nothing_more(given, monkeypatch, capfd):
    """As a process that was stopped for a while finds it."""
    monkeypatch.setattr(runner, "REQUIRE_S", -1.0)

    def stage(work):
        lock = work.folder / ".lock"
        said = lock.read_text()
        lock.unlink()
        lock.write_text(said.replace('"pid"', '"was"'))
        return Outcome({}) if work.task.name == "x" else Outcome({"stopped": work.stop_requested()})

    given.stage = stage
    with pytest.raises(JobFailed, match="2 of 2"):
        TaskJob(given.path, given.tasks)()
    assert capfd.readouterr().err.count("no longer held by this process") == 2
    for task in given.tasks:
        left = {path.name for path in given.manifest.folder(task).iterdir()}
        assert left == {".lock", "progress.json"}, "the latter from before"
