"""Everything that a training is at a step, saved and restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError
from pipeline.methods.base import Method
from pipeline.train.averaging import Averaging
from pipeline.train.checkpoint import (
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    remove_remains,
    sound_checkpoint,
)
from pipeline.train.distributed import World
from pipeline.train.logs import EMPTY, begins_with

FORMAT = 3


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
        batch_size: of a step, over all ranks.
        accumulate: parts that each rank's share of a step is cut into.
        say: told when a checkpoint is passed over, and where the training goes on.
        log: the file that a checkpoint belongs to, up to a position; None: to no file.
        data: tells one dataset from another; a checkpoint belongs to one.

    Attributes:
        saved_step: steps done at the newest checkpoint; 0 before the first.
        log_position: bytes of the log that belong to it.
        seconds: of training up to it.
        accumulate: as given; after :meth:`restore`, where the training has been on more ranks, as many parts
            as keep a part no larger than it was.
        left_out: steps whose images are not trained on, because they led to a loss that was not finite.
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
        batch_size: int,
        accumulate: int,
        say: Callable[[str], None],
        log: Path | None = None,
        data: str = "",
    ) -> None:
        self.method, self.optimizer, self.averaging = method, optimizer, averaging
        self.world, self.folder, self.seed, self.say = world, folder, seed, say
        self.batch_size, self.accumulate = batch_size, accumulate
        self.log, self.data = log, data
        self.writer = CheckpointWriter(folder, keep=keep)
        self.left_out: set[int] = set()
        self.saved_step = 0
        self.log_position = 0
        self.seconds = 0.0

    def save(
        self,
        step: int,
        *,
        seconds: float,
        log_position: int = 0,
        log_sha256: str = EMPTY,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to write a checkpoint (rank 0) after so many steps; every rank calls this.

        Args:
            seconds: of training.
            log_position, log_sha256: bytes of the log that belong to it, and their SHA-256; rank 0's count.
            first: puts on disk what must be there when the checkpoint appears: the log up to its position.

        Raises:
            UserError: a weight is not finite: such a state is not worth going back to.
            OSError: the checkpoint before this one could not be written.
        """
        randoms = self.world.gather(random_state(self.world.device))
        if self.world.is_first:
            if not all(bool(p.isfinite().all()) for p in self.method.parameters()):
                raise UserError(
                    f"a weight is not finite after step {step}: training stopped;"
                    f" the last checkpoint is from step {self.saved_step}"
                )
            state: dict[str, Any] = {
                "format": FORMAT,
                "step": step,
                "data": self.data,
                "log_position": log_position,
                "log_sha256": log_sha256,
                "seconds": seconds,
                "world_size": self.world.world_size,
                "accumulate": self.accumulate,
                "left_out": sorted(self.left_out),
                "method": self.method.state_dict(),
                "optimizer": {} if self.optimizer is None else self.optimizer.state_dict(),
                "averaging": self.averaging.state_dict(),
                "random": randoms,
            }
            self.writer.write(state, step=step, first=first)
        self.saved_step = step

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self.writer.busy

    def settle(self, *, wait: bool = True) -> None:
        """Wait until the newest checkpoint is on disk, or only look whether writing it has failed.

        Raises:
            OSError: it could not be written; those before it are as they were.
        """
        self.writer.settle(wait=wait)

    def restore(self) -> int | None:
        """Take over the newest sound checkpoint of this data whose part of the log is there, on every rank.

        Returns:
            Steps done; None without such a checkpoint, and then only the random state is set: it is seeded.

        Raises:
            UserError: that checkpoint is of another version.
        """
        found: Path | None = None
        if self.world.is_first:
            remove_remains(self.folder)
            found = sound_checkpoint(self.folder, say=self.say, misfit=self._misfit)
            if found is None and list_checkpoints(self.folder):
                self.say(f"no checkpoint in {self.folder} can be used; without one a training starts over")
        path: Path | None = self.world.from_first(found)
        if path is None:
            self._seed(0)
            return None
        state = load_checkpoint(path)
        if state["format"] != FORMAT:
            raise UserError(
                f"checkpoint {path} has format {state['format']}; this version reads {FORMAT}"
                " (go on with the version that wrote it, or remove it to start over)"
            )
        self.method.load_state_dict(state["method"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.averaging.load_state_dict(state["averaging"])
        if len(state["random"]) == self.world.world_size:
            set_random_state(state["random"][self.world.rank], self.world.device)
            self.accumulate = max(self.accumulate, state["accumulate"])  # it may have been cut before
        else:  # another number of ranks: no rank's state is its successor
            self._seed(state["step"])
            self._cut(parts=state["world_size"] * state["accumulate"], before=state["world_size"])
        self.left_out |= set(state["left_out"])
        self.saved_step, self.log_position = state["step"], state["log_position"]
        self.seconds = state["seconds"]
        if self.world.is_first:
            self.say(f"going on after step {self.saved_step} ({path.name[:16]})")
        return self.saved_step

    def _misfit(self, state: dict[str, Any]) -> str | None:
        """Why a checkpoint cannot be gone on from; another format is refused later, on every rank."""
        if state["format"] != FORMAT:
            return None
        if state["data"] != self.data:
            return "is of other data"
        position, sha256 = state["log_position"], state["log_sha256"]
        if self.log is not None and not begins_with(self.log, position=position, sha256=sha256):
            return f"does not fit its log: {self.log} is missing, cut or changed"
        return None

    def _cut(self, *, parts: int, before: int) -> None:
        """Accumulate where there are fewer ranks than before, so that what fitted on a device still does."""
        ranks = self.world.world_size
        self.accumulate = max(self.accumulate, -(-parts // ranks))
        while self.batch_size % (ranks * self.accumulate) and ranks * self.accumulate < self.batch_size:
            self.accumulate += 1
        if self.world.is_first:
            self.say(
                f"{before} ranks before, {ranks} now: each step's images are the same, in {ranks} x"
                f" {self.accumulate} parts; losses that compare images see those of one accumulation"
            )

    def _seed(self, step: int) -> None:
        """Each rank its own random numbers, for dropout and the like."""
        torch.manual_seed((self.seed * 1_000_003 + step) * 65_536 + self.world.rank)


class Before:
    """What a forward pass changes, kept so that a step that is not to count can be taken back.

    Args:
        method: its buffers are kept; its weights change in the optimiser's step only.
        device: its random state is kept, and the CPU's.
    """

    def __init__(self, method: torch.nn.Module, device: torch.device) -> None:
        self.method, self.device = method, device
        self.buffers = [buffer.clone() for buffer in method.buffers()]
        self.random = random_state(device)

    def restore(self) -> None:
        """Put buffers and random state back."""
        for buffer, before in zip(self.method.buffers(), self.buffers, strict=True):
            buffer.copy_(before)
        set_random_state(self.random, self.device)


def random_state(device: torch.device) -> torch.Tensor:
    """(K,) uint8: the generators of the CPU and of the device."""
    parts = [torch.get_rng_state()]
    if device.type == "cuda":
        parts.append(torch.cuda.get_rng_state(device))
    return torch.cat(parts)


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Go back to what :func:`random_state` gave."""
    length = len(torch.get_rng_state())
    torch.set_rng_state(state[:length])
    if device.type == "cuda" and len(state) > length:
        torch.cuda.set_rng_state(state[length:], device)
