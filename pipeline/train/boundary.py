"""What all ranks agree on between two steps: to stop, to save, or that a loss was not finite."""

from __future__ import annotations

from dataclasses import dataclass

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


class Boundary:
    """Exchanges a few flags after every step.

    On a GPU the answer is read one step late, so that the host can run ahead of the device by a step; on
    every rank it is the same step's answer. :meth:`settle` waits for the newest.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.lag = world.device.type == "cuda"
        self._newest: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

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
        before, self._newest = self._newest, self._send_home(flags)
        if not self.lag:
            return self._read(self._newest)
        return self._read(before) if before is not None else Agreed()

    def settle(self) -> Agreed:
        """The newest step's answer, waited for; :meth:`exchange` will not give it again."""
        newest, self._newest = self._newest, None
        return self._read(newest) if newest is not None else Agreed()

    def _send_home(self, flags: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if not self.lag:
            return flags, None
        home = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        home.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return home, event

    @staticmethod
    def _read(answer: tuple[torch.Tensor, torch.cuda.Event | None]) -> Agreed:
        flags, event = answer
        if event is not None:
            event.synchronize()
        stop, save, *broken = flags.tolist()
        first = min(((at - 1, rank) for rank, at in enumerate(broken) if at), default=None)
        return Agreed(bool(stop), bool(save), None if first is None else (first[1], first[0]))
