"""What one job asks its cluster for."""

from __future__ import annotations

from dataclasses import dataclass

from slurm.errors import SlurmError


@dataclass(frozen=True)
class Request:
    """What one job asks for: one process (a Slurm task) a rank.

    Attributes:
        nodes: machines.
        ranks_per_node: processes on each of them.
        cpus_per_rank: CPUs of each process.
        memory_gb: memory of each node in GiB; None leaves it to the site's default.
        minutes: time limit.
        gpus_per_rank: GPUs of each process. Every process of a node sees all GPUs that the job has there,
            so that LOCAL_RANK indexes them.
        partition, qos, constraint, gpu_type: in place of the profile's, where not None; empty: none at all.

    Raises:
        SlurmError: a number below its least value.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 1
    memory_gb: float | None = None
    minutes: int = 60
    gpus_per_rank: int = 0
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpu_type: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("nodes", 1), ("ranks_per_node", 1), ("cpus_per_rank", 1), ("minutes", 1)):
            if getattr(self, name) < least:
                raise SlurmError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if self.gpus_per_rank < 0:
            raise SlurmError(f"gpus_per_rank is {self.gpus_per_rank}; expected 0 or more")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise SlurmError(f"memory_gb is {self.memory_gb}; expected more than 0")

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def cpus(self) -> int:
        return self.ranks * self.cpus_per_rank

    @property
    def gpus(self) -> int:
        return self.ranks * self.gpus_per_rank
