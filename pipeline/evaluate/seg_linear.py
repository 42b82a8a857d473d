"""Segmentation by a linear probe: a 1 × 1 convolution on the frozen, standardised last feature map.

Its logits are interpolated bilinearly, which is linear too: a pixel's logits are a linear function of the
features interpolated at that pixel. So the probe is a logistic regression on such features, convex, and is
solved to convergence by what solves the ``linear`` protocol, with no learning rate to choose. Standardising
takes the place of the batch normalisation that others put in front of the convolution. Neighbouring pixels
say much the same, so it learns from a sample of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError
from pipeline.evaluate.features import every_train_image, maps_of
from pipeline.evaluate.images import images_of
from pipeline.evaluate.linear import pick_weight_decay
from pipeline.evaluate.losses import class_weights
from pipeline.evaluate.problem import Prediction, Problem, Split, reproducible
from pipeline.evaluate.segmentation import confusions, pixel_counts, score, segmented
from pipeline.evaluate.standardise import SampleSpan
from pipeline.nets.export import load_exported

PIXELS = 2**14  # to learn from; four times as many change the mIoU by .002 on 375 images of nuclei
PER_CLASS, PER_IMAGE = 2**10, 16  # pixels; as many of all as either of them makes, where that is more
TOLERANCE = 1e-4  # 9 s of a CPU in place of 60 for all weight decays, and the same mIoU to four digits
NUMBERS = 2**25  # features, each of 4 bytes: fewer pixels where a map has very many channels


def run(problem: Problem) -> Prediction:
    """The ``seg_linear`` protocol: validation picks the weight decay."""
    with reproducible(problem.seed, problem.device):
        return _run(problem)


def _run(problem: Problem) -> Prediction:
    settings, device = problem.settings, problem.device
    size = load_exported(problem.backbone, num_classes=0, image_size=settings.image_size).image_size
    every = _sampled_features(problem).to(device)
    raw, targets = _sampled_pixels(problem, size)
    raw, targets = raw.to(device), targets.to(device)
    standardise = SampleSpan(raw, every)

    def counted(split: Split, solution: Tensor) -> np.ndarray:
        return confusions(problem, split, _logits(problem, split, standardise, solution), image_size=size)

    solution, decay, log = pick_weight_decay(
        standardise(raw),
        targets,
        num_classes=problem.num_classes,
        weights=class_weights(targets, problem.num_classes) if settings.class_weights == "balanced" else None,
        score=lambda found: score(problem, counted(problem.val, found)),
        tick=problem.tick,
        tolerance=TOLERANCE,
    )
    return segmented(
        val=counted(problem.val, solution),
        test=counted(problem.test, solution),
        chosen={"weight_decay": decay},
        log=log,
    )


def _logits(problem: Problem, split: Split, standardise: SampleSpan, solution: Tensor) -> Iterator[Tensor]:
    """(B, K, h, w) of the last feature maps, batch by batch."""
    weight, bias = (x.float() for x in standardise.unscaled(solution))
    for maps in maps_of(problem, split):
        yield torch.einsum("bchw,ck->bkhw", maps.to(problem.device), weight) + bias[:, None, None]


def _sampled_features(problem: Problem) -> Tensor:
    """Features float32 (P, C) of every train image, labelled or not, at places spread evenly over its map."""
    every = every_train_image(problem)
    taken: list[Tensor] = []
    for maps in maps_of(problem, every):
        places = maps[0, 0].numel()
        each = max(1, min(PER_IMAGE, places, NUMBERS // maps.shape[1] // len(every)))
        chosen = torch.linspace(0, places - 1, each).round().long()
        taken.append(maps.flatten(2)[:, :, chosen].movedim(1, 2).flatten(0, 1))
    return torch.cat(taken)


def _sampled_pixels(problem: Problem, size: int) -> tuple[Tensor, Tensor]:
    """Features float32 (P, C) interpolated at the pixels to learn from, and their classes int64 (P,)."""
    images, where = images_of(problem, problem.train, image_size=size, masks=True)
    counts = pixel_counts(images, where, problem.num_classes)
    if not counts.any():
        raise UserError(f"no pixel of the {len(where)} training images has a class")
    balanced = problem.settings.class_weights == "balanced"
    rng = np.random.default_rng(problem.seed)
    wanted = max(PIXELS, PER_CLASS * problem.num_classes, PER_IMAGE * len(where))
    quotas = np.empty((0, problem.num_classes), np.int64)
    features, targets, place = [], [], 0
    for maps in maps_of(problem, problem.train):
        if not len(quotas):
            quotas = share_out(counts, min(wanted, NUMBERS // maps.shape[1]), balanced=balanced, rng=rng)
        masks = images.batch(where[place : place + len(maps)])[:, 3].cpu().numpy()
        for one, mask, quota in zip(maps, masks, quotas[place:]):
            for label in np.flatnonzero(quota):
                pixels = rng.choice(np.flatnonzero(mask == label), quota[label], replace=False)
                features.append(interpolated(one, pixels, size))
                targets.append(torch.full((len(pixels),), int(label)))
        place += len(maps)
    return torch.cat(features), torch.cat(targets)


def share_out(counts: np.ndarray, wanted: int, *, balanced: bool, rng: np.random.Generator) -> np.ndarray:
    """How many pixels of each class each image gives.

    Args:
        counts: int (N, K): how many it has.
        wanted: in all, at most.
        balanced: as many of each class, where there are; else as they come. Then every pixel of a class is as
            likely to be taken as any other of it.

    Returns:
        int64 (N, K), nowhere above ``counts``.
    """
    totals = counts.sum(axis=0)
    if balanced:
        shares = np.minimum(totals, max(1, wanted // int((totals > 0).sum())))
    else:
        shares = (totals * min(1.0, wanted / int(totals.sum()))).astype(np.int64)
    quotas = np.zeros(counts.shape, np.int64)
    for label in np.flatnonzero(shares):
        quotas[:, label] = counts[:, label]
        if shares[label] < totals[label]:
            drawn = rng.multinomial(shares[label], counts[:, label] / totals[label])
            quotas[:, label] = np.minimum(drawn, counts[:, label])
    return quotas


def interpolated(maps: Tensor, pixels: np.ndarray, size: int) -> Tensor:
    """The features at some pixels' centres.

    Args:
        maps: (C, h, w) of a square image.
        pixels: (P,) row · size + column.
        size: side of the image in pixels.

    Returns:
        (P, C).
    """
    rows, columns = pixels // size, pixels % size
    grid = torch.from_numpy((np.stack([columns, rows], axis=-1) + 0.5) / size * 2 - 1).to(maps.dtype)
    found = F.grid_sample(
        maps[None], grid[None, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return found[0, :, 0].T
