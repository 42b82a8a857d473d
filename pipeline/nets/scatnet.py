"""ScatNets: residual networks on the scattering transform of the image, as models of timm.

Kinakh et al. 2021 (ScatSimCLR), arXiv 2108.13939. Importing this module registers them, so that
``timm.create_model("scatnet12")`` and ``timm.create_model("local-dir:FOLDER", pretrained=True)`` know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.nets.scattering import Scattering

_POOLED = 4  # side of the map that becomes the feature vector


class ScatNet(nn.Module):
    """Scattering, a convolution, residual blocks of one resolution, a 4 x 4 average pool, a classifier.

    Args:
        stem: channels of the first convolution.
        stages: (channels, number of blocks), one after the other.
        J, L: scales and orientations of the scattering; feature maps are 2^J times smaller than the image.
        in_chans: colour channels.
        num_classes: outputs of the classifier; 0: none.
        drop_rate: dropout before the classifier.

    Attributes:
        num_features: channels of the feature map.
        head_hidden_size: length of the feature vector, 16 times as much.
        feature_info: a feature map a block, for ``forward_intermediates`` and ``features_only``.
    """

    def __init__(
        self,
        *,
        stem: int,
        stages: Sequence[Sequence[int]],
        J: int = 2,
        L: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.scattering = Scattering(J, L)
        self.conv1 = nn.Conv2d(in_chans * self.scattering.channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU(inplace=True)
        blocks, before = [], stem
        for width, depth in stages:
            for _ in range(depth):
                blocks.append(_block(before, width))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = [
            {"num_chs": block.conv2.out_channels, "reduction": 2**J, "module": f"blocks.{number}"}
            for number, block in enumerate(blocks)
        ]
        self.num_features = before
        self.head_hidden_size = before * _POOLED**2
        self.pool = nn.AdaptiveAvgPool2d(_POOLED)
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier; none (the identity) for 0 classes."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """x: (B, in_chans, H, W), normalised → (B, num_features, ⌊H/2^J⌋, ⌊W/2^J⌋)"""
        stem = self._stem(x)
        return checkpoint_seq(self.blocks, stem) if self._recomputes else self.blocks(stem)

    @property
    def _recomputes(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations within the blocks: the backward pass computes them again."""
        self.grad_checkpointing = enable

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The feature map → (B, num_classes), or (B, head_hidden_size) where that is 0 or with pre_logits."""
        x = F.dropout(self.pool(x).flatten(1), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's: the feature maps after some blocks, and the last one before them unless told otherwise.

        Args:
            indices: of the blocks; a number: the last so many; None: all.
            norm: changes nothing, there is none to apply.
        """
        assert output_fmt == "NCHW", "ScatNets have feature maps in the format NCHW only"
        taken, last = feature_take_indices(len(self.blocks), indices)
        x = self._stem(x)
        found = []
        for number, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self._recomputes else block(x)
            if number in taken:
                found.append(x)
        return found if intermediates_only else (x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's: drop the blocks after the last of ``indices``, and the classifier."""
        taken, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def _stem(self, x: Tensor) -> Tensor:
        return self.act1(self.bn1(self.conv1(self.scattering(x).to(x.dtype))))


def _block(before: int, width: int) -> BasicBlock:
    """Two 3 x 3 convolutions round a shortcut, which is a 1 x 1 convolution where the channels change."""
    shortcut = None
    if before != width:
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(before, width, downsample=shortcut)


_CFG = {
    "num_classes": 1000,
    "input_size": (3, 96, 96),
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": None,
    "classifier": "fc",
    "license": "apache-2.0",
}
_NAMES = ("scatnet8", "scatnet12", "scatnet16", "scatnet30", "test_scatnet")
default_cfgs = generate_default_cfgs({f"{name}.untrained": _CFG for name in _NAMES})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ScatNet:
    blocks = sum(depth for _, depth in kwargs["stages"])
    feature_cfg = {"out_indices": tuple(range(blocks)), "feature_cls": "getter"}
    return build_model_with_cfg(ScatNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def scatnet8(pretrained: bool = False, **kwargs: Any) -> ScatNet:
    """8 blocks: 4 of 64 channels, 4 of 128."""
    return _create("scatnet8", pretrained, **{"stem": 32, "stages": ((64, 4), (128, 4))} | kwargs)


@register_model
def scatnet12(pretrained: bool = False, **kwargs: Any) -> ScatNet:
    """12 blocks: 4 of 128 channels, 4 of 64, 4 of 128."""
    stages = ((128, 4), (64, 4), (128, 4))
    return _create("scatnet12", pretrained, **{"stem": 256, "stages": stages} | kwargs)


@register_model
def scatnet16(pretrained: bool = False, **kwargs: Any) -> ScatNet:
    """16 blocks: 6 of 128 channels, 4 of 64, 6 of 128."""
    stages = ((128, 6), (64, 4), (128, 6))
    return _create("scatnet16", pretrained, **{"stem": 256, "stages": stages} | kwargs)


@register_model
def scatnet30(pretrained: bool = False, **kwargs: Any) -> ScatNet:
    """30 blocks of 128 channels."""
    return _create("scatnet30", pretrained, **{"stem": 256, "stages": ((128, 30),)} | kwargs)


@register_model
def test_scatnet(pretrained: bool = False, **kwargs: Any) -> ScatNet:
    """2 blocks on 4 orientations, for tests: 16,000 parameters."""
    return _create("test_scatnet", pretrained, **{"stem": 16, "stages": ((8, 1), (16, 1)), "L": 4} | kwargs)
