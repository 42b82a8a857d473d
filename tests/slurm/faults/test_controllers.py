"""The controller restarted, the launcher killed, two launchers at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from slow import INTERVAL, TASK, until

import slurm

pytestmark = pytest.mark.timeout(600)


def test_restarted_controller_loses_nothing(slow, undisturbed, testbed):
    slow.launch("all")
    slow.wait_for_step(INTERVAL + 5)
    jobs = dict(slow.manifest.jobs)
    testbed.restart_controller()
    until(lambda: slow.launch("status", "--json", check=None).returncode == 0, "an answer", 60)
    states = slurm.job_states(sorted(set(jobs.values())))
    assert {state.state for state in states.values()} <= {"COMPLETED", "RUNNING", "PENDING"}
    assert slow.wait_for_end() == "COMPLETED"
    assert slow.resumed_at() == [], "the job itself never stopped"
    assert slow.bits() == undisturbed
    last = jobs["aggregate/slow"]
    until(lambda: slurm.job_states([last])[last].state == "COMPLETED", "the tables", 120)


def test_launcher_killed_between_two_submissions(slow, testbed):
    """Whatever it had submitted by then, in the end every task has been submitted exactly once."""
    path = slow.folder / "runs" / "slow" / "manifest.json"
    for kill_when in (1, 2):
        launcher = subprocess.Popen(slow.command("all"), cwd=slow.folder, stdout=subprocess.DEVNULL)

        def submitted() -> int:
            try:
                return len(set(json.loads(path.read_text())["jobs"].values()))
            except (OSError, ValueError):
                return 0

        while launcher.poll() is None and submitted() < kill_when:
            time.sleep(0.001)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    slow.launch("all")
    names = subprocess.run(
        ["squeue", "--noheader", "--array", "-o", "%j %i"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    alive = [line.split()[0].rpartition("-")[0] for line in names if line.startswith("slow-")]
    assert len(alive) == len(set(alive)), f"a stage's array was submitted twice: {alive}"
    assert set(slow.manifest.jobs) == {task.id for task in slow.manifest.tasks}


def test_launcher_killed_between_submission_and_writing_it_down(slow, testbed):
    """Its jobs are in the queue, and nobody has their ids."""
    fatal = slow.folder / "bin" / "sbatch"
    fatal.parent.mkdir()
    fatal.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"\nkill -9 $PPID\n')
    fatal.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fatal.parent}:{os.environ['PATH']}"}
    killed = subprocess.run(slow.command("all"), cwd=slow.folder, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not slow.manifest.jobs
    orphan = slow.manifest.submitting
    slow.launch("all")
    query = ["squeue", "--noheader", "--states=all", "-o", "%T", f"--name={orphan}"]
    until(
        lambda: subprocess.run(query, capture_output=True, text=True).stdout.split() == ["CANCELLED"],
        "the orphan's end",
    )
    assert slow.wait_for_end() == "COMPLETED"


def test_cancelled_training_stays_cancelled(slow, testbed):
    """A cancelled job gets a SIGTERM, as one that is preempted: it must not queue itself again."""
    slow.launch("pretrain")
    slow.wait_for_step(5)
    slow.launch("cancel")
    assert slow.wait_for_end(60) == "CANCELLED"
    until(lambda: not slow.ranks(), "its processes' end", 60)
    time.sleep(8)  # a requeued job waits for five seconds
    assert slow.state() == "CANCELLED" and not slow.ranks()


def test_of_two_launchers_on_two_hosts_one_works(slow, testbed):
    slow.launch("all")
    first = slow.job
    folder = slow.folder / "runs" / "slow"
    holding = (
        "from pathlib import Path; from pipeline.lock import lock; import time\n"
        f"with lock(Path({str(folder / 'manifest.lock')!r})): print(flush=True); time.sleep(300)"
    )
    elsewhere = ["unshare", "--uts", "sh", "-c", 'hostname elsewhere; exec "$@"', "sh"]
    holder = subprocess.Popen(
        [*elsewhere, slow.command("all")[0], "-c", holding], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    refused = slow.launch("all", check=2)
    assert f"on elsewhere (process {holder.pid}) since 20" in refused.stderr
    holder.kill()
    holder.wait()
    taken = slow.launch("all")
    assert "looking for 30 s whether it is alive" in taken.stderr
    assert slow.manifest.jobs[TASK] == first, "its jobs are alive: nothing is submitted again"
