"""The controls: the initial weights as they are, and the same with only BatchNorm statistics refreshed."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.methods.base import OneNet, Progress, View


class Supervised(OneNet):
    """No pretraining: what fine-tuning starts from is the random, ImageNet or given weights."""

    @property
    def views(self) -> list[View]:
        """None: there is nothing to train on."""
        return []

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Nothing is learnt: the loss is 0."""
        return {"loss": torch.zeros((), device=next(self.parameters()).device)}

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """The features: no other vector exists here."""
        return {self.arch: self.backbone.features(images).float()}


class BatchNormRefresh(Supervised):
    """Forward passes in training mode without an optimiser step: only BatchNorm's running statistics move.

    Feeding a net its own images changes those statistics, and with them its features, without learning
    anything. A method that ends no better than this has learnt nothing either.
    """

    @property
    def views(self) -> list[View]:
        return [View("cass", self.image_size)]

    @torch.no_grad()
    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: one tensor (B, 3, S, S); the loss is 0."""
        self.backbone.features(views[0])
        return super().forward(views, progress)
