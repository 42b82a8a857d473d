"""When Python may look for garbage."""

from __future__ import annotations

import atexit
import contextlib
import gc
from collections.abc import Iterator

MANY = 100_000  # objects made since the last look; a plan of a hundred tasks makes half as many


def look_for_garbage_rarely() -> None:
    """For a program whose objects live on, since most that it makes are what it imports.

    As it ends, what is left is not looked through once more, which takes longer than to plan.
    """
    gc.set_threshold(MANY)
    atexit.register(gc.freeze)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For code that makes a great many objects which live on, none in a cycle.

    Python looks through all of them again and again while they are made: of a hundred thousand receipts, that
    is a sixth of the time. As a decorator, it holds for each call.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
