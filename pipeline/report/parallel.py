"""Work on every CPU that this process may use, in processes that inherit all it has in memory."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.errors import UserError

Part = TypeVar("Part")
Made = TypeVar("Made")
_inherited: tuple[Callable[[Any], Any], Sequence[Any]]


def workers() -> int:
    """CPUs that this process may use; 1 where processes cannot inherit (only Linux forks safely)."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def in_parallel(work: Callable[[Part], Made], parts: Sequence[Part]) -> list[Made]:
    """``work`` of each part, in order; only what it returns is sent from process to process.

    Raises:
        UserError: a process died.
        Exception: the first that ``work`` raised.
    """
    global _inherited
    number = min(workers(), len(parts))
    if number < 2:
        return [work(part) for part in parts]
    _inherited = (work, parts)
    try:
        with ProcessPoolExecutor(number, multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_call, range(len(parts))))
    except BrokenProcessPool:
        raise UserError("a process that makes tables died: too little memory?") from None
    finally:
        del _inherited


def _call(number: int) -> Any:
    work, parts = _inherited
    return work(parts[number])
