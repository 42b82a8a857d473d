"""What a task tells whoever watches: its progress while it runs, its warnings once it is done."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import printable
from pipeline.files import read_regular
from pipeline.manifest import Receipt, Task
from pipeline.stages import TRAINING_STAGES

WARNING_STAGES = (
    "shard",
    *TRAINING_STAGES,
    "aggregate",
)  # whose receipts may have warnings among their metrics
MOST_OF_PROGRESS = 1 << 16  # bytes of a progress.json
MOST_WARNINGS = 5  # of one task, for people to read


def read_progress(folder: Path) -> tuple[float, float, str] | None:
    """What ``Work.progress`` last said in this folder: done, total, text; None if nothing yet."""
    try:
        said = json.loads(read_regular(folder / "progress.json", most=MOST_OF_PROGRESS))
        done, total, text = float(said["done"]), float(said["total"]), printable(str(said["text"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return (done, total, text) if math.isfinite(done) and math.isfinite(total) else None


def warnings_of(tasks: Iterable[tuple[Task, Receipt | None]]) -> dict[str, list[str]]:
    """What finished tasks warn of, on one line each → the tasks, in order.

    Of a task with many warnings the first few, then how many more there are, and where.

    Args:
        tasks: each with its receipt; None: not done.
    """
    found: dict[str, list[str]] = {}
    for task, receipt in tasks:
        if task.stage not in WARNING_STAGES or receipt is None:
            continue
        warnings = [printable(" ".join(line.split())) for line in receipt.metrics.get("warnings", ())]
        shown, more = warnings[:MOST_WARNINGS], len(warnings) - MOST_WARNINGS
        if more > 0:
            shown.append(f"{more} more, in {task.folder}/receipt.json of the store")
        for line in shown:
            found.setdefault(line, []).append(task.id)
    return found
