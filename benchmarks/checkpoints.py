"""What checkpoints cost a training of the paper's size: ResNet-50 and ViT-B/16 under CASS, with Adam.

    python -m benchmarks checkpoints [--small]

A checkpoint holds up the training while it is copied to host memory; then a thread writes it. Measured: that
copy, the writing, and how much slower the same work on this machine's CPU is while it is written. The share
of the time at the default interval is (copy + writing x slow-down) / interval.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.figures import RESULTS, Figure, report
from pipeline.methods.load import load_method
from pipeline.methods.registry import resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone, Training
from pipeline.train.averaging import Averaging
from pipeline.train.distributed import World
from pipeline.train.optim import make_optimizer
from pipeline.train.state import State

PAPER = {"cnn": "resnet50", "vit": "vit_base_patch16_224"}
SMALL = {"cnn": "test_resnet", "vit": "test_vit"}
REPEATS = 3


def make_state(names: dict[str, str], folder: Path, *, size: int) -> State:
    """A training's state after one optimiser step, so that the moments are there."""
    training = Training(optimizer="adam", averaging="swa", image_size=size)
    nets = {
        arch: create_backbone(Backbone(name=name), size, seed=0, arch=arch)  # type: ignore[arg-type]
        for arch, name in names.items()
    }
    method = load_method("cass")(nets, resolve_options("cass"), image_size=size, seed=0)
    optimizer = make_optimizer(method, training)
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return State(
        method,
        optimizer,
        Averaging(method, training),
        world=World(),
        folder=folder,
        keep=1,
        seed=0,
        batch_size=16,
        accumulate=1,
        say=print,
    )


def work() -> float:
    """Seconds of a fixed piece of arithmetic, as a training step is on a CPU."""
    began = time.perf_counter()
    matrix = torch.ones(512, 512)
    for _ in range(40):
        matrix = matrix @ matrix * 1e-6
    return time.perf_counter() - began


def measure(names: dict[str, str], *, size: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        state = make_state(names, Path(folder), size=size)
        work()
        alone = statistics.median(work() for _ in range(15))
        copies, writes, beside = [], [], []
        for step in range(1, REPEATS + 1):
            began = time.perf_counter()
            state.save(step, log_position=0, seconds=0.0)
            copies.append(time.perf_counter() - began)
            while state.writing:
                beside.append(work())
            state.settle()
            writes.append(time.perf_counter() - began - copies[-1])
        megabytes = next(Path(folder).glob("*.pt")).stat().st_size / 1e6
    copy, write = statistics.median(copies), statistics.median(writes)
    slower = max(0.0, statistics.median(beside) / alone - 1) if beside else 0.0
    interval = Training().checkpoint_seconds
    return [
        Figure("checkpoint: size", megabytes, "MB"),
        Figure("checkpoint: copy", copy, "s"),
        Figure("checkpoint: writing", write, "s"),
        Figure("checkpoint: slow-down while writing", 100 * slower, "%"),
        Figure("checkpoint: share of the time", 100 * (copy + write * slower) / interval, "%", 1.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="nets of a few thousand weights, to try it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(SMALL, size=160) if given.small else measure(PAPER, size=224)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
