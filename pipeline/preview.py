"""What a launch would do: the plan, printed or as JSON. Nothing is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import view
from pipeline.contents import read_contents
from pipeline.experiment import Experiment
from pipeline.jobs import pack
from pipeline.manifest import Manifest
from pipeline.plan import plan
from pipeline.states import done_tasks, pending_tasks


def planned(experiment: Experiment, store: Path) -> Manifest:
    """An experiment with its tasks, none of which has a job yet."""
    return Manifest(experiment.resolved(), str(store.absolute()), plan(experiment, read_contents(experiment)))


def print_plan(manifest: Manifest, stages: Sequence[str]) -> None:
    """The tasks with needs and resources, what is done, and what a launch of these stages would start."""
    pending = {task.id for task in pending_tasks(manifest, stages)}
    view.print_plan(manifest, pending, jobs=len(pack(t for t in manifest.tasks if t.id in pending)))


def check_folders(manifest: Manifest, stages: Sequence[str]) -> None:
    """Look at the folders and tables of data sets that a launch would shard.

    Raises:
        UserError, shards.InputError: all that is wrong with them.
    """
    pending = pending_tasks(manifest, stages)
    if any(task.stage == "shard" and task.spec["dataset"]["root"] for task in pending):
        from pipeline.preflight import check_data

        check_data(pending)


def plan_as_json(manifest: Manifest) -> list[dict[str, Any]]:
    done = done_tasks(manifest)
    return [
        {
            "id": task.id,
            "key": task.key,
            "needs": task.needs,
            "folder": str(manifest.folder(task)),
            "resources": task.resources,
            "done": task.id in done,
        }
        for task in manifest.tasks
    ]
