"""One process at a time: a file that says who holds it, since when, and that the holder is alive.

A launcher holds its manifest, and the first rank of a task the task's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, printable
from pipeline.files import read_regular
from pipeline.manifest import now
from pipeline.process import user_name


class Held(UserError):
    """Somebody else holds a lock."""


class TakenOver(UserError):
    """A lock that was held is somebody else's now."""


MOST_OF_A_LOCK = 1 << 16  # bytes
BEAT_S = 5.0
DEAD_S = 30.0  # a holder elsewhere that has not counted up for so long, while we looked, is gone
_UNSEEN = "unseen"  # in place of the start of a process that is there, and of which no more can be told


class Lock:
    """A held lock. A thread counts up in its file, so that other hosts can see that its holder is alive."""

    def __init__(self, path: Path, descriptor: int, mine: dict[str, Any]) -> None:
        self.path, self._descriptor, self._mine = path, descriptor, mine
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Call before every step that must not be done twice.

        Raises:
            TakenOver: another process has taken the lock over, because this one stood still.
        """
        try:
            held = os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            held = False
        if not held:
            holder = lock_holder(self.path) or {}
            raise TakenOver(
                f"{self.path} is no longer held by this process: it stood still for more than"
                f" {DEAD_S:.0f} s, and {_who(holder)} has taken over"
            )

    def release(self) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(UserError, OSError):
            self.require()
            self.path.unlink()
        os.close(self._descriptor)

    def _beat(self) -> None:
        number = 0
        while not self._end.wait(BEAT_S):
            number += 1
            with contextlib.suppress(OSError):  # a full disk does not matter: nothing becomes longer
                os.pwrite(self._descriptor, _encode(self._mine, number), 0)
                os.fsync(self._descriptor)  # a network file system may keep it to this host for long


@contextlib.contextmanager
def lock(path: Path, *, what: str = "the manifest") -> Iterator[Lock]:
    """Hold ``path`` as a lock for one process.

    A lock is taken over if its holder was a process of this host that is no longer there, or if a holder
    elsewhere (see :func:`lock_holder`) has shown no life for ``DEAD_S`` seconds of looking. No clocks are
    compared.

    Args:
        path: of the lock's file.
        what: it stands for, in messages.

    Raises:
        Held: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = {
        "user": user_name(),
        **_here(),
        "pid": os.getpid(),
        "started": _process_start(os.getpid()),
        "since": now(),
    }
    held = _acquire(path, mine, what)
    try:
        yield held
    finally:
        held.release()


def _acquire(path: Path, mine: dict[str, Any], what: str) -> Lock:
    for _ in range(3):
        # The finished file is linked into place, so no reader ever meets an empty lock.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, _encode(mine, 0))
            os.fsync(descriptor)
            os.link(temporary, path)
            return Lock(path, descriptor, mine)
        except FileExistsError:
            os.close(descriptor)
        finally:
            os.unlink(temporary)
        seen = _read(path)
        holder = lock_holder(path)
        if holder is not None and not _is_dead_elsewhere(path, holder):
            raise Held(
                f"{what} is held by {_who(holder)} since {holder.get('since', '?')};"
                f" wait for that process, or remove {path} if it is gone"
            )
        _remove(path, seen if holder is None else holder)
    raise Held(f"{path} is held by another process")


def lock_holder(path: Path) -> dict[str, Any] | None:
    """Who holds a lock (user, host, pid, since), or None if nobody alive does.

    Only of a process of this host, of this boot and in this PID namespace (containers have their own) can it
    be told at once whether it is alive. Any other is a holder elsewhere, and counts as alive.
    """
    holder = _read(path)
    return None if holder is not None and _is_alive(holder) is False else holder


def is_here(holder: dict[str, Any]) -> bool:
    """Whether a holder is a living process that this one sees by its id: of this host, boot and namespace."""
    return _is_alive(holder) is True


def end_holder(holder: dict[str, Any]) -> None:
    """Send SIGTERM to a holder that is here, and to no process that has got its id since.

    Raises:
        ProcessLookupError: it has ended.
        PermissionError: it is another user's.
    """
    pid = int(holder["pid"])
    if not hasattr(os, "pidfd_open"):  # not Linux
        os.kill(pid, signal.SIGTERM)
        return
    process = os.pidfd_open(pid)
    try:
        if not is_here(holder):  # what was opened is the process that has the id now
            raise ProcessLookupError
        signal.pidfd_send_signal(process, signal.SIGTERM)
    finally:
        os.close(process)


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether a holder is alive; None if it is one elsewhere, or one of which this user is shown nothing."""
    if any(name not in holder or holder[name] != said for name, said in _here().items()):
        return None
    started = _process_start(holder.get("pid", 0))
    return None if started == _UNSEEN else started is not None and started == holder.get("started")


def _here() -> dict[str, Any]:
    """What processes that see each other by their ids have in common; None for what cannot be read."""
    boot = namespace = None
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return {"host": socket.gethostname(), "boot": boot, "pid_namespace": namespace}


def _is_dead_elsewhere(path: Path, holder: dict[str, Any]) -> bool:
    """Look for a while whether a holder elsewhere counts up; True also if it has let go meanwhile."""
    if holder.get("host") is None or _is_alive(holder):
        return False
    print(
        printable(f"{path} is held by {_who(holder)}: looking for {DEAD_S:.0f} s whether it is alive"),
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + DEAD_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, DEAD_S / 10))
        seen = _read(path)
        if seen is None:
            return True
        if seen and seen != holder:
            return False
    return True


def _remove(path: Path, expected: dict[str, Any] | None) -> None:
    """Take a dead holder's lock away, and no other that somebody has put in its place meanwhile."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != expected:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock's file says; None if there is none, empty if it cannot be read."""
    try:
        said = json.loads(read_regular(path, most=MOST_OF_A_LOCK))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict) or not isinstance(said.get("pid", 0), int):
        return {}
    return {name: printable(value) if isinstance(value, str) else value for name, value in said.items()}


def _encode(mine: dict[str, Any], beat: int) -> bytes:
    """Always of one length: the holder writes it in place."""
    return json.dumps({**mine, "beat": f"{beat:012d}"}).encode()


def _who(holder: dict[str, Any]) -> str:
    return f"{holder.get('user', '?')} on {holder.get('host', '?')} (process {holder.get('pid', '?')})"


def _process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None if there is no such process.

    Of another user's process it may be all that is shown that it is there: ``_UNSEEN``.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except OSError:
        pass
    try:  # no /proc (macOS): all that can be said is whether it is there
        os.kill(pid, 0)
        return "running"
    except PermissionError:
        return _UNSEEN
    except (OSError, OverflowError):
        return None
