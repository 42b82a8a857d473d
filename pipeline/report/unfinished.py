"""Tasks without a result, and why: what report.md opens with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.stages.work import Entry


@dataclass(frozen=True)
class Unfinished:
    """A task without a result, and why.

    Attributes:
        state: ``failed``, or ``missing`` where it never ran to its end.
        reason: one line.
        log: the file its job wrote to, where it is known.
        last_line: of that file.
    """

    task: str
    state: str
    reason: str
    log: str | None = None
    last_line: str | None = None


def state_of(entry: Entry) -> str:
    """``done``, ``failed`` or ``missing``, as results.csv says it."""
    if entry.receipt is not None:
        return "done"
    return "failed" if entry.error is not None else "missing"


def unfinished(entry: Entry, by_id: Mapping[str, Entry]) -> Unfinished:
    """Why a task without a receipt has none.

    Args:
        by_id: every task of the manifest.
    """
    error = entry.error
    if error is None:
        open_needs = [need for need in entry.task.needs if by_id[need].receipt is None]
        reason = f"waits for {', '.join(open_needs)}" if open_needs else "not run, or still running"
        return Unfinished(entry.task.id, "missing", reason)
    message = " ".join(str(error.get("message") or "no message").split())
    kind = "" if error.get("user_error") or not error.get("kind") else f"{error['kind']}: "
    log = error.get("log")
    trace = error.get("traceback") or []
    last = _last_line(Path(log)) if log else None
    return Unfinished(
        entry.task.id, "failed", kind + message, log, last or (trace[-1].strip() if trace else None)
    )


def _last_line(path: Path, tail: int = 8192) -> str | None:
    """The last line of a log that is not blank; None where the log cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tail))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)
