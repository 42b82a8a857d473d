"""Pretext tasks on a backbone's features: which way up an image was, or in which order its tiles come.

As ScatSimCLR (Kinakh et al. 2021, arXiv 2108.13939) adds them to its contrastive loss: rotation after Gidaris
et al. 2018 (arXiv 1803.07728), jigsaw after Noroozi and Favaro 2016 (arXiv 1603.09246).
"""

from __future__ import annotations

import functools
from itertools import chain, permutations
from math import factorial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nets.backbone import Net

TURNS = 4
GRID = 3  # tiles a side


class Pretext(nn.Module):
    """A classification whose labels come from the images themselves.

    Attributes:
        turns: quarter turns of the views that it asks for, beside those of its host.
    """

    turns: tuple[int, ...] = ()

    def forward(self, backbone: Net, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of one batch, and the share that is answered rightly.

        Args:
            backbone: gives the features; it gets the gradient too.
            views: the host's first view, then those of ``turns``; (B, 3, S, S) in [0, 1] each.
        """
        raise NotImplementedError

    def idle(self) -> Tensor:
        """0, with a gradient of zeros for every parameter: DDP wants them all in each step."""
        return sum((p.sum() for p in self.parameters()), start=torch.zeros(())) * 0


class Rotation(Pretext):
    """Tell which of four quarter turns an image was given before it was augmented.

    Args:
        in_dim: length of the features.
        hidden: widths of the head's two hidden layers.
        dropout: after each of them.
    """

    turns = tuple(range(TURNS))

    def __init__(self, in_dim: int, *, hidden: tuple[int, int] = (512, 128), dropout: float = 0.5) -> None:
        super().__init__()
        first, second = hidden
        self.head = nn.Sequential(
            nn.Linear(in_dim, first),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(second, TURNS),
        )

    def forward(self, backbone: Net, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        turned = views[1:]
        labels = torch.arange(TURNS, device=turned[0].device).repeat_interleave(len(turned[0]))
        return _classify(self.head(backbone.features(torch.cat(turned))), labels)


class Jigsaw(Pretext):
    """Tell in which of so many orders the nine tiles of an image come.

    Each tile, at the size of the whole image, goes through the net alone. The orders are drawn by torch's
    generator.

    Args:
        in_dim: length of the features.
        hidden: length of a tile's vector, and width of the layer on all nine.
        dropout: after both.
        count: orders to tell apart.
    """

    permutations: Tensor

    def __init__(
        self, in_dim: int, *, hidden: tuple[int, int] = (512, 4096), dropout: float = 0.5, count: int = 35
    ) -> None:
        super().__init__()
        tile, whole = hidden
        self.tile = nn.Sequential(nn.Linear(in_dim, tile), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Sequential(
            nn.Linear(tile * GRID**2, whole), nn.ReLU(), nn.Dropout(dropout), nn.Linear(whole, count)
        )
        self.register_buffer("permutations", torch.from_numpy(distant_permutations(GRID**2, count)))

    def forward(self, backbone: Net, views: list[Tensor]) -> tuple[Tensor, Tensor]:
        images = views[0]
        vectors = self.tile(backbone.features(tiles(images).flatten(0, 1))).unflatten(0, (len(images), -1))
        labels = torch.randint(len(self.permutations), (len(images),), device=images.device)
        shuffled = vectors.gather(1, self.permutations[labels].unsqueeze(2).expand_as(vectors))
        return _classify(self.head(shuffled.flatten(1)), labels)


def make_pretext(in_dim: int, options: dict[str, Any]) -> Pretext | None:
    """What the options ``pretext`` … of :class:`pipeline.methods.options.SimclrOptions` ask for."""
    if options["pretext"] == "none":
        return None
    given: dict[str, Any] = {"dropout": options["pretext_dropout"]}
    if options["pretext_hidden"] is not None:
        given["hidden"] = tuple(options["pretext_hidden"])
    if options["pretext"] == "rotation":
        return Rotation(in_dim, **given)
    return Jigsaw(in_dim, count=options["jigsaw_permutations"], **given)


def tiles(images: Tensor) -> Tensor:
    """(B, C, S, S) → (B, 9, C, S, S): the tiles row by row, each enlarged to the size of the image.

    Where three tiles do not fill a side, the pixels left over are cut off equally at both ends.
    """
    size = images.shape[-1]
    side = size // GRID
    margin = (size - GRID * side) // 2
    inner = images[..., margin : margin + GRID * side, margin : margin + GRID * side]
    cut = inner.unflatten(3, (GRID, side)).unflatten(2, (GRID, side)).permute(0, 2, 4, 1, 3, 5)
    large = F.interpolate(cut.flatten(0, 2), size=(size, size), mode="bilinear", align_corners=False)
    return large.unflatten(0, (len(images), GRID**2))


@functools.lru_cache(maxsize=1)
def distant_permutations(length: int, count: int) -> np.ndarray:
    """(count, length) int64: permutations that differ from each other in many places.

    The identity first; then each time one whose smallest Hamming distance to those before is largest, the
    first of these in lexicographic order.
    """
    places = chain.from_iterable(permutations(range(length)))
    every = np.fromiter(places, np.uint8, length * factorial(length)).reshape(-1, length).T.copy()
    chosen = [0]
    nearest = np.full(every.shape[1], length)
    for _ in range(count - 1):
        nearest = np.minimum(nearest, (every != every[:, chosen[-1:]]).sum(axis=0, dtype=np.uint8))
        chosen.append(int(nearest.argmax()))
    return every[:, chosen].T.astype(np.int64)


def _classify(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(scores.float(), labels)
    return loss, (scores.detach().argmax(1) == labels).float().mean()
