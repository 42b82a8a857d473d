"""How fast batches get their two augmented views, beside torchvision and kornia.

    python -m benchmarks augment [--size 224] [--batch 64] [--rounds N] [--device cuda] [--small]

The recipes of CASS (one view each of two) and of DINO (its two global crops), on decoded images, uint8, of
the views' size, as an ImageSet keeps them. torchvision's v2 works on one sample at a time, in as many worker
processes as there are CPU cores, and is left out on a GPU; kornia and ours on batches, in as many threads,
or on the GPU; there ours are fused kernels, and what a view launches is counted. Starting the workers counts.
Peers do the same operations with the same probabilities and strengths.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.figures import RESULTS, Figure, report
from benchmarks.pairs import in_turn, ratio
from pipeline.data.augment import Augment, blur_radius
from pipeline.data.draws import sample_keys

RECIPES = {"cass": ("cass", "cass"), "dino": ("dino_global_1", "dino_global_2")}
OVER_TORCHVISION, OVER_KORNIA_GPU = 3.0, 1.5
BATCHES = 16  # a round


def torchvision_view(recipe: str, size: int) -> v2.Compose:
    """One view of uint8 (3, H, W), as float."""
    if recipe == "cass":
        colour = v2.ColorJitter(0.2, 0.2, 0.2)
        steps: list[nn.Module] = [
            v2.Resize((size, size), antialias=True),
            v2.RandomApply([colour, v2.RandomPerspective(0.2)], p=0.3),
            v2.RandomApply([colour, v2.RandomRotation(10, v2.InterpolationMode.BILINEAR)], p=0.3),
            v2.RandomHorizontalFlip(0.3),
            v2.RandomVerticalFlip(0.3),
        ]
    else:
        blur = v2.GaussianBlur(_kernel(size), (0.1, 2.0))
        first = recipe == "dino_global_1"
        steps = [
            v2.RandomResizedCrop(size, (0.4, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            blur if first else v2.RandomApply([blur], p=0.1),
            *([] if first else [v2.RandomSolarize(128, 0.2)]),
        ]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def kornia_view(recipe: str, size: int) -> nn.Module:
    """One view of a float batch in [0, 1]."""
    import kornia.augmentation as K

    if recipe == "cass":
        return K.AugmentationSequential(
            K.Resize((size, size), antialias=True),
            K.ColorJitter(0.2, 0.2, 0.2, p=0.3),
            K.RandomPerspective(0.2, p=0.15),
            K.ColorJitter(0.2, 0.2, 0.2, p=0.3),
            K.RandomRotation(10.0, p=0.3),
            K.RandomHorizontalFlip(p=0.3),
            K.RandomVerticalFlip(p=0.3),
        )
    first = recipe == "dino_global_1"
    kernel = _kernel(size)
    return K.AugmentationSequential(
        K.RandomResizedCrop((size, size), (0.4, 1.0)),
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=1.0 if first else 0.1),
        *([] if first else [K.RandomSolarize(p=0.2)]),
    )


def _kernel(size: int) -> int:
    """Of the blur, as wide as ours."""
    return 2 * blur_radius(size) + 1


class Decoded(Dataset):
    """A batch of images over and over, augmented one at a time."""

    def __init__(self, images: Tensor, views: list[v2.Compose]) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        return BATCHES * len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        image = self.images[number % len(self.images)]
        return tuple(view(image) for view in self.views)


def measure(recipe: str, *, size: int, batch: int, rounds: int, device: torch.device) -> list[Figure]:
    """Images a second, each with two views, and how many times as fast ours are."""
    names = RECIPES[recipe]
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    images = nn.functional.avg_pool2d(images.float(), 7, 1, 3).to(torch.uint8)  # no noise, which no image is
    there = images.to(device)
    samples = Decoded(images, [torchvision_view(name, size) for name in names])
    ours = [Augment(name, size) for name in names]
    theirs = [kornia_view(name, size).to(device) for name in names]
    counters = torch.arange(batch)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def torchvision() -> None:
        for views in DataLoader(samples, batch, num_workers=os.cpu_count() or 1):
            [view.to(device, non_blocking=True) for view in views]
        wait()

    def kornia() -> None:
        for _ in range(BATCHES):
            floats = there.float() / 255
            [view(floats) for view in theirs]
        wait()

    def own() -> None:
        for _ in range(BATCHES):
            [augment(there, sample_keys(counters, seed=0, view=v)) for v, augment in enumerate(ours)]
        wait()

    for first in (kornia, own):  # kernels are chosen
        first()
    on_gpu = device.type == "cuda"
    peers = {"kornia": kornia} if on_gpu else {"torchvision": torchvision, "kornia": kornia}
    seconds = in_turn(peers | {"ours": own}, rounds)
    name = f"augment {recipe} {size} px"
    figures = [
        Figure(f"{name}: {who}", BATCHES * batch / statistics.median(times), "images/s")
        for who, times in seconds.items()
    ]
    if on_gpu:
        figures.append(Figure(f"{name}: launches a view", launches(own) / (BATCHES * len(ours)), ""))
    aims = {"torchvision": OVER_TORCHVISION, "kornia": OVER_KORNIA_GPU if on_gpu else None}
    return figures + [
        Figure(f"{name}: times {peer}", ratio(seconds[peer], seconds["ours"]), "x", at_least=aims[peer])
        for peer in peers
    ]


def launches(work: Callable[[], None]) -> int:
    """Kernels and copies that the GPU is given by ``work``, which waits for them."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
    return sum(event.device_type == DeviceType.CUDA for event in trace.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=224, help="side of the views in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="a few small images, one round, to try it")
    given = parser.parse_args()
    size, batch, rounds = (32, 8, 1) if given.small else (given.size, given.batch, given.rounds)
    device = torch.device(given.device)
    figures = []
    for recipe in RECIPES:
        figures += measure(recipe, size=size, batch=batch, rounds=rounds, device=device)
    report(figures, append_to=None if given.small else RESULTS)


if __name__ == "__main__":
    main()
