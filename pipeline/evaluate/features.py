"""Features of a frozen backbone, computed once a process for each set of rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import RAM_SHARE, available_memory
from pipeline.evaluate.images import plain_batches
from pipeline.evaluate.problem import Problem, Split
from pipeline.nets.backbone import Net
from pipeline.nets.export import load_exported
from pipeline.nets.pyramid import last_map

KEPT = 8  # feature tables kept in memory
KEPT_MAPS = 3  # sets of feature maps: of every train image, validation and test
_recent: OrderedDict[tuple, Tensor] = OrderedDict()
_recent_maps: OrderedDict[tuple, list[Tensor]] = OrderedDict()


def features_of(problem: Problem, split: Split) -> Tensor:
    """Pass the split's images through the frozen backbone, or remember having done so with these and others.

    A feature has the same bits in whatever company (see ``plain_batches``), so a task's result does not
    depend on what ran before it.

    Returns:
        float32 (N, num_features), on the CPU.
    """
    key = features_key(problem, split)
    if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
    for other, table in _recent.items():
        if _alike(other, key) and np.isin(split.rows, known := np.frombuffer(other[2], np.int64)).all():
            return table[torch.from_numpy(np.searchsorted(known, split.rows))]
    while len(_recent) >= KEPT:
        _recent.popitem(last=False)
    _recent[key] = _extract(problem, split)
    return _recent[key]


def _alike(one: tuple, other: tuple) -> bool:
    """Whether two keys differ in their rows alone, which in the first are in order."""
    return one[:2] == other[:2] and one[3:] == other[3:]


def every_train_image(problem: Problem) -> Split:
    """All images of the train split, labelled or not: what features are standardised by; without targets."""
    rows = np.sort(problem.index.rows("train"))
    return Split(rows, torch.full((len(rows),), -1))


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


def maps_of(problem: Problem, split: Split) -> Iterator[Tensor]:
    """The last feature maps of the split's images, float32 (B, C, h, w) on the CPU, batch by batch.

    They are remembered as tables of features are, where they fit in memory.
    """
    key = features_key(problem, split)
    if key in _recent_maps:
        _recent_maps.move_to_end(key)
        yield from _recent_maps[key]
        return
    for other, parts in _recent_maps.items():
        if _alike(other, key) and np.isin(split.rows, known := np.frombuffer(other[2], np.int64)).all():
            yield from _chosen(parts, np.searchsorted(known, split.rows))
            return
    while len(_recent_maps) >= KEPT_MAPS:
        _recent_maps.popitem(last=False)
    room = RAM_SHARE / KEPT_MAPS * available_memory()
    kept: list[Tensor] = []
    for maps in _forward(problem, split, last_map):
        room -= maps.nbytes
        if room >= 0:
            kept.append(maps)
        else:
            kept.clear()
        yield maps
    if room >= 0:
        _recent_maps[key] = kept


def _chosen(parts: list[Tensor], places: np.ndarray) -> Iterator[Tensor]:
    """Some rows of tensors (B, ...), of which all but the last have one length, in such parts again."""
    size = len(parts[0])
    for start in range(0, len(places), size):
        wanted = places[start : start + size]
        yield torch.stack([parts[place // size][place % size] for place in wanted.tolist()])


def _extract(problem: Problem, split: Split) -> Tensor:
    return torch.cat(list(_forward(problem, split, Net.features)))


@torch.no_grad()
def _forward(problem: Problem, split: Split, read: Callable[[Net, Tensor], Tensor]) -> Iterator[Tensor]:
    """What a frozen backbone gives for the split's images, float32 on the CPU, batch by batch."""
    net = load_exported(problem.backbone, num_classes=0, image_size=problem.settings.image_size)
    net = net.to(problem.device).to(memory_format=torch.channels_last).eval()
    done = 0
    for images, count in plain_batches(problem, split, image_size=net.image_size):
        with problem.autocast():
            found = read(net, images)
        yield found[:count].float().cpu()
        done += count
        problem.tick(done, len(split), "features")
