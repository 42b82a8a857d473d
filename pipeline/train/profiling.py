"""Where the time of a training's steps goes: a trace, and a short table.

After some steps of warming up, ``steps`` steps run as always under torch's profiler: the trace, what a step
takes, how long the device computed and communicated. Then as many run once more with a wait for the device at
the end of each part, so that a part's time is its own; these steps are slower.
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
from torch.profiler import ProfilerActivity, record_function

from pipeline.nets.backbone import Net

T = TypeVar("T")
WARM_UP = 5  # steps that are not looked at
READS = ("forward_features", "forward_intermediates", "forward_head")  # of timm's nets
COLLECTIVE = ("allreduce", "all_reduce", "allgather", "all_gather", "reduce_scatter")


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

    Args:
        module: what is trained; the forward passes of its backbones count apart.
        folder: for both files.
        steps: how many to look at, twice.
        device: that computes.
        say: told where the table is.
    """

    def __init__(
        self,
        module: nn.Module,
        folder: Path,
        *,
        steps: int,
        device: torch.device,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.steps, self.device, self.say = folder, steps, device, say
        self.parts: dict[str, float] = {}
        self.forward = 0.0
        self.number = 0
        self.began = time.perf_counter()
        self.whole = {"as always": 0.0, "part by part": 0.0}
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = torch.profiler.profile(activities=activities)
        self._timed_reads: list[tuple[nn.Module, str]] = []
        for net in [part for part in module.modules() if isinstance(part, Net)]:
            teaches = not any(weight.requires_grad for weight in net.parameters())
            name = f"forward {net.arch}{', teacher' if teaches else ''}"
            for read in READS:
                if hasattr(net.net, read):
                    setattr(net.net, read, self._timed(getattr(net.net, read), name))
                    self._timed_reads.append((net.net, read))

    @property
    def apart(self) -> bool:
        """Whether this step waits for the device at each part's end."""
        return WARM_UP + self.steps <= self.number < WARM_UP + 2 * self.steps

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside counts as ``name``, but for what counts as a part of its own."""
        with record_function(name):
            if not self.apart:
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
            with self.part("data"):
                batch = next(waiting, None)
            if batch is None:
                return
            yield batch

    def step_done(self) -> None:
        """To be called after each step."""
        now = time.perf_counter()
        if WARM_UP <= self.number < WARM_UP + 2 * self.steps:
            self.whole["part by part" if self.apart else "as always"] += now - self.began
        self.number += 1
        if self.number == WARM_UP:
            self._wait()
            self.profiler.start()
        elif self.number == WARM_UP + self.steps:
            self._wait()
            self.whole["as always"] += time.perf_counter() - now
            self.profiler.stop()
        elif self.number == WARM_UP + 2 * self.steps:
            self._write()
            self.close()
        self.began = time.perf_counter()

    def close(self) -> None:
        """Leave the nets as they were; of a training that is too short for a profile, say so."""
        for net, read in self._timed_reads:
            delattr(net, read)
        self._timed_reads = []
        if self.number < WARM_UP + 2 * self.steps:
            self.say(
                f"no profile: {WARM_UP} steps and twice {self.steps} are needed, and there were {self.number}"
            )
            if self.number >= WARM_UP and self.number < WARM_UP + self.steps:
                self.profiler.stop()
            self.number = WARM_UP + 2 * self.steps

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
        self.say(f"profile of {2 * self.steps} steps: {self.folder}/steps.txt, trace.json.gz\n{text}")

    def table(self) -> str:
        """Milliseconds a step."""
        each = 1e3 / self.steps
        always, apart = (seconds * each for seconds in self.whole.values())
        events = self.profiler.key_averages()
        on_gpu = self.device.type == "cuda"
        talk = sum(
            (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
            for event in events
            if any(word in event.key.lower().replace(" ", "") for word in COLLECTIVE)
        )
        lines = [f"{'a step':32}{always:10.2f} ms"]
        if on_gpu:
            busy = sum(event.self_device_time_total for event in events) / 1e3 / self.steps
            lines.append(f"{'  the device idle':32}{max(0.0, always - busy):10.2f} ms")
        lines.append(f"{'  communication':32}{talk / self.steps:10.2f} ms")
        lines.append(f"{'a step, part by part':32}{apart:10.2f} ms")
        parts = {name: seconds * each for name, seconds in self.parts.items()}
        parts["other"] = apart - sum(parts.values())
        for name, spent in parts.items():
            lines.append(f"{'  ' + name:32}{spent:10.2f} ms {100 * spent / apart:5.1f} %")
        return "\n".join(lines) + "\n"
