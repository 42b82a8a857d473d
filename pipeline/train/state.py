"""Everything that a training is at a step, saved and restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.methods.base import Method
from pipeline.train.averaging import Averaging
from pipeline.train.checkpoint import load_checkpoint, save_checkpoint, sound_checkpoint
from pipeline.train.distributed import World

FORMAT = 1


class State:
    """The parts of a training whose values a checkpoint holds.

    Schedules and the data's order are functions of the step, so the step's number stands for them.

    Args:
        method: nets, heads, teachers, centres.
        optimizer: None where nothing is learnt.
        averaging: SWA or EMA.
        world: the ranks; each one's random state is kept.
        folder: of the checkpoints.
        keep: how many to keep.
        seed: of the random state at the start.
        say: told when a checkpoint is found damaged, and where the training goes on.

    Attributes:
        saved_step: steps done at the newest checkpoint; 0 before the first.
        log_position: bytes of the log that belong to it.
        seconds: of training up to it.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer | None,
        averaging: Averaging,
        *,
        world: World,
        folder: Path,
        keep: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.method, self.optimizer, self.averaging = method, optimizer, averaging
        self.world, self.folder, self.keep, self.seed, self.say = world, folder, keep, seed, say
        self.saved_step = 0
        self.log_position = 0
        self.seconds = 0.0

    def save(self, step: int, *, log_position: int, seconds: float) -> None:
        """Write a checkpoint (rank 0) after so many steps; every rank calls this.

        Raises:
            UserError: a weight is not finite: such a state is not worth going back to.
        """
        randoms = self.world.gather(_random_state(self.world.device))
        if self.world.is_first:
            if not all(bool(p.isfinite().all()) for p in self.method.parameters()):
                raise UserError(
                    f"a weight is not finite after step {step}: training stopped;"
                    f" the last checkpoint is from step {self.saved_step}"
                )
            state: dict[str, Any] = {
                "format": FORMAT,
                "step": step,
                "log_position": log_position,
                "seconds": seconds,
                "method": self.method.state_dict(),
                "optimizer": {} if self.optimizer is None else self.optimizer.state_dict(),
                "averaging": self.averaging.state_dict(),
                "random": randoms,
            }
            save_checkpoint(self.folder, state, step=step, keep=self.keep)
        self.saved_step = step

    def restore(self) -> int:
        """Take over the newest sound checkpoint, on every rank.

        Returns:
            Steps done; 0 without a checkpoint, and then the random state is seeded.
        """
        found = sound_checkpoint(self.folder, say=self.say) if self.world.is_first else None
        path: Path | None = self.world.from_first(found)
        if path is None:
            self._seed(0)
            return 0
        state = load_checkpoint(path)
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {state['format']}; this version reads {FORMAT}")
        self.method.load_state_dict(state["method"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.averaging.load_state_dict(state["averaging"])
        if len(state["random"]) == self.world.world_size:
            _set_random_state(state["random"][self.world.rank], self.world.device)
        else:  # another number of ranks: no rank's state is its successor
            self._seed(state["step"])
        self.saved_step, self.log_position = state["step"], state["log_position"]
        self.seconds = state["seconds"]
        if self.world.is_first:
            self.say(f"going on after step {self.saved_step} ({path.name[:16]})")
        return self.saved_step

    def _seed(self, step: int) -> None:
        """Each rank its own random numbers, for dropout and the like."""
        torch.manual_seed((self.seed * 1_000_003 + step) * 65_536 + self.world.rank)


def _random_state(device: torch.device) -> torch.Tensor:
    """(K,) uint8: the generators of the CPU and of the device."""
    parts = [torch.get_rng_state()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device))
    return torch.cat(parts)


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length])
    if device.type == "cuda" and len(state) > length:
        torch.cuda.set_rng_state(state[length:], device)
