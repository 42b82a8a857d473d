"""Whole optimiser steps of CASS, DINO and SimCLR beside the loops of others, on equal nets and batch.

    python -m benchmarks steps cass|dino|simclr [--batch N] [--size 224] [--rounds N] [--small]

Views lie on the device. CASS: ResNet-50 and ViT-B/16, one view, against the paper's loop (two nets with a
classifier, two Adams, fp32, eager; arXiv 2206.04170). DINO (ViT-S/16, 2 + 6 crops) and SimCLR (ResNet-50):
against lightly's modules in the loop of its examples, in fp32 and in the bf16 that they offer. Ours run as a
pretraining does, in fp32 and in bf16, without and with ``torch.compile``. On a GPU the memory that a
step takes at most, gradients and activations, is given too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio
from pipeline.data.feed import Batch
from pipeline.methods.base import Method, Progress
from pipeline.methods.load import load_method
from pipeline.methods.registry import METHODS, resolve_options
from pipeline.nets.backbone import create_backbone
from pipeline.specs import Backbone, Training
from pipeline.train.distributed import World
from pipeline.train.optim import make_optimizer
from pipeline.train.profiling import NoProfile
from pipeline.train.step import Stepper
from pipeline.train.syncbn import synchronise_batch_norm
from pipeline.train.views import Views

Step = Callable[[], None]
NETS = {
    "cass": {"cnn": "resnet50", "vit": "vit_base_patch16_224"},
    "dino": {"vit": "vit_small_patch16_224"},
    "simclr": {"cnn": "resnet50"},
}
SMALL = {"cnn": "test_resnet", "vit": "test_vit"}
OPTIONS: dict[str, dict[str, Any]] = {
    "cass": {},
    "dino": {"out_dim": 65536, "n_local": 6, "local_size": 96},
    "simclr": {"temperature": 0.1},
}
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "dino": {"out_dim": 64, "hidden": 32, "bottleneck": 16, "n_local": 2, "local_size": 32},
    "simclr": {"temperature": 0.1, "hidden": 32},
}
AIMS = {
    "cass": {"cuda": 4.0, "cpu": 1.2},
    "dino": {"cuda": 1.3, "cpu": 1.1},
    "simclr": {"cuda": 1.3, "cpu": 1.1},
}
NOW = Progress(step=5, steps=10, epoch=2.0, epochs=4.0)


def make_method(name: str, nets: dict[str, Backbone], options: dict[str, Any], *, size: int) -> Method:
    """A method with nets of its own, as a pretraining builds it."""
    made = {
        arch: create_backbone(METHODS[name].with_args(arch, spec), size, seed=0, arch=arch)  # type: ignore[arg-type]
        for arch, spec in nets.items()
    }
    return load_method(name)(made, resolve_options(name, options), image_size=size, seed=0)


def make_views(method: Method, batch: int, device: torch.device) -> list[Tensor]:
    """Random images of the sizes that a method wants, laid out as a training's."""
    shapes = [(batch, 3, view.size, view.size) for view in method.views]
    return [torch.rand(shape, device=device).to(memory_format=torch.channels_last) for shape in shapes]


def own_step(method: Method, views: list[Tensor], training: Training, *, world: World | None = None) -> Step:
    """One step as a pretraining takes it, on views that are there, and waited for."""
    world = world or World(device=views[0].device)
    if training.sync_bn:
        synchronise_batch_norm(method, world)
    method = method.to(world.device).to(memory_format=torch.channels_last).train()
    stepper = Stepper(
        method,
        make_optimizer(method, training),
        Views(method.views, seed=0),
        training=training,
        world=world,
        accumulate=1,
        first=0,
        profile=NoProfile(),
        say=print,
    )
    stepper.views = lambda batch, count=None: views[:count]  # type: ignore[assignment]
    batch = Batch(views[0], torch.arange(len(views[0])))

    def step() -> None:
        stepper.take([batch], NOW)
        _wait(world.device)

    return step


