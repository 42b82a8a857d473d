"""Whole optimiser steps of CASS, DINO and SimCLR beside the loops of others, on equal nets and batch.

    python -m benchmarks steps cass|dino|simclr [--batch N] [--size 224] [--rounds N] [--compile] [--small]

Views lie on the device. CASS: ResNet-50 and ViT-B/16, one view, against the paper's loop (two nets with a
classifier, two Adams, fp32, eager; arXiv 2206.04170). DINO (ViT-S/16, 2 + 6 crops) and SimCLR (ResNet-50):
against lightly's modules in the loop of its examples, in fp32 and in the bf16 that they offer. Ours run as a
pretraining does, in fp32 and in bf16, and with ``--compile`` in bf16 through ``torch.compile``, on a GPU also
with CUDA graphs. On a GPU the fp32 of ours and of lightly's lets matrix products round their factors to TF32,
as our trainings do; the paper's loop runs without and with that. There, too, activations computed again
(``recompute``), and the memory that a step takes at most, weights and the optimiser's moments included.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio, wait
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

Step = Callable[[], object]
AT_A_TIME = 5  # steps on a GPU between two looks at the clock: in a training, too, Python runs ahead
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
MEMORY = 0.6  # of the paper's, at most
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
    """One step as a pretraining takes it, on views that are there."""
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
    return lambda: stepper.take([batch], NOW)


def papers_cass(names: dict[str, str], views: list[Tensor], *, tf32: bool) -> Step:
    """The loop that the CASS paper gives: both nets' logits, cosine, two optimisers.

    Args:
        names: of timm models.
        views: of one view.
        tf32: a GPU may round the factors of matrix products to TF32, which PyTorch does not do unless told
            to; in convolutions it does.
    """
    (images,) = views
    images = images.contiguous()
    nets = [
        timm.create_model(name, img_size=images.shape[-1]) if arch == "vit" else timm.create_model(name)
        for arch, name in names.items()
    ]
    nets = [net.to(images.device).train() for net in nets]
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in nets]

    def step() -> None:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        one, two = (nn.functional.normalize(net(images), dim=1) for net in nets)
        (2 - 2 * (one * two).sum(dim=1)).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.backends.cuda.matmul.allow_tf32 = True  # as in our trainings

    return step


def lightlys_dino(names: dict[str, str], views: list[Tensor], options: dict[str, Any], *, bf16: bool) -> Step:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    device = views[0].device
    body = timm.create_model(names["vit"], num_classes=0, dynamic_img_size=True, img_size=views[0].shape[-1])
    sizes = (body.num_features, options["hidden"], options["bottleneck"], options["out_dim"])
    head = DINOProjectionHead(*sizes, freeze_last_layer=1)
    student = nn.Sequential(body, head).to(device).train()
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
        head.cancel_last_layer_gradients(current_epoch=2)
        optimizer.step()
        optimizer.zero_grad()

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

    return step


def time_steps(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step of each in each round, in turn; on a GPU of ``AT_A_TIME`` of them at once."""
    count = AT_A_TIME if device.type == "cuda" else 1

    def several(step: Step) -> None:
        for _ in range(count):
            step()
        wait(device)

    wait(device)
    seconds = in_turn({label: partial(several, step) for label, step in steps.items()}, rounds)
    return {label: [time / count for time in times] for label, times in seconds.items()}


def makers(
    name: str, *, small: bool, size: int, batch: int, device: torch.device, compiled: bool
) -> dict[str, Callable[[], Step]]:
    """What makes the peer's steps and ours, by what is special about each."""
    names = {arch: SMALL[arch] for arch in NETS[name]} if small else NETS[name]
    given = (SMALL_OPTIONS if small else OPTIONS).get(name, {})
    nets = {arch: Backbone(name=net) for arch, net in names.items()}
    options = resolve_options(name, given)
    views = make_views(make_method(name, nets, given, size=size), batch, device)
    made: dict[str, Callable[[], Step]] = {}
    if name == "cass":
        made["paper fp32"] = partial(papers_cass, names, views, tf32=False)
        if device.type == "cuda":
            made["paper tf32"] = partial(papers_cass, names, views, tf32=True)
    else:
        peer = lightlys_dino if name == "dino" else lightlys_simclr
        for bf16 in (False, True):
            label = f"lightly {'bf16' if bf16 else 'fp32'}"
            made[label] = partial(peer, names, views, options, bf16=bf16)

    def own(**settings: Any) -> Step:
        training = Training(optimizer="adam" if name == "cass" else "adamw", **settings)
        return own_step(make_method(name, nets, given, size=size), views, training)

    made["ours fp32"] = partial(own, precision="fp32")
    made["ours bf16"] = partial(own, precision="bf16")
    if compiled:
        made["ours bf16 compiled"] = partial(own, precision="bf16", compile=True)
    if compiled and device.type == "cuda":
        made["ours bf16 graphs"] = partial(own, precision="bf16", compile="graphs")
    if device.type == "cuda":
        made["ours bf16 recompute"] = partial(own, precision="bf16", recompute=True)
    return made


def measure(
    name: str, *, small: bool, size: int, batch: int, rounds: int, device: torch.device, compiled: bool
) -> list[Figure]:
    """Seconds of each, and the best of ours against the best of each precision of the peer's."""
    steps: dict[str, Step] = {}
    memory: dict[str, float] = {}
    for label, make in makers(
        name, small=small, size=size, batch=batch, device=device, compiled=compiled
    ).items():
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        steps[label] = make()
        steps[label]()  # kernels are chosen, moments are there
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            steps[label]()
            memory[label] = (torch.cuda.max_memory_allocated() - before) / 2**30
    seconds = time_steps(steps, rounds, device)
    title = f"step {name} {size} px, batch {batch}"
    figures = [Figure(f"{title}: {label}", statistics.median(times), "s") for label, times in seconds.items()]
    figures += [Figure(f"{title}: {label}, memory", used, "GiB") for label, used in memory.items()]
    ours = [label for label in seconds if label.startswith("ours")]
    peers = [label for label in seconds if not label.startswith("ours")]
    best, fastest = (min(each, key=lambda one: statistics.median(seconds[one])) for each in (ours, peers))
    for peer in peers:
        # The paper's precision is what it is; of a library's the faster counts.
        aimed = peer == ("paper fp32" if name == "cass" else fastest)
        aim = AIMS[name][device.type] if aimed else None
        times = ratio(seconds[peer], seconds[best])
        figures.append(Figure(f"{title}: {best} over {peer}", times, "x", at_least=aim))
        if memory:
            for label in (one for one in memory if one.startswith("ours bf16")):
                share = memory[label] / memory[peer]
                most = MEMORY if name == "cass" and aimed else None
                figures.append(Figure(f"{title}: {label} over {peer}, memory", share, "x", most))
    return figures


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
