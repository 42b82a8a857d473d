"""What a testbed is to be like, and the configuration files that make it so."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.errors import SlurmError
from slurm.testbed import network

# Below the ephemeral ports, which the kernel hands out by itself, and away from those that ranks meet at.
PORTS = range(10000, 20000)


@dataclass(frozen=True)
class Settings:
    """What a testbed is to be like.

    Attributes:
        nodes: how many nodes, named n1, n2, …
        cpus: CPUs that each node claims to have, whatever the machine has.
        accounting: with slurmdbd and its own MariaDB, or as on a site without.
        max_array_size: Slurm's MaxArraySize.
        requeue_seconds: how long a requeued job waits; Slurm's own default is 120, its least 5.
        gpu_nodes: so many of the last nodes claim two GPUs each, of type a100, and are alone in the partition
            `gpu`; the others are alone in `cpu`.
        networks: give every node a network of its own; the nodes are then named c1, c2, …

    Raises:
        SlurmError: a number that Slurm would not take.
    """

    nodes: int = 4
    cpus: int = 8
    accounting: bool = True
    max_array_size: int = 1001
    requeue_seconds: int = 120
    networks: bool = False
    gpu_nodes: int = 0

    def __post_init__(self) -> None:
        least = {"nodes": 1, "cpus": 1, "max_array_size": 2, "requeue_seconds": 5}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise SlurmError(f"{name} is {getattr(self, name)}; expected {number} or more")
        if not 0 <= self.gpu_nodes < self.nodes:
            raise SlurmError(f"gpu_nodes is {self.gpu_nodes}; expected 0 or more, and fewer than nodes")

    @property
    def node_names(self) -> list[str]:
        return [f"{'c' if self.networks else 'n'}{number}" for number in range(1, self.nodes + 1)]

    def address(self, number: int) -> str:
        """Of a node, from 1."""
        return network.address(number) if self.networks else "127.0.0.1"

    @property
    def ports_needed(self) -> int:
        return self.nodes + 1 + 2 * self.accounting


def free_ports(number: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    held: list[socket.socket] = []
    try:
        for port in random.sample(PORTS, len(PORTS)):
            if len(held) == number:
                break
            trial = socket.socket()
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                trial.close()
            else:
                held.append(trial)
        return [trial.getsockname()[1] for trial in held]
    finally:
        for trial in held:
            trial.close()


def slurm_conf(settings: Settings, folder: Path, ports: Sequence[int]) -> str:
    """``slurm.conf``; ports are slurmctld's, the nodes' and, with accounting, slurmdbd's and MariaDB's."""
    host = socket.gethostname()
    gpus, first_gpu = " Gres=gpu:a100:2", settings.nodes - settings.gpu_nodes
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr={settings.address(number)} Port={port}"
        f" CPUs={settings.cpus} RealMemory=16000{gpus if number > first_gpu else ''} State=UNKNOWN"
        for number, (name, port) in enumerate(zip(settings.node_names, ports[1:]), start=1)
    )
    accounting = (
        f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[-2]}
JobAcctGatherType=jobacct_gather/none"""
        if settings.accounting
        else "AccountingStorageType=accounting_storage/none"
    )
    return f"""# A cluster of {settings.nodes} nodes on one machine, for tests and for trying things out.
ClusterName=testbed
SlurmctldHost={host}({network.HOST if settings.networks else "127.0.0.1"})
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as its old credential is valid.
AuthInfo=cred_expire={settings.requeue_seconds}

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
# The nodes claim more CPUs than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=1
MaxArraySize={settings.max_array_size}
KillWait=5
InactiveLimit=0
{accounting}

{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
# A job in `high` sends those in `low` back into the queue, ten seconds after a SIGTERM.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
{_gpu_partitions(settings)}"""


def _gpu_partitions(settings: Settings) -> str:
    if not settings.gpu_nodes:
        return ""
    first_gpu = settings.nodes - settings.gpu_nodes
    named = {"cpu": settings.node_names[:first_gpu], "gpu": settings.node_names[first_gpu:]}
    lines = [
        f"PartitionName={name} Nodes={','.join(nodes)} MaxTime=INFINITE State=UP PreemptMode=OFF\n"
        for name, nodes in named.items()
    ]
    return "GresTypes=gpu\n" + "".join(lines)


def gres_conf(settings: Settings) -> str:
    """``gres.conf``: the GPUs that nodes claim to have, as files that there are on every machine."""
    first_gpu = settings.nodes - settings.gpu_nodes
    return "".join(
        f"NodeName={name} Name=gpu Type=a100 File=/dev/null,/dev/zero\n"
        for name in settings.node_names[first_gpu:]
    )


def slurmdbd_conf(folder: Path, ports: Sequence[int], password: str) -> str:
    """``slurmdbd.conf``; it holds a password, so it must be readable by its owner only."""
    return f"""DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[-2]}
SlurmUser=root
AuthType=auth/munge
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[-1]}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""
