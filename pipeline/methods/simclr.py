"""SimCLR: two views of an image must find each other among the whole batch's views.

Chen et al. 2020, arXiv 2002.05709. The batch is that of all ranks: embeddings are gathered with gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.methods.base import OneNet, Progress, View
from pipeline.methods.collective import gather
from pipeline.methods.losses import nt_xent
from pipeline.nets.backbone import Net
from pipeline.nets.heads import mlp


class SimCLR(OneNet):
    """NT-Xent on the projections of one backbone."""

    def __init__(self, nets: dict[str, Net], options: dict[str, Any], *, image_size: int, seed: int) -> None:
        super().__init__(nets, options, image_size=image_size, seed=seed)
        net = self.backbone.headless()
        with self.seeded("projector"):
            self.projector = mlp(net.num_features, options["hidden"], options["out_dim"])

    @property
    def views(self) -> list[View]:
        return [View("simclr", self.image_size)] * 2

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        one, two = self._project(torch.cat(views)).chunk(2)
        return {"loss": nt_xent(*gather(one, two), temperature=self.options["temperature"])}

    @torch.no_grad()
    def embed(self, images: Tensor) -> dict[str, Tensor]:
        return {self.arch: self._project(images)}

    def _project(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone.features(images)).float()
