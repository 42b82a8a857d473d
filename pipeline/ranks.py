"""Which process am I: torchrun, Slurm, submitit's local executor, or one process on its own.

The rank environment is torchrun's everywhere: :func:`rank_environment` reads it where it is complete, and
derives the same six values from Slurm or submitit where it is not there at all. Nothing here imports torch.
"""

from __future__ import annotations

import os
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(20000, 32000)  # below Linux's ephemeral range
PORTS_TRIED = 6


@dataclass(frozen=True)
class Ranks:
    """One process's place among all that run a task."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    source: Literal["torchrun", "slurm", "local", "single"] = "single"
    job: str = ""  # names this start of this job, the same on all its ranks


def rank_environment(environ: Mapping[str, str] | None = None) -> Ranks:
    """Find this process's rank from its environment.

    Args:
        environ: the environment; this process's own by default.

    Raises:
        UserError: torchrun's variables are there in part only, or are not whole numbers.
    """
    env = os.environ if environ is None else environ
    given = [name for name in TORCHRUN if env.get(name)]
    # MASTER_ADDR and MASTER_PORT alone are common in site profiles; RANK alone is not.
    if any(name in given for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        missing = [name for name in TORCHRUN if name not in given]
        if missing:
            raise UserError(
                f"the torchrun environment is incomplete: {', '.join(given)} set,"
                f" {', '.join(missing)} missing (start with torchrun, or unset them all)"
            )
        rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        if not 0 <= rank < world_size:
            raise UserError(f"the environment variable RANK is {rank}; expected 0 to {world_size - 1}")
        return Ranks(
            rank=rank,
            world_size=world_size,
            local_rank=_number(env, "LOCAL_RANK"),
            local_world_size=_number(env, "LOCAL_WORLD_SIZE", 1),
            master_addr=env["MASTER_ADDR"],
            master_port=_number(env, "MASTER_PORT"),
            source="torchrun",
            job=env.get("TORCHELASTIC_RUN_ID", ""),
        )
    if env.get("SLURM_STEP_ID") not in (None, "", "4294967291") and env.get("SLURM_PROCID"):
        return _from_slurm(env)
    if env.get("SUBMITIT_LOCAL_NTASKS"):
        tasks = _number(env, "SUBMITIT_LOCAL_NTASKS")
        job = env.get("SUBMITIT_LOCAL_JOB_ID", "0")
        return Ranks(
            rank=_number(env, "SUBMITIT_LOCAL_GLOBALID"),
            world_size=tasks,
            local_rank=_number(env, "SUBMITIT_LOCAL_LOCALID"),
            local_world_size=tasks,
            master_port=rendezvous_port(job),
            source="local",
            job=job,
        )
    return Ranks()


def host() -> str:
    """This machine's name, as the cluster calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def rendezvous_port(job: str) -> int:
    """One port a job, the same on all its ranks."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def rendezvous_ports(first: int) -> list[int]:
    """Where to look for rank 0, in this order: somebody else may listen on the first."""
    others = [PORTS[(first + 1999 * number) % len(PORTS)] for number in range(1, PORTS_TRIED)]
    return [first, *others]


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    world_size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    job = "-".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return Ranks(
        rank=_number(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        local_world_size=max(1, world_size // nodes),
        master_addr=first_host(nodelist) if nodes > 1 else "127.0.0.1",
        master_port=rendezvous_port(job),
        source="slurm",
        job=job,
    )


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list such as ``gpu[03-05,9],login1``."""
    if "[" not in nodelist:
        return nodelist.split(",")[0]
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise UserError(f"the environment variable {name} is {text!r}; expected a whole number") from None
