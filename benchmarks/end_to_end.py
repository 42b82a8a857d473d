"""How much of the speed of a bare step a pretraining keeps, with reading, augmenting, logging and the rest.

    python -m benchmarks end_to_end [--method cass_plus] [--nets small|large] [--steps N]
        [--compile|--graphs] [--small]

The loop of a pretraining over a cached set against the same loop on views that lie on the device. ``small``:
resnet10t and a small ViT at 32 px, batch 64; ``large``: ResNet-50 and ViT-B/16 at 224 px, batch 4 (on a GPU
64).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import shards
from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio, wait
from benchmarks.pictures import write_folder
from benchmarks.steps import make_method
from pipeline.data.feed import Batch, IndexedFeed
from pipeline.data.images import ImageSet
from pipeline.data.sampler import EpochSampler
from pipeline.specs import Backbone, Training
from pipeline.train.distributed import World
from pipeline.train.loop import Loop
from pipeline.train.profiling import NoProfile

TINY_VIT = {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}
NETS: dict[str, dict[str, Any]] = {
    "small": {
        "backbones": {
            "cnn": Backbone(name="resnet10t"),
            "vit": Backbone(name="vit_tiny_patch16_224", args=TINY_VIT),
        },
        "size": 32,
        "batch": 64,
    },
    "large": {
        "backbones": {"cnn": Backbone(name="resnet50"), "vit": Backbone(name="vit_base_patch16_224")},
        "size": 224,
        "batch": 64 if torch.cuda.is_available() else 4,
    },
}
KEPT = 0.97
BATCHES = 4  # an epoch
WARM_UP = 5  # steps: kernels are chosen or compiled, images decoded


class Stopwatch(NoProfile):
    """Seconds from the end of the first ``warm_up`` steps to that of all ``steps``."""

    def __init__(self, warm_up: int, steps: int, device: torch.device) -> None:
        self.marks, self.device, self.done = (warm_up, steps), device, 0
        self.times: list[float] = []

    def step_done(self) -> None:
        self.done += 1
        if self.done in self.marks:
            wait(self.device)
            self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        began, ended = self.times
        return ended - began


class Still:
    """A feed of one batch, and views of it that were made before."""

    def __init__(self, n: int, batch: Batch, views: list[Tensor]) -> None:
        self.n, self.batch, self.made = n, batch, views

    def cut(self, accumulate: int) -> None:
        assert accumulate == 1

    def steps(self, first: int, stop: int) -> Iterator[list[Batch]]:
        return ([self.batch] for _ in range(first, stop))

    def views(self, batch: Batch, count: int | None = None) -> list[Tensor]:
        return self.made[:count]


def measure(
    method: str,
    nets: str,
    folder: Path,
    *,
    steps: int,
    rounds: int,
    batch: int | None = None,
    compiled: Any = False,
) -> list[Figure]:
    """Images a second of both, and the share that is kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = NETS[nets]
    size, batch = chosen["size"], batch or chosen["batch"]
    write_folder(folder / "images", BATCHES * batch, width=2 * size, height=2 * size)
    index = shards.write(shards.FolderSource(folder / "images"), folder / "shards")
    images = ImageSet(index, np.arange(len(index.samples)), image_size=size, device=device)
    training = Training(
        epochs=(WARM_UP + steps) * batch / len(images),
        batch_size=batch,
        image_size=size,
        probe_epochs=None,
        compile=compiled,
    )

    spent = 0.0
    runs = itertools.count()

    def run(*, still: bool) -> None:
        nonlocal spent
        feed: Any = IndexedFeed(images, EpochSampler(len(images), batch_size=batch, seed=0))
        place = folder / f"run{next(runs)}"
        place.mkdir()
        loop = Loop(
            make_method(method, chosen["backbones"], {}, size=size),
            feed,
            training=training,
            world=World(device=device),
            folder=place,
            seed=0,
            data="benchmark",
        )
        if still:
            ((first,),) = feed.steps(0, 1)
            still_feed = Still(len(images), first, loop.views(first))
            loop.feed, loop.stepper.views = still_feed, still_feed.views  # type: ignore[assignment]
        watch = Stopwatch(WARM_UP, WARM_UP + steps, device)
        loop.profile = watch
        loop.run()
        spent += watch.seconds

    seconds = in_turn(
        {"real": partial(run, still=False), "bare": partial(run, still=True)}, rounds, clock=lambda: spent
    )
    real, bare = seconds["real"], seconds["bare"]
    way = {True: ", compiled", "graphs": ", graphs"}.get(compiled, "")
    name = f"end to end {method} {nets}, {size} px, batch {batch}{way}"
    seen = steps * batch
    return [
        Figure(name, seen / statistics.median(real), "images/s"),
        Figure(f"{name}: bare step", seen / statistics.median(bare), "images/s"),
        Figure(f"{name}: share kept", ratio(bare, real), "", at_least=KEPT),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--method", default="cass_plus")
    parser.add_argument("--nets", choices=NETS, default="small")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=20, help="of a run, after the first few")
    parser.add_argument("--rounds", type=int, default=5, help="of a run of each")
    parser.add_argument("--compile", action="store_true", help="the nets, as train.compile does")
    parser.add_argument("--graphs", action="store_true", help="the same, with CUDA graphs")
    parser.add_argument("--small", action="store_true", help="two steps, to try it")
    given = parser.parse_args()
    steps, rounds = (2, 1) if given.small else (given.steps, given.rounds)
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
        figures = measure(
            given.method,
            given.nets,
            Path(folder),
            steps=steps,
            rounds=rounds,
            batch=given.batch,
            compiled="graphs" if given.graphs else given.compile,
        )
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
