"""SimCLR: two views of an image must find each other among the whole batch's views.

Chen et al. 2020, arXiv 2002.05709. The batch is that of all ranks: embeddings are gathered with gradient.
A pretext task may be added to it; on a ScatNet that is ScatSimCLR (Kinakh et al. 2021, arXiv 2108.13939).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.methods.base import OneNet, Progress, View
from pipeline.methods.collective import gather
from pipeline.methods.losses import nt_xent
from pipeline.methods.pretext import make_pretext
from pipeline.nets.backbone import Net
from pipeline.nets.heads import mlp


class SimCLR(OneNet):
    """NT-Xent on the projections of one backbone, and the pretext's loss on its features."""

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__(nets, options, image_size=image_size, seed=seed)
        net = self.backbone.headless()
        with self.seeded("projector"):
            self.projector = mlp(
                net.num_features, options["hidden"], options["out_dim"], bn=options["head_bn"]
            )
        with self.seeded("pretext"):
            self.pretext = make_pretext(net.num_features, options)

    @property
    def views(self) -> list[View]:
        turns = self.pretext.turns if self.pretext is not None else ()
        return [View("simclr", self.image_size)] * 2 + [
            View("simclr", self.image_size, turn=turn) for turn in turns
        ]

    def views_needed(self, progress: Progress) -> int:
        return len(self.views) if self._pretext_weight(progress) else 2

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        one, two = self._project(torch.cat(views[:2])).chunk(2)
        contrast = nt_xent(*gather(one, two), temperature=self.options["temperature"])
        if self.pretext is None:
            return {"loss": contrast}
        weight = self._pretext_weight(progress)
        if not weight:
            return {"loss": contrast + self.pretext.idle()}
        # A pass of its own: the contrast's batch statistics stay those of upright images.
        loss, accuracy = self.pretext(self.backbone, [views[0], *views[2:]])
        return {
            "loss": contrast + weight * loss,
            "loss_contrast": contrast.detach(),
            "loss_pretext": loss.detach(),
            "pretext_accuracy": accuracy,
        }

    def after_backward(self, progress: Progress) -> None:
        """Before its time the pretext's head gets no step: weight decay alone would wear it away."""
        if self.pretext is not None and not self._pretext_weight(progress):
            for parameter in self.pretext.parameters():
                parameter.grad = None

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        return {self.arch: self._project(images)}

    def _pretext_weight(self, progress: Progress) -> float:
        """λ: 0 at first, then constant."""
        if self.pretext is None:
            return 0.0
        options = self.options
        start = min(options["pretext_start_epochs"], options["pretext_start_share"] * progress.epochs)
        return options["pretext_weight"] if progress.epoch >= start else 0.0

    def _project(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone.features(images)).float()
