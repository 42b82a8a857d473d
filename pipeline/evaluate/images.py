"""Decoded images, shared by the tasks of one process: tasks packed into one job decode each image once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import ImageSet
from pipeline.data.squares import BLACK, border
from pipeline.evaluate.problem import Problem, Split
from pipeline.nets.weights import read_config

EVAL_BATCH_SIZE = 32
KEPT = 4  # image sets kept in memory: train, validation and test of one data set, and one more
_recent: dict[tuple, ImageSet] = {}


def images_of(
    problem: Problem, split: Split, *, image_size: int, masks: bool = False
) -> tuple[ImageSet, np.ndarray]:
    """An image set that holds the split's images, with their masks if asked for, and where in it they are.

    A set made before in this process is used again if it holds all of them, since decoding an image gives the
    same pixels in whatever company. It may have masks though none were asked for.

    Returns:
        The set, and int64 (N,) positions into it.
    """
    settings = problem.settings
    fill = border(read_config(problem.backbone)["pretrained_cfg"]["mean"]) if settings.fit == "pad" else BLACK
    kind = (
        str(problem.index.folder),
        image_size,
        settings.fit,
        fill,
        settings.cache,
        settings.workers,
        str(problem.device),
    )
    for key, images in list(_recent.items()):
        if key[:-1] == kind and images.masks >= masks and np.isin(split.rows, images.rows).all():
            _recent[key] = _recent.pop(key)  # most recently used last
            return images, _positions(images.rows, split.rows)
    images = ImageSet(
        problem.index,
        split.rows,
        image_size=image_size,
        fit=settings.fit,
        fill=fill,
        cache=settings.cache,
        device=problem.device,
        workers=settings.workers,
        masks=masks,
    )
    for key in [k for k, old in _recent.items() if k[:-1] == kind and np.isin(old.rows, split.rows).all()]:
        del _recent[key]
    while len(_recent) >= KEPT:
        del _recent[next(iter(_recent))]
    _recent[(*kind, split.rows.tobytes())] = images
    return images, np.arange(len(split))


def _positions(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    order = np.argsort(rows, kind="stable")
    return order[np.searchsorted(rows, wanted, sorter=order)]


def plain_batches(
    problem: Problem, split: Split, *, image_size: int, batch_size: int = EVAL_BATCH_SIZE
) -> Iterator[tuple[Tensor, int]]:
    """The split's images in order and without augmentation, in batches of one size.

    The last batch is filled up with its first image, since the last bits of what a net makes of an image
    depend on the shape of the batch (which decides the kernels), but not on the other images in it. So a
    prediction has the same bits in whatever company.

    Yields:
        Float (B, 3, S, S) in [0, 1] on the device, and how many of the first images are the split's.
    """
    images, positions = images_of(problem, split, image_size=image_size)
    orders = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    counts = [len(order) for order in orders]
    if orders:
        orders[-1] = np.concatenate([orders[-1], np.repeat(orders[-1][:1], batch_size - counts[-1])])
    for batch, count in zip(images.batches(orders), counts, strict=True):
        yield batch[:, :3].float().div_(255).contiguous(memory_format=torch.channels_last), count
