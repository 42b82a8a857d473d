"""What backbones cost: parameters, and multiply-adds of one image, beside each other.

    python -m benchmarks compute [NAME …] [--size 96]

A ScatNet has few parameters and many multiply-adds: its feature maps keep a quarter of the image's side to
the end. Its scattering is counted apart; of that, filtering and moduli are not counted, as activations are
not elsewhere.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.figures import RESULTS, Figure, report
from pipeline.nets.backbone import create_backbone
from pipeline.nets.cost import cost
from pipeline.specs import Backbone

NAMES = ("scatnet8", "scatnet12", "scatnet16", "scatnet30", "resnet18", "resnet50")


def compute(name: str, *, size: int, args: dict[str, Any] | None = None) -> list[Figure]:
    """Of a backbone without a classifier, for one image of so many pixels a side."""
    found = cost(create_backbone(Backbone(name=name, args=args or {}), size, seed=0))
    scattering = found["scattering_gmac"]
    figures = [
        Figure(f"{name}: parameters", found["params"] / 1e6, "M"),
        Figure(f"{name}: {size} px", found["gmac"] - scattering, "GMAC"),
    ]
    return figures + [Figure(f"{name}: {size} px, scattering", scattering, "GMAC")] * bool(scattering)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", default=NAMES, help="of timm models, ours among them")
    parser.add_argument("--size", type=int, default=96, help="side of the image in pixels")
    given = parser.parse_args()
    figures = [figure for name in given.names for figure in compute(name, size=given.size)]
    report(figures, append_to=RESULTS if tuple(given.names) == NAMES else None)


if __name__ == "__main__":
    main()
