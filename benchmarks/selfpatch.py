"""What a step of SelfPatch costs beside one of DINO, with the same net, crops and batch.

    python -m benchmarks selfpatch [--batch N] [--rounds N] [--small]

ViT-S/16 at 224 px, 2 global and 8 local crops, the published head sizes; whole optimiser steps. Published:
1.54 with the patch loss on all crops, 1.25 on the global ones (arXiv 2206.07990).
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import ratio
from benchmarks.steps import Step, make_method, make_views, own_step, time_steps
from pipeline.methods.registry import METHODS
from pipeline.specs import Backbone, Training

PAPER: dict[str, Any] = {"net": {"name": "vit_small_patch16_224"}, "size": 224, "options": {}}
SMALL: dict[str, Any] = {
    "net": {
        "name": "vit_tiny_patch16_224",
        "args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "size": 32,
    "options": {"n_local": 2, "out_dim": 64, "hidden": 32, "bottleneck": 16},
}
RUNS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "dino": ("dino", {}, None),
    "all": ("selfpatch", {"patch_crops": "all"}, 1.54),
    "global": ("selfpatch", {"patch_crops": "global"}, 1.25),
}


def make_step(
    name: str, given: dict[str, Any], sizes: dict[str, Any], *, batch: int, device: torch.device
) -> Step:
    """One optimiser step on random images; on a GPU in bf16, as a training there is."""
    spec = METHODS["selfpatch"].with_args("vit", Backbone(**sizes["net"]))  # one net for both
    method = make_method(name, {"vit": spec}, sizes["options"] | given, size=sizes["size"])
    return own_step(method, make_views(method, batch, device), Training())


def measure(sizes: dict[str, Any], *, batch: int, rounds: int) -> list[Figure]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {
        label: make_step(name, given, sizes, batch=batch, device=device)
        for label, (name, given, _) in RUNS.items()
    }
    for step in steps.values():
        step()
    seconds = time_steps(steps, rounds, device)
    figures = [Figure("selfpatch: DINO's step", statistics.median(seconds["dino"]), "s")]
    for label, (name, _, aim) in RUNS.items():
        if name == "selfpatch":
            figures.append(
                Figure(f"selfpatch: {label} crops", ratio(seconds[label], seconds["dino"]), "x", aim)
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=2, help="images a step (default 2, for a CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a net of a few thousand weights, to try it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(SMALL if given.small else PAPER, batch=given.batch, rounds=given.rounds)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
