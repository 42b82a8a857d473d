"""What a backbone costs: parameters and multiply-adds."""

from __future__ import annotations

import copy
from typing import Any, TypedDict

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pipeline.nets.backbone import Net


class Cost(TypedDict):
    """Parameters, and 10⁹ multiply-adds of one image."""

    params: int
    gmac: float


def cost(net: Net) -> Cost:
    """Count a backbone's parameters and multiply-adds, without its classifier.

    Multiply-adds are those of convolutions and matrix products, attention's among them, in a forward pass of
    one image at the net's image size, in eval mode; sums, activations and Fourier transforms are not counted.
    A copy runs on the CPU, so that the count is the same whatever the net is on.
    """
    bare = copy.deepcopy(net).cpu().headless().eval()
    image = torch.zeros(1, 3, net.image_size, net.image_size)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
        Net.features(bare, image)  # of the class: an instance's own may be compiled
    params = sum(parameter.numel() for parameter in bare.parameters())
    return {"params": params, "gmac": counter.get_total_flops() / 2e9}


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *ignored: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


# The CPU's fused kernel; not every version of torch counts it by itself.
_FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
