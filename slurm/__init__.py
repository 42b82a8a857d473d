"""The cluster: profiles, submission through submitit, job states, requeueing, and the same on one machine.

A name's module is imported when the name is first asked for: most commands of a launcher need few of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slurm.commands import available, require_controller, require_slurm, site_config
    from slurm.errors import SlurmError
    from slurm.identity import Submission, number_of
    from slurm.job import StopFlag, job_id, log_of_this_job, requeue
    from slurm.local import JobEvent, LocalJob, LocalScheduler, visible_gpus
    from slurm.profiles import Profile, load_profile
    from slurm.resources import Request
    from slurm.states import JobState, cancel, cancel_named, job_states, seconds, submit_times
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
    "Submission",
    "available",
    "cancel",
    "cancel_named",
    "job_id",
    "job_states",
    "load_profile",
    "log_of_this_job",
    "number_of",
    "requeue",
    "require_controller",
    "require_slurm",
    "seconds",
    "site_config",
    "submit_array",
    "submit_times",
    "visible_gpus",
]

_NAMES = {  # of each module; the same as above
    "commands": ("available", "require_controller", "require_slurm", "site_config"),
    "errors": ("SlurmError",),
    "identity": ("Submission", "number_of"),
    "job": ("StopFlag", "job_id", "log_of_this_job", "requeue"),
    "local": ("JobEvent", "LocalJob", "LocalScheduler", "visible_gpus"),
    "profiles": ("Profile", "load_profile"),
    "resources": ("Request",),
    "states": ("JobState", "cancel", "cancel_named", "job_states", "seconds", "submit_times"),
    "submission": ("submit_array",),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(importlib.import_module(f"slurm.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
