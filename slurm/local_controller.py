"""One job on one machine: starts its ranks, ends them together, and exits with their status.

``python -m slurm.local_controller FOLDER LOGS JOB_ID LAUNCHER_PID`` is started by the local scheduler.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import JobPaths
from submitit.local.local import Controller

POLL_S = 0.05
# A rank that fails takes the others along; they get a moment to say what they saw of it.
LAST_WORDS_S = 3.0
# What ranks get to write a checkpoint when they are told to stop.
CHECKPOINT_S = 5.0
# A program for `python -c PARENT`: becomes its further arguments, killed by Linux when its parent ends. (That
# is: the thread that started it, here the controller's only one.) The parent may have ended before.
END_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the controller has ended")
os.execvp(sys.argv[2], sys.argv[2:])
"""


class RankController(Controller):
    """Submitit's controller, ending all ranks when one has failed, the launcher is gone, or SIGTERM comes."""

    def __init__(self, folder: Path, *, logs: Path, job_id: str, launcher: int) -> None:
        super().__init__(folder)
        self.logs = logs
        self.pid = job_id  # what submitit puts into the names of its files
        self.launcher = launcher
        self.stopping = False
        if sys.platform == "linux":  # elsewhere the launcher ends the ranks of a controller that was killed
            ends = [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, str(os.getpid())]
            self.command = [*ends, *self.command]
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping = True

    def start_tasks(self) -> None:
        """Start the ranks, each with its two logs."""
        for rank in range(self.ntasks):
            paths = JobPaths(self.logs, self.pid, rank)
            number = str(rank)
            said = {"SUBMITIT_LOCAL_LOCALID": number, "SUBMITIT_LOCAL_GLOBALID": number}
            self.stdouts.append(paths.stdout.open("a", encoding="utf-8"))
            self.stderrs.append(paths.stderr.open("a", encoding="utf-8"))
            self.tasks.append(
                subprocess.Popen(
                    self.command,
                    env={**os.environ, **said, "SUBMITIT_LOCAL_JOB_ID": self.pid},
                    stdout=self.stdouts[-1],
                    stderr=self.stderrs[-1],
                    encoding="utf-8",
                )
            )

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Wait for the ranks and end those that are left; returns the exit code of each."""
        failed_at: float | None = None
        while True:
            codes = [task.poll() for task in self.tasks]
            if all(code is not None for code in codes):
                return codes
            if self.stopping or os.getppid() != self.launcher:
                self._end_ranks(signal.SIGTERM, CHECKPOINT_S)
                return [task.wait() for task in self.tasks]
            if any(codes):
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > LAST_WORDS_S:
                    self._end_ranks(signal.SIGINT, 1.0)
                    return [task.wait() for task in self.tasks]
            time.sleep(POLL_S)

    def _end_ranks(self, number: signal.Signals, patience: float) -> None:
        self._forward_signal(number)  # type: ignore[arg-type]
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any(task.poll() is None for task in self.tasks):
            time.sleep(POLL_S)
        for task in self.tasks:
            if task.poll() is None:
                task.kill()

    def run_ranks(self) -> int:
        """Run every rank once; returns 0 if all succeeded."""
        try:
            self.start_tasks()
            codes = self.wait()
        finally:
            self.kill_tasks()
        return next((abs(code) for code in codes if code), 0)


def main(arguments: Sequence[str]) -> int:
    folder, logs, job_id, launcher = arguments
    controller = RankController(Path(folder), logs=Path(logs), job_id=job_id, launcher=int(launcher))
    return controller.run_ranks()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
