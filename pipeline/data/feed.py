"""What the training loop reads: for every step, this rank's images and the counters to augment them by."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import NamedTuple, Protocol

import numpy as np
import torch

from pipeline.batches import rank_share
from pipeline.data.images import ImageSet, Loader
from pipeline.data.sampler import EpochSampler
from shards import stream


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

    def cut(self, accumulate: int) -> None:
        """From now on, cut this rank's share of a step into so many batches."""
        ...

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

    def cut(self, accumulate: int) -> None:
        """See :class:`Feed`."""
        self.sampler.cut(accumulate)

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


class StreamedFeed:
    """Shards read from start to end, shuffled in a buffer: for sets too large for random access.

    :func:`shards.stream` gives every rank the same number of samples an epoch, whatever the shards; a rank
    strings its epochs together as :class:`EpochSampler` does. So no rank waits for one that has run out,
    and a step's number says where to go on, at the price of reading up to it in its epoch (without
    decoding).

    Args:
        images: the rows of the split, without a cache; it decodes, and says how large and where to.
        split: of the shard folder.
        batch_size: of a step, over all ranks and accumulations.
        rank, world_size, accumulate: as for :class:`EpochSampler`.
        seed: of the order of the shards and of the shuffling.
        shuffle_buffer: samples held for shuffling, as bytes.
    """

    def __init__(
        self,
        images: ImageSet,
        split: str,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 1000,
    ) -> None:
        self.images, self.split = images, split
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self.n = len(images)
        self.cut(accumulate)

    def cut(self, accumulate: int) -> None:
        """See :class:`Feed`."""
        self.share = rank_share(self.batch_size, world_size=self.world_size, accumulate=accumulate)
        self.accumulate = accumulate

    def steps(self, first: int, stop: int) -> Iterator[list[Batch]]:
        """See :class:`Feed`."""
        samples = self._samples(first * self.accumulate * self.share)
        waiting: deque[torch.Tensor] = deque()

        decode = partial(self.images.index.decode_small_bytes, at_least=self.images.image_size)

        def loaders() -> Iterator[list[Loader]]:
            for _ in range((stop - first) * self.accumulate):
                chunk = list(islice(samples, self.share))
                waiting.append(torch.tensor([counter for counter, _ in chunk]))
                yield [partial(decode, data) for _, data in chunk]

        decoded = self.images.decoded(loaders())
        for _ in range(first, stop):
            yield [Batch(images, waiting.popleft()) for images in islice(decoded, self.accumulate)]

    def _samples(self, position: int) -> Iterator[tuple[int, bytes]]:
        """This rank's endless sequence from a position on: counters and image files."""
        epoch, skip = divmod(position, -(-self.n // self.world_size))
        for number in count(epoch):
            samples = stream(
                self.images.index.folder,
                self.split,
                rank=self.rank,
                world_size=self.world_size,
                epoch=number,
                seed=self.seed,
                shuffle_buffer=self.shuffle_buffer,
            )
            for row, data in islice(samples, skip, None):
                yield number * self.n + int(np.searchsorted(self.images.rows, row)), data
            skip = 0
