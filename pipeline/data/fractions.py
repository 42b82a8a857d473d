"""Label fractions: which labelled images a fine-tuning may use. Imports no torch.

For one seed the draws are nested (1 % ⊂ 10 % ⊂ 100 %), stratified by class, and a function of the targets
(and groups) alone, so that every method is given the same images.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np


def subset(targets: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Choose a stratified share of the labelled samples.

    Args:
        targets: int (N,), -1 where unlabelled; or float (N, K) of 0 and 1 for multi-label, a row with NaN
            where unlabelled.
        fraction: share of the labelled samples, in (0, 1].
        seed: another seed, another draw.

    Returns:
        int64 positions into ``targets``, ascending, of labelled samples only. Multi-class: in each class
        ``max(1, round(fraction · n_class))``. Multi-label: ``round(fraction · n)`` in all, or as many more as
        are needed for one positive of each class that has any.

    Raises:
        ValueError: the fraction is outside (0, 1].
    """
    _check(fraction)
    targets = np.asarray(targets)
    if targets.ndim == 2:
        return _multilabel(targets, fraction, seed)
    chosen = [np.empty(0, np.int64)]
    for label in np.unique(targets[targets >= 0]):
        members = np.flatnonzero(targets == label)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        chosen.append(order[: _share(len(members), fraction)])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def group_subset(targets: np.ndarray, groups: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """Choose whole groups (patients) with about a share of the labelled samples.

    All labelled samples of the chosen groups are taken. They are those of a prefix of one fixed order of the
    groups. It opens with a group for each class, the class with the fewest groups first; then the class that
    is furthest behind its share gives the next group, of the first few of its groups in random order the one
    whose classes are most like what is lacking. The opening takes none that is larger than half of a
    class's groups: one large patient would be many times 1 %.

    Args:
        targets: as of :func:`subset`.
        groups: (N,) names; an empty one is a group of its own.
        fraction: share of the labelled samples, in (0, 1]; the prefix whose share is nearest is taken.
        seed: another seed, another order.

    Returns:
        int64 positions into ``targets``, ascending, of labelled samples only, with at least one sample of
        each class that has any.

    Raises:
        ValueError: the fraction is outside (0, 1].
    """
    _check(fraction)
    member = _membership(np.asarray(targets))
    labelled = np.flatnonzero(member.any(axis=1))
    if not len(labelled):
        return labelled.astype(np.int64)
    units = units_of(groups)[labelled]
    unit, inverse = np.unique(units, return_inverse=True)
    counts = np.zeros((len(unit), member.shape[1]), np.int64)
    np.add.at(counts, inverse, member[labelled])
    sizes = np.bincount(inverse)
    wanted = fraction * len(labelled)
    order = _order_of_groups(counts, sizes, np.random.default_rng(seed).permutation(len(unit)), wanted)
    number = max(order.opening, 1 + int(np.abs(np.cumsum(sizes[order.groups]) - wanted).argmin()))
    taken = np.isin(inverse, order.groups[:number])
    return labelled[taken].astype(np.int64)


def no_groups(dataset: str) -> str:
    """What to say of a data set whose groups cannot be drawn."""
    return (
        f"finetune.fractions_by: group draws whole groups (patients), and {dataset} has none in its train"
        " split: name them by group_column (source csv), or set fractions_by: image"
    )


def units_of(groups: np.ndarray) -> np.ndarray:
    """A number for each sample's group, int64 (N,); a sample with an empty name has one of its own."""
    names = [f"g{name}" if name else f"s{place}" for place, name in enumerate(groups)]
    return np.unique(np.array(names, object).astype(str), return_inverse=True)[1].astype(np.int64)


CANDIDATES = 4  # groups that the one for the next place is chosen from


class _Order(NamedTuple):
    groups: np.ndarray  # int64 (up to G,)
    opening: int  # of them, so many hold every class


def _order_of_groups(counts: np.ndarray, sizes: np.ndarray, shuffled: np.ndarray, wanted: float) -> _Order:
    """The order that :func:`group_subset` takes prefixes of, as far as it has that many samples.

    Args:
        counts: int (G, K), samples of each class in each group.
        sizes: int (G,), samples.
        shuffled: int (G,), the groups in random order.
    """
    total = counts.sum(axis=0)
    queues = {k: [group for group in shuffled if counts[group, k]] for k in np.flatnonzero(total)}
    used = np.zeros(len(sizes), bool)
    have, images = np.zeros(len(total), np.int64), 0
    order: list[int] = []

    def take(group: int) -> None:
        nonlocal images
        used[group] = True
        have[:] += counts[group]
        images += int(sizes[group])
        order.append(int(group))

    for k in sorted(queues, key=lambda k: len(queues[k])):
        if not have[k]:
            middle = np.median(sizes[queues[k]])
            take(next(group for group in queues[k] if not used[group] and sizes[group] <= middle))
    opening = len(order)
    share, places = total / sizes.sum(), dict.fromkeys(queues, 0)
    while images < wanted:
        behind = share * (images + 1) - have
        k = max((k for k in queues if have[k] < total[k]), key=lambda k: behind[k])
        while used[queues[k][places[k]]]:
            places[k] += 1
        waiting = (group for group in islice(queues[k], places[k], None) if not used[group])
        some = np.array(list(islice(waiting, CANDIDATES)))
        alike = counts[some] @ behind / np.linalg.norm(counts[some], axis=1)  # whatever their sizes
        take(int(some[np.round(alike, 9).argmax()]))
    return _Order(np.array(order, np.int64), opening)


def _membership(targets: np.ndarray) -> np.ndarray:
    """bool (N, K): the classes of each sample, none where it is unlabelled.

    Labelled samples without any class are of one more, the last.
    """
    if targets.ndim == 1:
        return targets[:, None] == np.unique(targets[targets >= 0])
    positive = targets > 0.5
    nothing = ~positive.any(axis=1, keepdims=True) & ~np.isnan(targets).any(axis=1, keepdims=True)
    return np.concatenate([positive & ~np.isnan(targets).any(axis=1, keepdims=True), nothing], axis=1)


def _check(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"the label fraction is {fraction}; expected more than 0 and at most 1")


def _share(count: int, fraction: float) -> int:
    return max(1, int(np.floor(fraction * count + 0.5)))


def _multilabel(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Take a prefix of one fixed order, in which every prefix has about the classes' shares of the whole.

    The order opens with a positive of each class, the rarest class first; then the class that is furthest
    behind its share gives the next sample (after Sechidis et al., On the Stratification of Multi-label Data,
    2011). Samples without any positive are a class of their own.
    """
    labelled = np.flatnonzero(~np.isnan(targets).any(axis=1))
    labelled = np.random.default_rng(seed).permutation(labelled)
    positive = targets[labelled] > 0.5
    member = np.concatenate([positive, ~positive.any(axis=1, keepdims=True)], axis=1)
    count = member.sum(axis=0)
    total = len(labelled)
    queues = [iter(np.flatnonzero(column)) for column in member.T]
    used = np.zeros(total, bool)
    have = np.zeros(len(count), np.int64)
    order: list[int] = []

    def take_from(k: int) -> None:
        position = int(next(p for p in queues[k] if not used[p]))
        used[position] = True
        have[:] += member[position]
        order.append(position)

    rarest_first = [k for k in np.argsort(count[:-1], kind="stable") if count[k]]
    for k in rarest_first:
        if not have[k]:
            take_from(k)
    wanted = max(len(order), _share(total, fraction)) if total else 0
    while len(order) < wanted:
        behind = count / total * (len(order) + 1) - have
        take_from(int(np.where(have < count, behind, -np.inf).argmax()))
    return np.sort(labelled[order]).astype(np.int64)
