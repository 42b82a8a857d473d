"""What a backbone costs: parameters, and multiply-adds of one image."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.nets.backbone import Net
from pipeline.nets.scattering import Scattering


class Cost(TypedDict):
    """Parameters, and 10⁹ multiply-adds of one image: all, and those of a scattering transform alone."""

    params: int
    gmac: float
    scattering_gmac: float


def cost(net: Net, *, size: int | None = None) -> Cost:
    """Count a backbone's parameters and multiply-adds, without its classifier.

    Multiply-adds are those of convolutions, of matrix products, attention's among them, and of Fourier
    transforms (n points as 5·n·log₂(n)/2), in a forward pass of one image on the CPU, in eval mode; sums and
    activations are not counted.

    Args:
        net: it is copied, and left alone.
        size: side of the image in pixels; None: the net's own.
    """
    bare = copy.deepcopy(net).cpu().headless().eval()
    side = size or net.image_size
    fourier = {torch.ops.aten._fft_c2c: _fourier, torch.ops.aten._fft_r2c: _fourier}
    counter = FlopCounterMode(display=False, custom_mapping=fourier)
    counts: list[int] = []  # before and after each scattering transform
    for module in bare.modules():
        if isinstance(module, Scattering):
            module.register_forward_pre_hook(lambda *call: counts.append(counter.get_total_flops()))
            module.register_forward_hook(lambda *call: counts.append(counter.get_total_flops()))
    with (
        torch.no_grad(),
        counter,
        sdpa_kernel(SDPBackend.MATH),  # not every fused kernel of attention is known to the counter
    ):
        bare.features(torch.zeros(1, 3, side, side))
    return {
        "params": sum(parameter.numel() for parameter in bare.parameters()),
        "gmac": counter.get_total_flops() / 2e9,
        "scattering_gmac": (sum(counts[1::2]) - sum(counts[::2])) / 2e9,
    }


def _fourier(shape: Sequence[int], dims: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any) -> int:
    points = math.prod(shape[dim] for dim in dims)
    return round(5 * math.prod(shape) * math.log2(points))
