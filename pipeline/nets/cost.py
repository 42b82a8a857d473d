"""What a backbone costs, without running it."""

from __future__ import annotations

import copy
from typing import TypedDict

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.nets.backbone import Net


class Cost(TypedDict):
    """Parameters, and 10⁹ multiply-adds of one image."""

    params: int
    gmac: float


def cost(net: Net) -> Cost:
    """Count a backbone's parameters and multiply-adds, without its classifier.

    Multiply-adds are those of convolutions and matrix products, attention's among them, in a forward pass of
    one image at the net's image size, in eval mode; sums, activations and Fourier transforms are not counted.
    The net is not run: shapes alone are passed through a copy, so that the count is the same on every device.
    """
    bare = copy.deepcopy(net).cpu().headless().eval()
    with (
        torch.no_grad(),
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # not every fused kernel of attention is known to the counter
    ):
        image = torch.empty(1, 3, net.image_size, net.image_size)
        Net.features(bare, image)  # of the class: an instance's own may be compiled for the weights it had
    params = sum(parameter.numel() for parameter in bare.parameters())
    return {"params": params, "gmac": counter.get_total_flops() / 2e9}
