"""What backbones cost: parameters, and multiply-adds of one image, beside each other.

    python -m benchmarks.compute [NAME …] [--size 96]

A ScatNet has few parameters and many multiply-adds: its feature maps keep a quarter of the image's side to
the end. Its scattering is counted apart: products as multiply-adds, a Fourier transform of n points as
5·n·log₂(n)/2 of them; filtering and moduli are not counted, as activations are not elsewhere.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import RESULTS, Figure, report
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone

NAMES = ("scatnet8", "scatnet12", "scatnet16", "scatnet30", "resnet18", "resnet50")


def compute(name: str, *, size: int, args: dict[str, Any] | None = None) -> list[Figure]:
    """Of a backbone without a classifier, for one image of so many pixels a side."""
    net = create_backbone(Backbone(name=name, args=args or {}), size, seed=0).headless().eval()
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._fft_c2c: _fourier,
            torch.ops.aten._fft_r2c: _fourier,
        },
    )
    with counter, torch.no_grad():
        net.logits(torch.zeros(1, 3, size, size))
    counts = {module: sum(flops.values()) / 2e9 for module, flops in counter.get_flop_counts().items()}
    scattering = sum(gmac for module, gmac in counts.items() if module.endswith(".scattering"))
    found = [
        Figure(f"{name}: parameters", sum(p.numel() for p in net.parameters()) / 1e6, "M"),
        Figure(f"{name}: {size} px", counts["Global"] - scattering, "GMAC"),
    ]
    return [*found, Figure(f"{name}: {size} px, scattering", scattering, "GMAC")] if scattering else found


def _fourier(shape: Sequence[int], dims: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any) -> int:
    points = math.prod(shape[dim] for dim in dims)
    return round(5 * math.prod(shape) * math.log2(points))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", default=NAMES, help="of timm models, ours among them")
    parser.add_argument("--size", type=int, default=96, help="side of the image in pixels")
    given = parser.parse_args()
    figures = [figure for name in given.names for figure in compute(name, size=given.size)]
    report(figures, append_to=RESULTS if tuple(given.names) == NAMES else None)


if __name__ == "__main__":
    main()
