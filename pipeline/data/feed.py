"""What the training loop reads: for every step, this rank's images and the counters to augment them by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import torch

from pipeline.data.images import ImageSet
from pipeline.data.sampler import EpochSampler


class Batch(NamedTuple):
    """One accumulation of one step on one rank.

    Attributes:
        images: (B, 3, S, S) uint8 on the device.
        counters: (B,) int64 on the CPU, ``epoch * n + position``.
    """

    images: torch.Tensor
    counters: torch.Tensor


class Feed(Protocol):
    """A source of training batches."""

    n: int  # images in an epoch, over all ranks

    def steps(self, first: int, stop: int) -> Iterator[list[Batch]]:
        """For each step from ``first`` up to ``stop``: one batch an accumulation."""
        ...


class IndexedFeed:
    """Exact global shuffle over an :class:`ImageSet`."""

    def __init__(self, images: ImageSet, sampler: EpochSampler) -> None:
        assert sampler.n == len(images)
        self.images = images
        self.sampler = sampler
        self.n = sampler.n

    def steps(self, first: int, stop: int) -> Iterator[list[Batch]]:
        """See :class:`Feed`."""
        images = self.images.batches(
            share.positions for step in range(first, stop) for share in self.sampler.shares(step)
        )
        for step in range(first, stop):
            shares = self.sampler.shares(step)
            yield [
                Batch(tensor, share.counters)
                for tensor, share in zip(islice(images, len(shares)), shares, strict=True)
            ]
