"""The ranks of a training: device, threads, process group, and what all ranks agree on."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.specs import Resources
from pipeline.train.cpu import set_up_cpu
from pipeline.train.meeting import Watch, meet

TIMEOUT = timedelta(minutes=30)  # a collective that waits longer fails on every rank


@dataclass(frozen=True)
class World:
    """This process among the ranks, and its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Rank 0 writes logs, checkpoints and exports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def maximum(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise largest over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise mean over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Tensors of equal shape from every rank, on the CPU, in order of rank."""
        if self.world_size == 1:
            return [values.cpu()]
        here = values.to(self.device)
        everyone = [torch.empty_like(here) for _ in range(self.world_size)]
        dist.all_gather(everyone, here)
        return [one.cpu() for one in everyone]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def choose_device(asked: Literal["auto", "cpu", "cuda"], *, local_rank: int = 0) -> torch.device:
    """The device of a rank.

    Raises:
        UserError: a GPU was asked for and there is none for this rank.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and not count:
        raise UserError(
            "resources.device is 'cuda' but PyTorch finds no GPU here"
            " (expected one for every rank; or set 'auto' or 'cpu')"
        )
    if asked == "cpu" or not count:
        return torch.device("cpu")
    # Under Slurm's --gpus-per-task=1 each rank sees only its own GPU, as number 0.
    number = 0 if count == 1 and local_rank else local_rank
    if number >= count:
        raise UserError(f"local rank {local_rank} has no GPU of its own: there are {count} on this node")
    return torch.device("cuda", number)


@contextlib.contextmanager
def join(
    ranks: Ranks, resources: Resources, *, on_lost: Callable[[str], None] | None = None
) -> Iterator[World]:
    """Set this process up for training and leave the process group at the end.

    Args:
        ranks: this process's place.
        resources: device and threads.
        on_lost: told, in another thread, which rank has fallen silent; it must end this process, whose main
            thread may be waiting for that rank. None: collectives wait until their own time-out.

    Raises:
        UserError: no device as asked for, or the other ranks cannot be reached.
    """
    set_up_cpu(resources.cpus_per_rank)
    device = choose_device(resources.device, local_rank=ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    world = World(
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        device=device,
    )
    if ranks.world_size == 1:
        yield world
        return
    meeting = meet(ranks)
    with contextlib.ExitStack() as leave:
        if on_lost is not None:
            watch = Watch(meeting.another(), ranks, silence_s=resources.silence_seconds, on_lost=on_lost)
            leave.callback(watch.close)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=meeting.named(),
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise UserError(
                f"rank {ranks.rank} could not join the {ranks.world_size} ranks at {ranks.master_addr}:"
                f" {str(error).splitlines()[0]}"
            ) from None
        leave.callback(dist.destroy_process_group)
        yield world


def peak_memory(world: World) -> int:
    """Bytes: the largest of any rank, allocated on the GPU or resident on the CPU."""
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(world.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(world.maximum(torch.tensor([peak], dtype=torch.int64, device=world.device)).item())
