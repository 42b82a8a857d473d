"""BYOL: a net predicts, from one view, how its slow average projects another; no negatives.

Grill et al. 2020, arXiv 2006.07733.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.methods.base import OneNet, Progress, View, cosine_momentum, follow, slow_copy
from pipeline.methods.losses import cosine_distance
from pipeline.nets.backbone import Net
from pipeline.nets.heads import mlp


class Byol(OneNet):
    """Online net, projector and predictor; target net and projector. The online net is exported."""

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__(nets, options, image_size=image_size, seed=seed)
        net = self.backbone.headless()
        hidden, width = options["hidden"], options["out_dim"]
        with self.seeded("heads"):
            self.projector = mlp(net.num_features, hidden, width)
            self.predictor = mlp(width, hidden, width)
        self.target = slow_copy(net)
        self.target_projector = slow_copy(self.projector)

    @property
    def views(self) -> list[View]:
        return [View("byol_1", self.image_size), View("byol_2", self.image_size)]

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        with torch.no_grad():
            targets = [self.target_projector(self.target.features(view)) for view in views]
        predictions = [self._predict(view) for view in views]
        return {
            "loss": cosine_distance(predictions[0], targets[1]) + cosine_distance(predictions[1], targets[0])
        }

    def after_step(self, progress: Progress) -> None:
        momentum = cosine_momentum(self.options["momentum"], progress)
        follow(self.target, self.backbone, momentum)
        follow(self.target_projector, self.projector, momentum)

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        return {self.arch: self._predict(images).float()}

    def _predict(self, images: Tensor) -> Tensor:
        return self.predictor(self.projector(self.backbone.features(images)))
