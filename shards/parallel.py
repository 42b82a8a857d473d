"""Work on many files by several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from shards.errors import InputError

CHUNK = 16  # images a call of a worker: at the end, one may wait for another's last call
EACH = 100  # samples a process must have to be worth its start
Result = TypeVar("Result")


class Pool:
    """Worker processes, or none where there is little to do.

    Workers come from a fork server: a fork of a process with threads (as torch has) may hang.

    Args:
        processes: at most so many; None: one a CPU core that this process may use.
        samples: how many samples there are.
    """

    def __init__(self, processes: int | None, samples: int) -> None:
        if processes is None:
            processes = len(os.sched_getaffinity(0))
        processes = min(processes, samples // EACH)
        self._width = processes
        self._executor: ProcessPoolExecutor | None = None
        if processes > 1:
            context = multiprocessing.get_context("forkserver")
            self._executor = ProcessPoolExecutor(processes, mp_context=context)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[..., Result], calls: Sequence[tuple[Any, ...]]) -> Iterator[Result]:
        """Results of ``function(*call)``, in order, with a bounded number of calls under way."""
        if self._executor is None:
            for call in calls:
                yield function(*call)
            return
        waiting: deque[Future[Result]] = deque()
        try:
            for call in calls:
                waiting.append(self._executor.submit(function, *call))
                if len(waiting) > 4 * self._width:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise InputError(
                "a process that reads images died: an image that crashes its decoder, or too little memory"
                " (or the calling script lacks `if __name__ == '__main__':`)"
            ) from None
