"""Where the time of a training's steps goes: a trace, and a short table.

After some steps of warming up, ``steps`` steps run as always; as many under torch's profiler, for the trace,
and for how long the device computed and communicated; and as many with a wait for the device at the end of
each part, so that a part's time is its own.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from pipeline.nets.backbone import Net

T = TypeVar("T")
WARM_UP = 5  # steps that are not looked at
READS = ("forward_features", "forward_intermediates", "forward_head")  # of timm's nets
PLAIN, TRACED, APART = range(3)  # how the steps are looked at, one after another


class NoProfile:
    """Looks at nothing and costs nothing."""

    def part(self, name: str) -> AbstractContextManager:
        return contextlib.nullcontext()

    def reading(self, batches: Iterable[T]) -> Iterable[T]:
        return batches

    def step_done(self) -> None:
        pass

    def close(self) -> None:
        pass


class Profile(NoProfile):
    """A profile of one rank's steps; it writes ``trace.json.gz`` and ``steps.txt`` when it has seen enough.

    A step is from the wait for its batch to :meth:`step_done`; probes and checkpoints lie outside.

    Args:
        nets: backbones whose forward passes count apart; none where they are compiled.
        folder: for both files.
        steps: how many to look at, in each of three ways.
        device: that computes.
        say: told where the table is.
    """

    def __init__(
        self,
        nets: Iterable[Net],
        folder: Path,
        *,
        steps: int,
        device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.steps, self.device, self.say = folder, steps, device, say
        self.parts: dict[str, float] = {}
        self.seconds = [0.0, 0.0, 0.0]
        self.number = 0
        self.began = time.perf_counter()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = torch.profiler.profile(activities=activities)
        self._timed_reads: list[tuple[nn.Module, str]] = []
        for net in nets:
            teaches = not any(weight.requires_grad for weight in net.parameters())
            name = f"forward {net.arch}{', teacher' if teaches else ''}"
            for read in READS:
                if hasattr(net.net, read):
                    setattr(net.net, read, self._timed(getattr(net.net, read), name))
                    self._timed_reads.append((net.net, read))

    @property
    def way(self) -> int | None:
        """How this step is looked at; None before and after."""
        way = (self.number - WARM_UP) // self.steps
        return way if way in (PLAIN, TRACED, APART) else None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside counts as ``name``, but for what counts as a part of its own."""
        with record_function(name) if self.way == TRACED else contextlib.nullcontext():
            if self.way != APART:
                yield
                return
            self._wait()
            began, others = time.perf_counter(), sum(self.parts.values())
            yield
            self._wait()
            inside = sum(self.parts.values()) - others
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began - inside

    def reading(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, the wait for each counted as ``data``."""
        waiting = iter(batches)
        while True:
            self.began = time.perf_counter()
            with self.part("data"):
                batch = next(waiting, None)
            if batch is None:
                return
            yield batch

    def step_done(self) -> None:
        """To be called after each step that was taken."""
        before = self.way
        if before is not None:
            if before != APART and (self.number + 1 - WARM_UP) % self.steps == 0:
                self._wait()  # for what the host has run ahead of
            self.seconds[before] += time.perf_counter() - self.began
        self.number += 1
        if self.way != before:
            self._wait()
            if before == TRACED:
                self.profiler.stop()
            if self.way == TRACED:
                self.profiler.start()
            if before == APART:
                self._write()
                self.close()

    def close(self) -> None:
        """Leave the nets as they were; of a training that is too short for a profile, say so."""
        for net, read in self._timed_reads:
            delattr(net, read)
        self._timed_reads = []
        if self.number < self.needed:
            self.say(f"no profile: it needs {self.needed} steps, and there were {self.number}")
            if self.way == TRACED:
                self.profiler.stop()
            self.number = self.needed

    @property
    def needed(self) -> int:
        """Steps that it sees in all."""
        return WARM_UP + 3 * self.steps

    def _timed(self, read: Callable, name: str) -> Callable:
        @functools.wraps(read)
        def timed(*args, **kwargs):
            with self.part(name):
                return read(*args, **kwargs)

        return timed

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        text = self.table()
        (self.folder / "steps.txt").write_text(text, encoding="utf-8")
        self.say(f"profile of {3 * self.steps} steps: {self.folder}/steps.txt, trace.json.gz\n{text}")

    def table(self) -> str:
        """Milliseconds a step."""
        plain, traced, apart = (1e3 / self.steps * seconds for seconds in self.seconds)
        rows = [("a step", plain), *self._from_the_trace(traced), ("a step, part by part", apart)]
        parts = {name: 1e3 / self.steps * seconds for name, seconds in self.parts.items()}
        parts["other"] = apart - sum(parts.values())
        lines = [f"{name:40}{spent:10.2f} ms" for name, spent in rows]
        lines += [
            f"  {name:38}{spent:10.2f} ms {100 * spent / apart:5.1f} %" for name, spent in parts.items()
        ]
        return "\n".join(lines) + "\n"

    def _from_the_trace(self, step: float) -> list[tuple[str, float]]:
        """Communication, which may go on beside the rest, and on a GPU how long it had nothing to do.

        step: milliseconds of a traced one.
        """
        events = self.profiler.key_averages()
        each = 1e3 * self.steps  # microseconds of all steps → milliseconds of one
        if self.device.type != "cuda":
            talk = sum(event.cpu_time_total for event in events if event.key.startswith("gloo:"))
            return [("  communication, beside the rest", talk / each)]
        kernels = [
            event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        talk = sum(event.self_device_time_total for event in kernels if "nccl" in event.key.lower())
        busy = sum(event.self_device_time_total for event in kernels)
        return [
            ("  communication, beside the rest", talk / each),
            ("  the device idle", max(0.0, step - (busy - talk) / each)),
        ]
