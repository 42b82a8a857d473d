"""Features of a frozen backbone, computed once a process for each set of rows."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from pipeline.evaluate.images import plain_batches
from pipeline.evaluate.problem import Problem, Split
from pipeline.nets.export import load_exported

BATCH_SIZE = 128
KEPT = 8  # feature tables kept in memory
_recent: OrderedDict[tuple, Tensor] = OrderedDict()


def features_of(problem: Problem, split: Split) -> Tensor:
    """Pass the split's images through the frozen backbone, or remember having done so.

    Tables are remembered by exactly their rows, never sliced from larger ones: the last bits of a feature may
    depend on the images it shared a batch with, and a task's result must not depend on what ran before it.

    Returns:
        float32 (N, num_features), on the CPU.
    """
    key = features_key(problem, split)
    if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
    while len(_recent) >= KEPT:
        _recent.popitem(last=False)
    _recent[key] = _extract(problem, split)
    return _recent[key]


def features_key(problem: Problem, split: Split) -> tuple:
    """All that decides a table of features."""
    return (
        str(problem.backbone),
        str(problem.index.folder),
        split.rows.tobytes(),
        problem.settings.image_size,
        problem.settings.fit,
        problem.settings.precision,
        str(problem.device),
    )


@torch.no_grad()
def _extract(problem: Problem, split: Split) -> Tensor:
    net = load_exported(problem.backbone, num_classes=0, image_size=problem.settings.image_size)
    net = net.to(problem.device).to(memory_format=torch.channels_last).eval()
    rows = []
    with problem.autocast():
        for images in plain_batches(problem, split, image_size=net.image_size, batch_size=BATCH_SIZE):
            rows.append(net.features(images).float().cpu())
            problem.tick(len(rows) * BATCH_SIZE, len(split), "features")
    return torch.cat(rows)
