"""Alternatives measured in turn, so that other work on the machine slows all of them down alike."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Clock = Callable[[], float]


def children() -> float:
    """CPU seconds of the processes that this one has started and waited for: a clock for commands."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait(device: torch.device) -> None:
    """Until a GPU has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turn(
    alternatives: Mapping[str, Callable[[], object]], rounds: int, *, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds that each alternative took in each round; every other round goes through them backwards.

    Args:
        alternatives: what to run, by name. What runs on a GPU waits for it itself.
        rounds: how often each runs.
        clock: ``time.process_time`` for what computes in this process and one thread: it leaves out the time
            that other processes got.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(rounds):
        for name in list(alternatives)[:: -1 if number % 2 else 1]:
            began = clock()
            alternatives[name]()
            seconds[name].append(clock() - began)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of the ratio of two times of one round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))
