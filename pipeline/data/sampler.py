"""Which images a step takes: exact epochs, the same on any number of ranks, from any step.

An epoch is a seeded permutation of all images. The permutations of epochs 0, 1, 2 … follow each other as
one endless sequence, and step t takes its places t·batch_size to (t+1)·batch_size. So every step is of
equal size, every image is seen exactly once an epoch, a step may end one epoch and begin the next, and a
set smaller than a batch simply goes round. Nothing is kept between steps: the step's number is the position
to resume at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.batches import rank_share
from pipeline.errors import UserError


@dataclass(frozen=True)
class Share:
    """A rank's part of a step (or of one accumulation of it).

    Attributes:
        positions: (B,) int64, which images.
        counters: (B,) int64, ``epoch * n + position``: names the image and the epoch, for the
            augmentation's draws.
    """

    positions: torch.Tensor
    counters: torch.Tensor


class EpochSampler:
    """The positions of every step.

    Args:
        n: number of images.
        batch_size: of a step, over all ranks and accumulations.
        rank, world_size: this process's place.
        accumulate: parts a rank's share of a step is cut into.
        seed: of the permutations.

    Raises:
        UserError: the batch cannot be cut into equal parts, or there is no image.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
    ) -> None:
        if n < 1:
            raise UserError("there are no images to train on")
        self.n = n
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.cut(accumulate)
        self._permutations: dict[int, np.ndarray] = {}

    def cut(self, accumulate: int) -> None:
        """From now on, cut this rank's share of a step into so many parts."""
        self.share = rank_share(self.batch_size, world_size=self.world_size, accumulate=accumulate)
        self.accumulate = accumulate

    @property
    def steps_per_epoch(self) -> float:
        """Not a whole number unless batch_size divides n."""
        return self.n / self.batch_size

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, at least one."""
        return max(1, round(epochs * self.n / self.batch_size))

    def shares(self, step: int) -> list[Share]:
        """This rank's part of a step: one :class:`Share` an accumulation, each of ``share`` images."""
        first = step * self.batch_size + self.rank * self.share * self.accumulate
        return [self._take(first + part * self.share) for part in range(self.accumulate)]

    def _take(self, first: int) -> Share:
        places = np.arange(first, first + self.share)
        epochs = places // self.n
        positions = np.empty(self.share, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = self._permutation(int(epoch))[places[here] - epoch * self.n]
        return Share(torch.from_numpy(positions), torch.from_numpy(epochs * self.n + positions))

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if abs(e - epoch) <= 1}
            self._permutations[epoch] = permutation(self.n, epoch=epoch, seed=self.seed)
        return self._permutations[epoch]


def permutation(n: int, *, epoch: int, seed: int) -> np.ndarray:
    """The order of an epoch: (n,) int64."""
    return np.random.default_rng([seed, epoch]).permutation(n)
