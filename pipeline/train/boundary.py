"""What all ranks agree on between two steps: to stop, to save, or that a loss was not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.train.distributed import World


@dataclass(frozen=True)
class Agreed:
    """The same on every rank.

    Attributes:
        stop: some rank was asked to stop.
        save: it is time for a checkpoint.
        broken: (rank, step) of a loss that was not finite.
    """

    stop: bool = False
    save: bool = False
    broken: tuple[int, int] | None = None


class Fetched:
    """Values on their way to the host, which waits for them only when it reads them.

    Args:
        values: on any device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[Any]:
        """The values, as nested lists."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class Boundary:
    """Exchanges a few flags after every step.

    On a GPU the answer is read one step late, so that the host can run ahead of the device by a step; on
    every rank it is the same step's answer. :meth:`settle` waits for the newest.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.lag = world.device.type == "cuda"
        self._newest: Fetched | None = None

    def exchange(self, loss: torch.Tensor, *, step: int, stop: bool, save: bool) -> Agreed:
        """Tell this rank's flags after a step and learn everyone's.

        Args:
            loss: detached scalar on the device; it is not waited for.
            step: the step it belongs to.
            stop: this rank was asked to stop.
            save: this rank thinks a checkpoint is due.
        """
        flags = torch.zeros(2 + self.world.world_size, dtype=torch.int64)
        flags[0], flags[1] = int(stop), int(save)
        flags = flags.to(self.world.device, non_blocking=True)
        flags[2 + self.world.rank] = (~loss.isfinite()).to(torch.int64) * (step + 1)
        self.world.maximum(flags)
        before, self._newest = self._newest, Fetched(flags)
        if not self.lag:
            return _agreed(self._newest)
        return _agreed(before) if before is not None else Agreed()

    def settle(self) -> Agreed:
        """The newest step's answer, waited for; :meth:`exchange` will not give it again."""
        newest, self._newest = self._newest, None
        return _agreed(newest) if newest is not None else Agreed()


def _agreed(answer: Fetched) -> Agreed:
    stop, save, *broken = answer.read()
    first = min(((at - 1, rank) for rank, at in enumerate(broken) if at), default=None)
    return Agreed(bool(stop), bool(save), None if first is None else (first[1], first[0]))
