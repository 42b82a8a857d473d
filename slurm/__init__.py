"""The cluster: profiles, submission through submitit, job states, requeueing, and the same on one machine.

A name's module is imported when the name is first asked for: most commands of a launcher need few of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurm.commands import available, require_controller, require_slurm
    from slurm.errors import SlurmError
    from slurm.job import StopFlag, job_id, requeue
    from slurm.local import JobEvent, LocalJob, LocalScheduler, visible_gpus
    from slurm.profiles import Profile, load_profile
    from slurm.resources import Request
    from slurm.states import JobState, cancel, cancel_named, job_states
    from slurm.submission import submit_array

__all__ = [
    "JobEvent",
    "JobState",
    "LocalJob",
    "LocalScheduler",
    "Profile",
    "Request",
    "SlurmError",
    "StopFlag",
    "available",
    "cancel",
    "cancel_named",
    "job_id",
    "job_states",
    "load_profile",
    "requeue",
    "require_controller",
    "require_slurm",
    "submit_array",
    "visible_gpus",
]

_NAMES = {  # of each module; the same as above
    "commands": ("available", "require_controller", "require_slurm"),
    "errors": ("SlurmError",),
    "job": ("StopFlag", "job_id", "requeue"),
    "local": ("JobEvent", "LocalJob", "LocalScheduler", "visible_gpus"),
    "profiles": ("Profile", "load_profile"),
    "resources": ("Request",),
    "states": ("JobState", "cancel", "cancel_named", "job_states"),
    "submission": ("submit_array",),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"slurm.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
