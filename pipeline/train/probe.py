"""What the training looks at each few epochs: health of features and embeddings, and a k-NN classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import ImageSet
from pipeline.methods.base import Method
from pipeline.nets.backbone import Net, evaluating
from pipeline.train.health import describe
from pipeline.train.syncbn import batch_statistics

HEALTH_IMAGES = 512
KNN_TRAIN_IMAGES = 2_000  # a look at the trend, not a result: it must not cost a share of the training
KNN_VAL_IMAGES = 1_000
BATCH = 64
Score = Callable[
    [Tensor, np.ndarray, Tensor, np.ndarray], float
]  # train features, targets; validation the same


@dataclass
class Labelled:
    """Images with known targets: positions into an image set, and one target a position."""

    images: ImageSet
    positions: np.ndarray
    targets: np.ndarray


@dataclass
class Probe:
    """Evaluates backbones on fixed images, without augmentation.

    All ranks measure the health together, since the embeddings are taken with the batch statistics that the
    loss sees, and these may be over all ranks; rank 0 alone classifies.

    Attributes:
        images, positions: training images for the health numbers.
        autocast: the training's precision.
        score: k-NN accuracy from features and targets.
        initial_rank: effective rank of each net's features before the first step, by architecture; see
            :meth:`begin`.
        train, val: what the k-NN classifier votes with and is judged on; None: it is left out.
    """

    images: ImageSet
    positions: np.ndarray
    autocast: Callable[[], AbstractContextManager]
    score: Score
    train: Labelled | None = None
    val: Labelled | None = None
    initial_rank: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def begin(self, nets: Mapping[str, Net]) -> None:
        """Look at nets that have their initial weights, on the device."""
        for arch, net in nets.items():
            with evaluating(net):
                features = self._features(net, self.images, self.positions)
            self.initial_rank[arch] = describe(features)["effective_rank"]

    @torch.no_grad()
    def __call__(self, method: Method, nets: dict[str, Net]) -> dict[str, dict[str, Any]]:
        """Lines for the log: ``health`` and ``knn``, both by architecture.

        Both modules must be in eval mode; nothing in them is changed. Every rank calls this.
        """
        embeddings: dict[str, list[Tensor]] = {}
        with batch_statistics(method):
            for images in plain(self.images, self.positions):
                with self.autocast():
                    for arch, vectors in method.embed(images).items():
                        embeddings.setdefault(arch, []).append(vectors.float())
        health: dict[str, dict[str, float]] = {}
        for arch, net in nets.items():
            health[arch] = describe(self._features(net, self.images, self.positions))
            health[arch]["initial_effective_rank"] = self.initial_rank[arch]
            vectors = torch.cat(embeddings[arch])
            health[arch] |= {f"embedding_{name}": value for name, value in describe(vectors).items()}
        lines: dict[str, dict[str, Any]] = {"health": health}
        if self.train is not None and self.val is not None:
            lines["knn"] = {arch: self._knn(net, self.train, self.val) for arch, net in nets.items()}
        return lines

    def _knn(self, net: Net, train: Labelled, val: Labelled) -> float:
        known = self._features(net, train.images, train.positions)
        asked = self._features(net, val.images, val.positions)
        return self.score(known, train.targets, asked, val.targets)

    def _features(self, net: Net, images: ImageSet, positions: np.ndarray) -> Tensor:
        parts = []
        for batch in plain(images, positions):
            with self.autocast():
                parts.append(net.features(batch).float())
        return torch.cat(parts)


def plain(images: ImageSet, positions: np.ndarray) -> Iterator[Tensor]:
    """The images at these positions, in batches (B, 3, S, S) float in [0, 1]."""
    orders = [positions[start : start + BATCH] for start in range(0, len(positions), BATCH)]
    for batch in images.batches(orders):
        yield (batch.float() / 255).contiguous(memory_format=torch.channels_last)


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of ``range(count)``, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
