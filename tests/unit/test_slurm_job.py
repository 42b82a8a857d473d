"""Signals that reach a job before its handler is there."""

from __future__ import annotations

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
