"""How fast the scattering transform is, beside kymatio's on the same images.

    python -m benchmarks scattering [--small] [--device cuda]

On a CPU it is this process's CPU time that counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio
from pipeline.nets.scattering import Scattering

CASES = ((96, 2, 8), (96, 2, 16), (32, 2, 16), (224, 2, 8))  # pixels, J, L
PAIRS = 9


def measure(size: int, J: int, L: int, *, device: torch.device, images: int, pairs: int) -> list[Figure]:
    """Milliseconds an image of each, and how many times as fast ours is."""
    batch = torch.rand(images, 3, size, size, device=device)
    ours = Scattering(J, L)
    theirs = ScatteringTorch2D(J=J, shape=(size, size), L=L).to(device)
    difference = (ours(batch) - theirs(batch).flatten(1, 2)).abs().max() / theirs(batch).abs().max()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    alternatives = {"ours": lambda: (ours(batch), wait()), "kymatio": lambda: (theirs(batch), wait())}
    wait()
    seconds = in_turn(alternatives, pairs, clock=clock)
    each = {who: statistics.median(times) * 1e3 / images for who, times in seconds.items()}
    aim = 10 if device.type == "cuda" else 3
    name = f"scattering {size} px, J {J}, L {L}"
    return [
        Figure(name, each["ours"], "ms"),
        Figure(f"{name}: kymatio", each["kymatio"], "ms"),
        Figure(f"{name}: times as fast", ratio(seconds["kymatio"], seconds["ours"]), "x", at_least=aim),
        Figure(f"{name}: difference", float(difference) * 1e6, "ppm", 1.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="one small case, to try it")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    images = 4 if device.type == "cpu" else 256
    figures = [
        figure
        for case in (CASES if not given.small else [(32, 1, 4)])
        for figure in measure(*case, device=device, images=images, pairs=2 if given.small else PAIRS)
    ]
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
