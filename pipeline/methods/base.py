"""The contract between a method and the training loop, and what methods with a slow teacher share.

A method is an ``nn.Module`` that says which views it wants, turns them into a loss, updates its own
teacher after each optimiser step, and names the backbones to export. It knows no files, clusters or loops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.nets.backbone import Net
from pipeline.nets.seeding import seeded

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class View:
    """One tensor that the loop makes of each image.

    Attributes:
        recipe: a recipe of ``pipeline.data.augment``, unless the training settings name another.
        size: side in pixels.
        turn: quarter turns, anticlockwise, that the image is given before anything else.
    """

    recipe: str
    size: int
    turn: int = 0


@dataclass(frozen=True)
class Progress:
    """Where the training stands.

    Attributes:
        step: optimiser step, from 0; during ``after_step``, the one just taken.
        steps: of the whole training.
        epoch: fractional, from 0.
        epochs: of the whole training.
    """

    step: int
    steps: int
    epoch: float
    epochs: float

    @property
    def share(self) -> float:
        """0 at the first step, 1 at the last."""
        return min(1.0, self.step / max(1, self.steps - 1))


class Method(nn.Module):
    """Base class of all methods.

    Args:
        nets: one backbone an architecture; both for a joint method.
        options: complete, from ``pipeline.methods.registry.resolve_options``.
        image_size: side of the full views in pixels.
        seed: of the weights that the method adds.
    """

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__()
        self.options = options
        self.image_size = image_size
        self.seed = seed
        self.nets = nn.ModuleDict(nets)

    @property
    def views(self) -> list[View]:
        """The views that ``forward`` takes, in order."""
        raise NotImplementedError

    def views_needed(self, progress: Progress) -> int:
        """How many of the views, counted from the first, ``forward`` is given now."""
        return len(self.views)

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """One (micro-)batch.

        Args:
            views: a tensor (B, 3, size, size) in [0, 1] for each of ``self.views`` that is needed.
            progress: where the training stands.

        Returns:
            ``loss``, a float32 scalar, and other detached scalars to log.
        """
        raise NotImplementedError

    def after_backward(self, progress: Progress) -> None:
        """Called when gradients are complete, before clipping and the optimiser's step."""

    def after_step(self, progress: Progress) -> None:
        """Called after the optimiser's step."""

    def exported(self) -> dict[str, Net]:
        """The backbones to export and to probe, by architecture."""
        return {arch: net for arch, net in self.nets.items() if isinstance(net, Net)}

    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """The vectors that enter the loss, by architecture, for the health monitor.

        images: (B, 3, image_size, image_size) in [0, 1] → (B, D) float32 each, without gradient.
        The caller chooses between ``train`` and ``eval`` mode.
        """
        raise NotImplementedError

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether a parameter is spared weight decay: biases, and gains of normalisations."""
        return parameter.ndim <= 1 or name.endswith(".bias")

    def seeded(self, purpose: str) -> AbstractContextManager[None]:
        """A context in which new weights depend on the method's seed and this word alone."""
        return seeded(self.seed, purpose)


class OneNet(Method):
    """Base of the methods that train one backbone a run.

    Raises:
        UserError: not exactly one backbone was given.
    """

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        if len(nets) != 1:
            name = type(self).__name__
            raise UserError(f"{name} trains one backbone a run, got {', '.join(nets) or 'none'}")
        super().__init__(nets, options, image_size=image_size, seed=seed)
        (self.arch,) = nets

    @property
    def backbone(self) -> Net:
        """The net that is trained."""
        net = self.nets[self.arch]
        assert isinstance(net, Net)
        return net


class Search(Method):
    """Base of what trains several values of an option side by side, to see which is best."""

    def rank(self, batches: Iterable[Tensor], progress: Progress) -> list[dict[str, Any]]:
        """Judge the candidates, the best first. Called in eval mode, on rank 0 alone.

        Args:
            batches: held-out images, each (B, 3, image_size, image_size) in [0, 1].
            progress: where the training ended.

        Returns:
            For each ``candidate`` (the option's value) the numbers it was judged by.
        """
        raise NotImplementedError


def slow_copy(module: M) -> M:
    """A teacher: the same weights, no gradients, no dropout and no dropped paths.

    It stays in the mode (train or eval) that its owner is put in, so that its batch normalisations use and
    track its own batches; only parameters follow the student.
    """
    teacher = copy.deepcopy(module)
    for part in teacher.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, DropPath):
            part.drop_prob = 0.0
    return teacher.requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, over the parameters.

    Students are the same on every rank after a synchronised step, and so are their teachers.
    """
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


def cosine_momentum(start: float, progress: Progress) -> float:
    """From ``start`` at the first step to 1 at the last, along half a cosine (BYOL, DINO)."""
    return 1 - (1 - start) * (math.cos(math.pi * progress.share) + 1) / 2
