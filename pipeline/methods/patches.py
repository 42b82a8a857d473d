"""Agreement of a CNN's feature map with a ViT's patch grid, place by place.

What the neighbours of CASS learn from patches (SelfPatch, arXiv 2206.07990; dense contrastive learning,
arXiv 2011.09157), across two architectures: both nets see the same view, so the same place of both maps
shows the same part of the image.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.methods.collective import gather
from pipeline.methods.losses import info_nce
from pipeline.nets.backbone import Net

PLACES = 4  # drawn of each image: more of them are neighbours, which are hardly negatives for each other


class PatchAgreement(nn.Module):
    """InfoNCE between the two nets' vectors of one place, against those of other places and images.

    Args:
        cnn, vit: the nets; the finer of their maps is averaged over the cells of the coarser one.
        options: ``projector_hidden``, ``projector_dim`` and ``temperature``.
    """

    def __init__(self, cnn: Net, vit: Net, options: dict[str, Any]) -> None:
        super().__init__()
        hidden, width = options["projector_hidden"], options["projector_dim"]
        self.temperature: float = options["temperature"]
        self.heads = nn.ModuleDict(
            {
                arch: nn.Sequential(nn.Linear(net.map_channels, hidden), nn.GELU(), nn.Linear(hidden, width))
                for arch, net in (("cnn", cnn), ("vit", vit))
            }
        )

    def forward(self, cnn: Tensor, vit: Tensor) -> Tensor:
        """(B, C, h, w) and (B, D, g, g) → scalar."""
        side = min(cnn.shape[-1], vit.shape[-1])
        places = torch.rand(len(cnn), side * side, device=cnn.device).argsort(dim=1)[:, :PLACES]
        vectors = [self._project(arch, one, side, places) for arch, one in (("cnn", cnn), ("vit", vit))]
        return info_nce(*gather(*vectors), temperature=self.temperature)

    def _project(self, arch: str, features: Tensor, side: int, places: Tensor) -> Tensor:
        """(B · places, width) float32."""
        tokens = F.adaptive_avg_pool2d(features, side).flatten(2).transpose(1, 2)
        chosen = tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))
        return self.heads[arch](chosen.flatten(0, 1)).float()
