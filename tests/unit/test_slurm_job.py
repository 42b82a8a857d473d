"""Signals that reach a job before its handler is there, or when its work is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from slurm.job import HOLD_SIGNALS

CODE = """
import sys
print("imports", flush=True)
sys.stdin.readline()
from slurm import StopFlag
print(StopFlag().install()(), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize("held", [True, False])
def test_signal_during_the_imports_waits_for_its_handler(number, held):
    python = [sys.executable, "-c", HOLD_SIGNALS] if held else [sys.executable]
    process = subprocess.Popen(
        [*python, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "imports\n"
    process.send_signal(number)
    said, _ = process.communicate("go on\n")
    assert (process.returncode, said) == ((0, "True\n") if held else (-number, ""))


END = """
import os, signal, sys
from slurm import StopFlag
from slurm.job import Call

class Work:
    installs_stop_flag = True
    def __call__(self):
        self.stop = StopFlag().install()

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=int(sys.argv[1])):  # nothing else is left by then
        kill(pid, number)

Call(Work())()
print("done", flush=True)
late = Late()  # goes when Python has taken its own handlers away already
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_signal_after_the_work_is_done_does_not_make_the_job_fail(number, tmp_path):
    job = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_FOLDER": str(tmp_path), "SUBMITIT_LOCAL_JOB_ID": "1"}
    rank = {f"SUBMITIT_LOCAL_{name}": "0" for name in ("GLOBALID", "LOCALID")}
    ended = subprocess.run(
        [sys.executable, "-c", END, str(int(number))],
        env={**os.environ, **job, **rank},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr
