"""Two ranks on two cores against one rank on one core, and a model of what communication costs.

    python -m benchmarks scaling [--method cass_plus] [--nets small|large] [--steps N] [--rounds N] [--small]
    python -m benchmarks scaling --model STEP_MS GRADIENTS_MIB GB_PER_S

Each rank is bound to a core of its own and takes the same number of images a step, as a pretraining does it:
under ``DistributedDataParallel``, with batch statistics over both. The model: a step's gradients are
all-reduced once, 4 bytes a trained weight, at the bandwidth that the same two ranks measure on one tensor of
that size, and nothing of it is hidden behind the backward pass; the messages of batch statistics are small
and left out. Two single ranks at once, which know nothing of each other, say what sharing the machine's
memory costs. ``--model`` prints what the model says of 8 to 512 ranks, from a step's time on one rank, its
gradients and what a rank sends a second: without hiding anything, and hidden as far as the backward pass is
long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.end_to_end import NETS
from benchmarks.figures import RESULTS, Figure, report
from benchmarks.steps import make_method, make_views, own_step
from pipeline.specs import Training
from pipeline.train.cpu import set_up_cpu
from pipeline.train.distributed import World

EFFICIENCY = 0.9
BACKWARD = 2 / 3  # of a step
RANKS = (8, 16, 32, 64, 128, 256, 512)
WARM_UP = 3


def work(method: str, nets: str, *, steps: int, rank: int, world: int, meeting: str) -> dict[str, Any]:
    """One rank: seconds of its steps, bytes it sends a step, and seconds of one all-reduce of as many."""
    set_up_cpu(1)
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    chosen = NETS[nets]
    made = make_method(method, chosen["backbones"], {}, size=chosen["size"])
    views = make_views(made, chosen["batch"], torch.device("cpu"))
    if world > 1:
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    step = own_step(made, views, Training(), world=World(rank=rank, world_size=world))
    seconds = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    weights = sum(p.numel() for p in made.parameters() if p.requires_grad)
    reduced = 0.0
    if world > 1:
        gradients = torch.zeros(weights)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            dist.all_reduce(gradients)
            times.append(time.perf_counter() - began)
        reduced = statistics.median(times)
        dist.destroy_process_group()
    return {"step": statistics.median(seconds[WARM_UP:]), "bytes": 4 * weights, "reduce": reduced}


def run(method: str, nets: str, *, steps: int, ranks: int, together: bool) -> list[dict[str, Any]]:
    """What each of some ranks measured, at once; ``together``: as one training."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        world = ranks if together else 1
        words = ["--method", method, "--nets", nets, "--steps", str(steps), "--world", str(world)]
        command = [sys.executable, "-m", "benchmarks.scaling", *words, "--meeting", meeting, "--rank"]
        started = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a rank failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def predict(step: float, sent: float, bandwidth: float, *, ranks: int, hidden: float = 0.0) -> float:
    """Efficiency by the model: a ring's all-reduce, in which each rank sends 2·(N − 1)/N times the gradients.

    Args:
        step: seconds of a step on one rank.
        sent: bytes of gradients.
        bandwidth: bytes that a rank sends a second, through the narrowest link of the ring.
        ranks: N.
        hidden: share of the step behind which the all-reduce may run.
    """
    reduced = 2 * (ranks - 1) / ranks * sent / bandwidth
    return step / (step + max(0.0, reduced - hidden * step))


def measure(method: str, nets: str, *, steps: int, rounds: int) -> list[Figure]:
    ways = {"one": (1, False), "beside": (2, False), "two": (2, True)}
    found: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            ranks, together = ways[way]
            found[way].append(run(method, nets, steps=steps, ranks=ranks, together=together))

    def median(way: str, what: str) -> float:
        return statistics.median(max(rank[what] for rank in ranks) for ranks in found[way])

    one, beside, two = (median(way, "step") for way in ways)
    efficiency = statistics.median(
        a[0]["step"] / max(rank["step"] for rank in b) for a, b in zip(found["one"], found["two"])
    )
    sent, reduced = median("two", "bytes"), median("two", "reduce")
    chosen = NETS[nets]
    name = f"scaling {method} {nets}, {chosen['size']} px, {chosen['batch']} a rank"
    return [
        Figure(f"{name}: step of one rank", one * 1e3, "ms"),
        Figure(f"{name}: of one beside another", beside * 1e3, "ms"),
        Figure(f"{name}: of two", two * 1e3, "ms"),
        Figure(f"{name}: gradients", sent / 2**20, "MiB"),
        Figure(f"{name}: all-reduce of them", reduced * 1e3, "ms"),
        Figure(f"{name}: efficiency", efficiency, "", at_least=EFFICIENCY),
        Figure(
            f"{name}: efficiency by the model",
            one / beside * predict(beside, sent, sent / reduced, ranks=2),
            "",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--method", default="cass_plus")
    parser.add_argument("--nets", choices=NETS, default="small")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="two steps, to try it")
    parser.add_argument("--model", nargs=3, type=float, metavar=("STEP_MS", "GRADIENTS_MIB", "GB_PER_S"))
    for hidden in ("--rank", "--world"):  # of a process that this one starts
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meeting", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        place = {"rank": given.rank, "world": given.world, "meeting": given.meeting}
        print(json.dumps(work(given.method, given.nets, steps=given.steps, **place)))
        return
    if given.model is not None:
        milliseconds, mebibytes, gigabytes = given.model
        for ranks in RANKS:
            bare, best = (
                predict(milliseconds / 1e3, mebibytes * 2**20, gigabytes * 1e9, ranks=ranks, hidden=hidden)
                for hidden in (0.0, BACKWARD)
            )
            print(f"{ranks:4} ranks: {bare:.2f}, hidden {best:.2f}")
        return
    steps, rounds = (2, 1) if given.small else (given.steps, given.rounds)
    figures = measure(given.method, given.nets, steps=steps, rounds=rounds)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
