"""What the jobs of these tests run. The jobs import this file, so it knows nothing of pytest."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import slurm


class Write:
    """Writes this job's Slurm environment and its running time to ``FOLDER/NAME.RANK``."""

    def __init__(self, folder: Path, name: str, *, seconds: float = 0) -> None:
        self.folder, self.name, self.seconds = folder, name, seconds

    def __call__(self) -> None:
        started = time.time()
        time.sleep(self.seconds)
        said = {"started": started, "ended": time.time(), "environment": dict(os.environ)}
        (self.folder / f"{self.name}.{os.environ['SLURM_PROCID']}").write_text(json.dumps(said))


def read(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{name}.{rank}").read_text())


def fail() -> None:
    raise ValueError("asked to fail")


def last_rank_fails() -> None:
    """Rank 0 waits for a rank that never comes, as in a collective."""
    if int(os.environ["SLURM_PROCID"]) == int(os.environ["SLURM_NTASKS"]) - 1:
        fail()
    time.sleep(300)


class UntilStopped:
    """Runs until a signal, asks to be queued again, and ends when started the second time.

    A file ``NAME.START.RANK`` says that a start was made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def __call__(self) -> None:
        stop = slurm.StopFlag().install()
        start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        (self.folder / f"{self.name}.{start}.{os.environ['SLURM_PROCID']}").touch()
        if start > 0:
            return
        while not stop():
            time.sleep(0.05)
        slurm.requeue()
        raise RuntimeError("stopped by a signal")


class Submit:
    """Submits another call from inside a job, with a binding around it as srun leaves one."""

    def __init__(self, call: Any, profile: slurm.Profile, folder: Path) -> None:
        self.call, self.profile, self.folder = call, profile, folder

    def __call__(self) -> None:
        os.environ["SLURM_CPU_BIND"] = "quiet,mask_cpu:0x1"
        ids = slurm.submit_array(
            [self.call],
            name="inner",
            request=slurm.Request(minutes=5),
            profile=self.profile,
            folder=self.folder,
        )
        (self.folder / "inner_id").write_text(ids[0])


def all_reduce(folder: Path) -> None:
    """Sums the ranks over all nodes; they meet at the first node of their step."""
    import torch
    import torch.distributed as dist

    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]], capture_output=True, text=True
    ).stdout.split()
    os.environ["MASTER_ADDR"] = nodes[0]
    os.environ["MASTER_PORT"] = str(20000 + int(os.environ["SLURM_JOB_ID"]) % 12000)
    rank = int(os.environ["SLURM_PROCID"])
    dist.init_process_group("gloo", rank=rank, world_size=int(os.environ["SLURM_NTASKS"]))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    dist.destroy_process_group()
    node = os.environ["SLURMD_NODENAME"]
    (folder / f"sum.{rank}").write_text(json.dumps({"sum": total.item(), "node": node, "nodes": nodes}))
