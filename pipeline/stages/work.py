"""What a stage gets and what it gives back: the whole contract between the runner and a stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.manifest import Receipt, Task, write_json
from pipeline.ranks import Ranks
from pipeline.specs import Resources

Json = dict[str, Any]
MODEL = "model"  # folder of a fine-tuned model, below its task's
PROGRESS_SECONDS = 0.5  # how often the progress file may be rewritten


class Interrupted(Exception):
    """A stage stopped at a step boundary, after its checkpoint, because it was asked to."""


@dataclass(frozen=True)
class Done:
    """A task that has run: where it is and what it left."""

    task: Task
    folder: Path
    receipt: Receipt


@dataclass(frozen=True)
class Entry:
    """A task of the manifest, done or not, as the aggregate stage sees it."""

    task: Task
    folder: Path
    receipt: Receipt | None  # None: not done
    error: Json | None  # what error.json says: kind, message, host, log; None: it never failed


@dataclass
class Work:
    """One task on one rank.

    Attributes:
        task: what to do; ``task.spec`` is validated by the stage with its model of ``pipeline.specs``.
        folder: the task's own folder, which exists. Only rank 0 writes shared files into it.
        inputs: the finished tasks it needs, by stage.
        everything: every task of the manifest but this one, in plan order.
        resources: devices, ranks and threads.
        ranks: this process's place among all.
        stop_requested: true once a signal has asked this process to stop at the next step boundary.
        rank_lost: told in one line which rank is gone; it ends this process. None: nobody watches.
    """

    task: Task
    folder: Path
    inputs: dict[str, list[Done]] = field(default_factory=dict)
    everything: list[Entry] = field(default_factory=list)
    resources: Resources = field(default_factory=Resources)
    ranks: Ranks = field(default_factory=Ranks)
    stop_requested: Callable[[], bool] = lambda: False
    rank_lost: Callable[[str], None] | None = None
    _last_progress: float = 0.0

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Tell whoever watches how far the task is, at most twice a second; only rank 0 is heard."""
        now = time.monotonic()
        if self.ranks.rank or (now - self._last_progress < PROGRESS_SECONDS and done < total):
            return
        self._last_progress = now
        write_json(self.folder / "progress.json", {"done": done, "total": total, "text": text}, sync=False)


@dataclass(frozen=True)
class Outcome:
    """What a stage reports; the runner makes the receipt of it.

    Attributes:
        metrics: JSON values only.
        images_seen: images that passed through the nets in training, over all ranks.
        device: where the nets ran, ``cpu`` or ``cuda``.
        device_seconds: seconds of training times ranks.
        peak_memory_bytes: the largest of any rank, on the device (CUDA) or resident (CPU).
        discard: folders below the task's own that are no part of the result: removed once there is a receipt.
        spare: folders below the task's own that stay beside the result, but may be removed later.
    """

    metrics: Json
    images_seen: int = 0
    device: str = "cpu"
    device_seconds: float = 0.0
    peak_memory_bytes: int = 0
    discard: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