def papers_cass(names: dict[str, str], views: list[Tensor]) -> Step:
    """The loop that the CASS paper gives: both nets' logits, cosine, two optimisers."""
    (images,) = views
    images = images.contiguous()
    nets = [
        timm.create_model(name, img_size=images.shape[-1]) if arch == "vit" else timm.create_model(name)
        for arch, name in names.items()
    ]
    nets = [net.to(images.device).train() for net in nets]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in nets]

    def step() -> None:
        one, two = (nn.functional.normalize(net(images), dim=1) for net in nets)
        (2 - 2 * (one * two).sum(dim=1)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        _wait(images.device)

    return step


def lightlys_dino(names: dict[str, str], views: list[Tensor], options: dict[str, Any], *, bf16: bool) -> Step:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    device = views[0].device
    body = timm.create_model(names["vit"], num_classes=0, dynamic_img_size=True, img_size=views[0].shape[-1])
    sizes = (body.num_features, options["hidden"], options["bottleneck"], options["out_dim"])
    student = nn.Sequential(body, DINOProjectionHead(*sizes, freeze_last_layer=1)).to(device).train()
    teacher = nn.Sequential(copy.deepcopy(body), DINOProjectionHead(*sizes)).to(device).train()
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(output_dim=options["out_dim"], warmup_teacher_temp_epochs=5).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    views = [view.contiguous() for view in views]

    def step() -> None:
        update_momentum(student[0], teacher[0], m=0.99)
        update_momentum(student[1], teacher[1], m=0.99)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            targets = [teacher(view) for view in views[:2]]
            scores = [student(view) for view in views]
            loss = criterion(targets, scores, epoch=2)
        loss.backward()
        student[1].cancel_last_layer_gradients(current_epoch=2)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)

    return step


def lightlys_simclr(
    names: dict[str, str], views: list[Tensor], options: dict[str, Any], *, bf16: bool
) -> Step:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    device = views[0].device
    body = timm.create_model(names["cnn"], num_classes=0)
    model = nn.Sequential(
        body, SimCLRProjectionHead(body.num_features, options["hidden"], options["out_dim"])
    )
    model = model.to(device).train()
    criterion = NTXentLoss(temperature=options["temperature"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    views = [view.contiguous() for view in views]

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = criterion(*(model(view) for view in views))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_steps(
    name: str, *, small: bool, size: int, batch: int, device: torch.device, compiled: bool
) -> dict[str, Step]:
    """The peer's steps and ours, by what is special about each."""
    names = {arch: SMALL[arch] for arch in NETS[name]} if small else NETS[name]
    given = (SMALL_OPTIONS if small else OPTIONS).get(name, {})
    nets = {arch: Backbone(name=net) for arch, net in names.items()}
    options = resolve_options(name, given)
    views = make_views(make_method(name, nets, given, size=size), batch, device)
    steps: dict[str, Step] = {}
    if name == "cass":
        steps["paper fp32"] = papers_cass(names, views)
    else:
        peer = lightlys_dino if name == "dino" else lightlys_simclr
        for bf16 in (False, True):
            steps[f"lightly {'bf16' if bf16 else 'fp32'}"] = peer(names, views, options, bf16=bf16)
    ways = [(bf16, way) for way in ([False, True] if compiled else [False]) for bf16 in (False, True)]
    for bf16, way in ways:
        label = f"ours {'bf16' if bf16 else 'fp32'}{' compiled' if way else ''}"
        training = Training(
            optimizer="adam" if name == "cass" else "adamw",
            precision="bf16" if bf16 else "fp32",
            compile=way,
        )
        steps[label] = own_step(make_method(name, nets, given, size=size), views, training)
    return steps


def measure(
    name: str, *, small: bool, size: int, batch: int, rounds: int, device: torch.device, compiled: bool
) -> list[Figure]:
    """Seconds of each, and the best of ours against the best of the peer's."""
    steps = make_steps(name, small=small, size=size, batch=batch, device=device, compiled=compiled)
    memory = {}
    for label, step in steps.items():
        step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step()
            memory[label] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    seconds = in_turn(steps, rounds)
    title = f"step {name} {size} px, batch {batch}"
    figures = [Figure(f"{title}: {label}", statistics.median(times), "s") for label, times in seconds.items()]
    figures += [Figure(f"{title}: {label}, memory of a step", used, "GiB") for label, used in memory.items()]

    def best(whose: str) -> list[float]:
        chosen = {
            label: times for label, times in seconds.items() if label.startswith("ours") == (whose == "ours")
        }
        return min(chosen.values(), key=statistics.median)

    aim = AIMS[name][device.type]
    return [
        *figures,
        Figure(f"{title}: times as fast", ratio(best("theirs"), best("ours")), "x", at_least=aim),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=NETS)
    parser.add_argument("--batch", type=int, help="images a step (default: 4 on a CPU, 64 on a GPU)")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile too")
    parser.add_argument("--small", action="store_true", help="nets of a few thousand weights, to try it")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = given.batch or (64 if device.type == "cuda" else 4)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    figures = measure(
        given.what,
        small=given.small,
        size=64 if given.small else given.size,
        batch=batch,
        rounds=1 if given.small else given.rounds,
        device=device,
        compiled=given.compile,
    )
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
