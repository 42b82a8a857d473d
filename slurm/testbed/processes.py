"""Starting daemons and ending exactly those again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.errors import SlurmError

POLL_S = 0.05


@dataclass(frozen=True)
class Daemon:
    """A process that was started, known by its id and its start: ids come again."""

    name: str
    pid: int
    started: int

    def alive(self) -> bool:
        return start_time(self.pid) == self.started

    def send(self, number: signal.Signals) -> None:
        if self.alive():
            os.kill(self.pid, number)


def not_installed(program: str) -> str:
    """What to say about a missing program."""
    return f"'{program}' is not installed (docs/cluster.md names the packages)"


def start_time(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; None if there is none, or only its remains."""
    try:
        # The name in parentheses may hold anything; the fields after it do not.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def start(
    name: str,
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
) -> Daemon:
    """Start a daemon that stays in the foreground, out of reach of this terminal's Ctrl-C.

    Raises:
        SlurmError: its program is not installed.
    """
    with open(log, "ab") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                cwd="/",
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        except FileNotFoundError:
            raise SlurmError(not_installed(command[0])) from None
    return Daemon(name, process.pid, start_time(process.pid) or 0)


def end(daemons: Iterable[Daemon], patience: float = 5.0) -> None:
    """End daemons: SIGTERM, and after some seconds SIGKILL."""
    daemons = list(daemons)
    for daemon in daemons:
        daemon.send(signal.SIGTERM)
    deadline = time.monotonic() + patience
    while any(daemon.alive() for daemon in daemons) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for daemon in daemons:
        daemon.send(signal.SIGKILL)


def wait_until(ready: Callable[[], bool], what: str, *, log: Path, seconds: float = 30.0) -> None:
    """Poll until something is so.

    Raises:
        SlurmError: it is not so after some time; the message ends with the log's last line.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
            raise SlurmError(
                f"{what} did not come up within {seconds:.0f} s: {lines[-1] if lines else f'see {log}'}"
            )
        time.sleep(POLL_S)


def succeeds(command: Sequence[str], environment: Mapping[str, str] | None = None, given: str = "") -> bool:
    """Whether a command ends with exit code 0."""
    ran = subprocess.run(
        command, input=given, text=True, capture_output=True, env={**os.environ, **(environment or {})}
    )
    return ran.returncode == 0
