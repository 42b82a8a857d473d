"""Feature maps at strides 4, 8, 16 and 32 from any backbone: what heads for pixels and boxes stand on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.nets.backbone import Net, evaluating

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """A backbone, and what brings its feature maps to the four strides.

    A stride gets the map whose own stride is nearest. Strides that share one divide its depth evenly: a ViT's
    get the tokens after 1/4, 1/2, 3/4 and all of its blocks (through its final norm, as Caron et al. 2021,
    arXiv 2104.14294, take them), a ResNet's one stage each. A map of another stride is then upsampled by
    transposed convolutions or downsampled by a maximum, as Li et al. 2022 (ViTDet, arXiv 2203.16527) do.
    Which maps there are is found out by a forward pass of one black image, so that it works for any timm
    model. A model without intermediate maps gives its last one to every level.

    Args:
        net: the backbone; its classifier is not used, and had better be dropped (``num_classes=0``).

    Attributes:
        net: the backbone.
        channels: of the four maps.

    Raises:
        UserError: the backbone has no feature map.
    """

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self._norm = True
        with _looking_at(net) as image:
            if hasattr(net.net, "forward_intermediates"):
                try:
                    found = self._intermediates(image, None)
                except (AssertionError, TypeError):  # a model that will not norm what is not its last map
                    self._norm = False
                    found = self._intermediates(image, None)
            else:
                found = [last_map(net, image)]
        self._taken = _choose(_strides_of(found, net, image), STRIDES)
        self.channels = tuple(found[taken].shape[1] for taken, _ in self._taken)
        self.resample = nn.ModuleList(
            _resample(channels, power) for channels, (_, power) in zip(self.channels, self._taken)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W) float in [0, 1] → four maps (B, channels[i], ⌈H / stride⌉, ⌈W / stride⌉)"""
        if hasattr(self.net.net, "forward_intermediates"):
            wanted = sorted({taken for taken, _ in self._taken})
            found = dict(zip(wanted, self._intermediates(images, wanted)))
        else:
            found = {0: last_map(self.net, images)}
        maps = []
        for stride, (taken, _), resample in zip(STRIDES, self._taken, self.resample):
            size = [math.ceil(side / stride) for side in images.shape[-2:]]
            level = resample(found[taken])
            if list(level.shape[-2:]) != size:  # patches of 14 pixels, or convolutions without padding
                level = F.interpolate(level, size=size, mode="bilinear", align_corners=False)
            maps.append(level)
        return maps

    def _intermediates(self, images: Tensor, indices: list[int] | None) -> list[Tensor]:
        norm = {"norm": True} if self._norm else {}
        return self.net.net.forward_intermediates(
            self.net.normalise(images), indices=indices, output_fmt="NCHW", intermediates_only=True, **norm
        )


def last_map(net: Net, images: Tensor) -> Tensor:
    """:meth:`Net.feature_map`, where there is one.

    Args:
        images: (B, 3, H, W) float in [0, 1].

    Returns:
        (B, C, h, w).

    Raises:
        UserError: the backbone has none.
    """
    try:
        return net.feature_map(images)
    except AttributeError:
        raise UserError(f"backbone '{net.name}' gives no feature map, which this protocol needs") from None


@contextmanager
def _looking_at(net: Net) -> Iterator[Tensor]:
    """A black image of the size that the net was built for; inside, the net neither learns nor counts."""
    with torch.no_grad(), evaluating(net):
        yield next(net.parameters()).new_zeros(1, 3, net.image_size, net.image_size)


def _strides_of(maps: list[Tensor], net: Net, image: Tensor) -> list[float]:
    """By the model's own account, or where it has none by the maps' sizes."""
    info = list(getattr(net.net, "feature_info", ()))
    if len(info) == len(maps):
        return [float(entry["reduction"]) for entry in info]
    return [image.shape[-1] / found.shape[-1] for found in maps]


def _choose(found: list[float], wanted: tuple[int, ...]) -> list[tuple[int, int]]:
    """For each wanted stride: the number of a map, and the power of two by which it is to grow."""
    nearest = [min(found, key=lambda have: abs(math.log2(have / stride))) for stride in wanted]
    chosen = []
    for place, (stride, have) in enumerate(zip(wanted, nearest)):
        same = [number for number, other in enumerate(found) if other == have]
        part = (nearest[: place + 1].count(have)) / nearest.count(have)
        chosen.append((same[math.ceil(part * len(same)) - 1], round(math.log2(have / stride))))
    return chosen


def _resample(channels: int, power: int) -> nn.Module:
    """Makes a map 2^power times as large."""
    if power <= 0:
        return nn.MaxPool2d(2**-power, ceil_mode=True) if power else nn.Identity()
    layers: list[nn.Module] = []
    for step in range(power):
        if step:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2))
    return nn.Sequential(*layers)
