"""Label fractions: which labelled images a fine-tuning may use. Imports no torch.

For one seed the draws are nested (1 % ⊂ 10 % ⊂ 100 %), stratified by class, and a function of the targets
alone, so that every method is given the same images.
"""

from __future__ import annotations

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
    if not 0 < fraction <= 1:
        raise ValueError(f"the label fraction is {fraction}; expected more than 0 and at most 1")
    targets = np.asarray(targets)
    if targets.ndim == 2:
        return _multilabel(targets, fraction, seed)
    chosen = [np.empty(0, np.int64)]
    for label in np.unique(targets[targets >= 0]):
        members = np.flatnonzero(targets == label)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        chosen.append(order[: _share(len(members), fraction)])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


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
