"""The cluster: profiles, submission through submitit, job states, requeueing, and the same on one machine."""

from slurm.commands import available, require_controller, require_slurm
from slurm.errors import SlurmError
from slurm.job import StopFlag, job_id, requeue
from slurm.local import JobEvent, LocalJob, LocalScheduler
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
]
