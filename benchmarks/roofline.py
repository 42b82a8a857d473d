"""How near the parts of a CASS step come to what the device can do: matrix products and memory.

    python -m benchmarks roofline [--size 224] [--batch N] [--compile] [--small]

ResNet-50 and ViT-B/16, each forward and backward as in a training (bf16, channels last), and the optimiser's
step. The limits are measured: a bf16 product of two square matrices, and a copy in the device's memory.
Operations are those of products and convolutions; bytes are what every operation reads and writes when none
is fused with the next, so a compiled net moves fewer than are counted. On a GPU also the share of a whole
step in which a kernel runs: the rest waits for Python.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import wait
from benchmarks.steps import NETS, SMALL, Step, make_method, make_views, own_step, time_steps
from pipeline.methods.base import Method
from pipeline.specs import Backbone, Training
from pipeline.train.optim import make_optimizer

ADAM_BYTES = 28  # a weight: itself, its gradient and two moments read, all but the gradient written
PROFILED = 5  # steps


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def seconds(work: Step, device: torch.device, rounds: int) -> float:
    """Median of a few, after one that does not count."""
    work()
    return statistics.median(time_steps({"work": work}, rounds, device)["work"])


def limits(device: torch.device, rounds: int, *, small: bool) -> tuple[float, float]:
    """FLOP/s of a bf16 product of matrices, and bytes/s of a copy (read and written)."""
    side, length = (256, 2**20) if small else (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    one, two = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.ones(length, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = seconds(lambda: one @ two, device, rounds)
    copied = seconds(lambda: target.copy_(source), device, rounds)
    return 2 * side**3 / product, 2 * length / copied


def pass_of(net: Any, images: Tensor) -> Step:
    """Forward and backward of one net."""

    def work() -> None:
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            out = net(images)
        out.float().square().mean().backward()

    return work


def busy(step: Step, device: torch.device) -> float:
    """Share of the time of steps in which the GPU runs a kernel."""
    step()
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        began = time.perf_counter()
        for _ in range(PROFILED):
            step()
        wait(device)
        whole = time.perf_counter() - began
    kernels = sum(event.self_device_time_total for event in trace.key_averages())
    return kernels / 1e6 / whole


def measure(
    *, size: int, batch: int, rounds: int, device: torch.device, compiled: bool, small: bool = False
) -> list[Figure]:
    names = SMALL if small else NETS["cass"]

    def fresh() -> Method:
        nets = {arch: Backbone(name=name) for arch, name in names.items()}
        return make_method("cass", nets, {}, size=size)

    method = fresh().to(device).to(memory_format=torch.channels_last).train()
    (images,) = make_views(method, batch, device)
    top, bandwidth = limits(device, rounds, small=small)
    figures = [
        Figure("roofline: bf16 product", top / 1e12, "TFLOP/s"),
        Figure("roofline: copy", bandwidth / 1e9, "GB/s"),
    ]
    title = f"roofline {size} px, batch {batch}{', compiled' if compiled else ''}"

    def add(part: str, took: float, operations: float, moved: float) -> None:
        figures.append(Figure(f"{title}: {part}", took * 1e3, "ms"))
        if operations:
            figures.append(Figure(f"{title}: {part}, of the product", 100 * operations / took / top, "%"))
        figures.append(Figure(f"{title}: {part}, of the copy", 100 * moved / took / bandwidth, "%"))

    for arch, name in names.items():
        net = method.exported()[arch]
        with FlopCounterMode(display=False) as operations, Traffic() as traffic:
            pass_of(net.features, images)()
        features = torch.compile(net.features) if compiled else net.features
        took = seconds(pass_of(features, images), device, rounds)
        add(f"{name}, forward and backward", took, operations.get_total_flops(), traffic.bytes)
    optimizer = make_optimizer(method, Training(optimizer="adam"))
    weights = sum(math.prod(weight.shape) for weight in method.parameters() if weight.grad is not None)
    add("optimiser", seconds(optimizer.step, device, rounds), 0, ADAM_BYTES * weights)

    whole = own_step(fresh(), [images], Training(optimizer="adam", precision="bf16", compile=compiled))
    figures.append(Figure(f"{title}: whole step", seconds(whole, device, rounds) * 1e3, "ms"))
    if device.type == "cuda":
        figures.append(Figure(f"{title}: whole step, a kernel runs", 100 * busy(whole, device), "%"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, help="images a step (default: 4 on a CPU, 64 on a GPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="nets compiled")
    parser.add_argument("--small", action="store_true", help="nets of a few thousand weights, to try it")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = measure(
        size=64 if given.small else given.size,
        batch=given.batch or (64 if device.type == "cuda" else 4),
        rounds=1 if given.small else given.rounds,
        device=device,
        compiled=given.compile,
        small=given.small,
    )
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
