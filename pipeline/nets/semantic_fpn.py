"""Semantic FPN: a backbone's pyramid of features, and a class for every place of it at stride 4."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from pipeline.nets.backbone import Net
from pipeline.nets.pyramid import STRIDES, Pyramid

GROUPS = 32  # of group normalisation; fewer in a narrower branch, of at least four channels


class SemanticFPN(nn.Module):
    """The segmentation branch of Kirillov et al. 2019 (Panoptic Feature Pyramid Networks, arXiv 1901.02446).

    On each level of a feature pyramid stand as many stages of 3 × 3 convolution, group normalisation, ReLU
    and 2 × bilinear upsampling as it takes to come to stride 4 (one without upsampling at stride 4); their
    sum is classified by a 1 × 1 convolution.

    Args:
        net: the backbone.
        num_classes: K.
        width: channels of the feature pyramid, 256 in the paper; the branch has half as many, as there.
    """

    def __init__(self, net: Net, *, num_classes: int, width: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(net)
        self.fpn = FeaturePyramidNetwork(list(self.pyramid.channels), width)
        inner = max(1, width // 2)
        self.branches = nn.ModuleList(_Branch(width, inner, stages=max(1, n)) for n in range(len(STRIDES)))
        self.classifier = nn.Conv2d(inner, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W) float in [0, 1] → logits (B, K, ⌈H / 4⌉, ⌈W / 4⌉)"""
        maps = self.pyramid(images)
        found = list(self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps))).values())
        sizes = [x.shape[-2:] for x in found]
        total = self.branches[0](found[0], sizes[:1])
        for n in range(1, len(found)):
            total = total + self.branches[n](found[n], sizes[n - 1 :: -1])
        return self.classifier(total)


class _Branch(nn.Module):
    """Stages of convolution, each followed by upsampling to the next finer level."""

    def __init__(self, channels: int, inner: int, *, stages: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels if number == 0 else inner, inner, kernel_size=3, padding=1, bias=False),
                nn.GroupNorm(max(1, math.gcd(4 * GROUPS, inner) // 4), inner),
                nn.ReLU(inplace=True),
            )
            for number in range(stages)
        )

    def forward(self, x: Tensor, sizes: list[torch.Size]) -> Tensor:
        """x: (B, channels, h, w); sizes: (height, width) after each stage → (B, inner, *sizes[-1])"""
        for stage, size in zip(self.stages, sizes):
            x = stage(x)
            if x.shape[-2:] != size:
                x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return x
