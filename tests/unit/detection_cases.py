"""A small detection set without shards: bright rectangles of two colours on a dark ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from pipeline.evaluate.problem import Problem, Split
from pipeline.nets.backbone import create_backbone
from pipeline.nets.export import export
from pipeline.specs import Architecture, Backbone, FinetuneSettings
from shards import Decoded

COLOURS = np.array([[230, 60, 40], [40, 200, 230]])
BACKBONES: dict[Architecture, Backbone] = {
    "cnn": Backbone(name="test_resnet"),
    "vit": Backbone(
        name="vit_tiny_patch16_224", args={"embed_dim": 48, "depth": 4, "num_heads": 3, "patch_size": 8}
    ),
}


@dataclass(frozen=True, eq=False)
class Rectangles:
    """What an index gives of an image's objects; their masks are the boxes themselves."""

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    size: tuple[int, int]
    outlined: bool = True

    @property
    def area(self) -> np.ndarray:
        return (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1)

    def masks(self, height: int, width: int) -> np.ndarray | None:
        if not self.outlined:
            return None
        x = (np.arange(width) + 0.5) * self.size[0] / width
        y = (np.arange(height) + 0.5) * self.size[1] / height
        left, top, right, bottom = self.boxes.T[:, :, None]
        across, down = (x > left) & (x < right), (y > top) & (y < bottom)
        return across[:, None, :] & down[:, :, None]


class RectangleIndex:
    """As much of ``shards.Index`` as detection needs.

    Args:
        found: the objects of each image.
    """

    task = "detection"
    classes = ["red", "blue"]
    folder = Path("rectangles")

    def __init__(self, found: Sequence[Rectangles]) -> None:
        self.found = list(found)
        widths, heights = zip(*(one.size for one in found))
        self.samples = pd.DataFrame(
            {"key": [f"image{row}" for row in range(len(found))], "width": widths, "height": heights}
        )

    def boxes(self, row: int) -> Rectangles:
        return self.found[row]

    def decode_small(self, row: int, *, at_least: int) -> Decoded:
        image = self.decode(row)
        return Decoded(image, *image.size)

    def decode(self, row: int) -> Image.Image:
        one = self.found[row]
        pixels = np.random.default_rng(row).integers(0, 40, (one.size[1], one.size[0], 3)).astype(np.uint8)
        for (left, top, right, bottom), label in zip(one.boxes.round().astype(int), one.labels):
            pixels[top:bottom, left:right] = COLOURS[label]
        return Image.fromarray(pixels)

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return np.array([[k in self.found[row].labels for k in (0, 1)] for row in rows], np.float32)


def rectangles(rng: np.random.Generator, size: tuple[int, int], count: int) -> Rectangles:
    """So many objects of a fifth to a half of the image's sides, apart from each other."""
    boxes: list[np.ndarray] = []
    while len(boxes) < count:
        sides = (rng.uniform(0.2, 0.45, 2) * size).round()
        start = (rng.random(2) * (size - sides)).round()
        box = np.concatenate([start, start + sides])
        if all((box[2:] <= other[:2]).any() or (box[:2] >= other[2:]).any() for other in boxes):
            boxes.append(box)
    return Rectangles(
        np.array(boxes, np.float32).reshape(-1, 4),
        rng.integers(0, 2, count),
        np.zeros(count, bool),
        size,
    )


def problem_of(
    index: Any, folder: Path, arch: Architecture, splits: Sequence[range], **settings: Any
) -> Problem:
    """Learn detection on three ranges of rows, from random weights."""
    settings = {"batch_size": 4, "lr": 2e-3, "head_width": 16, "optimizer": "adamw"} | settings
    size = settings.pop("size", 64)
    net = create_backbone(BACKBONES[arch], size, seed=0, arch=arch)
    export(net, folder / arch, trained={"method": "supervised"})
    parts = []
    for rows in splits:
        chosen = np.array(rows, np.int64)
        parts.append(Split(chosen, torch.from_numpy(index.targets(chosen))))
    return Problem(
        backbone=folder / arch,
        index=index,
        train=parts[0],
        val=parts[1],
        test=parts[2],
        settings=FinetuneSettings(**settings),
        seed=3,
        device=torch.device("cpu"),
    )
