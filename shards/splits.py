"""Splits that the source does not give: stratified by class, whole groups together, fixed by a seed."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from shards.errors import InputError
from shards.sources import SPLITS


def order(seed: int, name: str) -> bytes:
    """A sort key that puts names into a random order, for ever the same for one seed."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def missing_shares(given: Iterable[str], shares: Mapping[str, float]) -> dict[str, float]:
    """How the train split is divided where a source gives only some splits.

    A split that is missing is made out of train, as large in proportion to it as ``shares`` say: with train
    and test given, validation gets val / (train + val) of train. "" among the given stands for samples
    without a split, which are divided as train is.

    Returns:
        split → share of the samples to divide, adding up to 1; only "train" where nothing is missing.
    """
    have = set(given)
    if not have & {"train", ""}:
        raise InputError(f"the source has no train split (it has {', '.join(sorted(have))})")
    wanted = {split: shares[split] for split in SPLITS if split == "train" or split not in have}
    total = sum(wanted.values())
    return {split: share / total for split, share in wanted.items()}


def make_splits(
    units: Sequence[str], labels: Sequence[Sequence[str] | None], shares: Mapping[str, float], *, seed: int
) -> list[str]:
    """Divide samples among splits.

    The scheme is iterative stratification (Sechidis et al., 2011) over whole units: the class with the
    fewest units left goes first, and each of its units, in random order, to the split that still lacks
    most of that class. Every split gets a sample of each class that has at least as many units as there
    are splits. Units larger than half the smallest share go before the others, as only they can fail to
    fit. A unit without any label goes to train: it can serve for nothing else.

    Args:
        units: (N,) for each sample the name of its unit (its group, or itself).
        labels: (N,) its class names, or None where it is unlabelled.
        shares: split → share, adding up to 1.
        seed: of the random order.

    Returns:
        (N,) the split of each sample.

    Raises:
        InputError: too few units to give every split one.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for position, unit in enumerate(units):
        members[unit].append(position)
    counts = {unit: _class_counts(labels[position] for position in members[unit]) for unit in members}
    chosen = {unit: "train" for unit in members if not counts[unit]}
    waiting = sorted((unit for unit in members if counts[unit]), key=lambda unit: order(seed, unit))
    if len(waiting) < len(shares):
        raise InputError(f"{len(waiting)} labelled images or groups are too few to make {len(shares)} splits")
    _assign(waiting, counts, dict(shares), chosen)
    empty = [split for split in shares if split not in {chosen[unit] for unit in waiting}]
    if empty:
        raise InputError(f"{len(waiting)} labelled images or groups leave the {empty[0]} split empty")
    return [chosen[unit] for unit in units]


def _class_counts(labels: Iterable[Sequence[str] | None]) -> dict[Hashable, int]:
    """Class → samples; samples in which nothing was found count as a class of their own, None."""
    counts: dict[Hashable, int] = defaultdict(int)
    for names in labels:
        if names is not None:
            for name in names or (None,):
                counts[name] += 1
    return dict(counts)


def _assign(
    waiting: list[str],
    counts: Mapping[str, Mapping[Hashable, int]],
    shares: Mapping[str, float],
    chosen: dict[str, str],
) -> None:
    """Give each waiting unit a split, in ``chosen``."""
    splits = list(shares)
    classes = sorted(
        {name for unit in waiting for name in counts[unit]}, key=lambda name: (name is None, str(name))
    )
    column = {name: place for place, name in enumerate(classes)}
    table = np.zeros((len(waiting), len(classes)), np.int64)
    for row, unit in enumerate(waiting):
        for name, count in counts[unit].items():
            table[row, column[name]] = count
    sizes = table.sum(1)
    lacking = np.stack([_wanted(table[:, place], shares) for place in range(len(classes))], 1)
    lacking_all = np.array([shares[split] for split in splits]) * sizes.sum()
    large = sizes > 0.5 * lacking_all.min()
    left = np.ones(len(waiting), bool)
    while left.any():
        units_left = (table[left] > 0).sum(0)
        place = int(np.where(units_left > 0, units_left, np.iinfo(np.int64).max).argmin())
        rows = np.flatnonzero(left & (table[:, place] > 0))
        first = [row for row in rows[np.argsort(-table[rows, place], kind="stable")] if large[row]]
        for row in first + [row for row in rows if not large[row]]:
            keys = np.round(lacking[:, place], 9), np.round(lacking_all, 9)
            best = max(range(len(splits)), key=lambda split: (keys[0][split], keys[1][split], -split))
            chosen[waiting[row]] = splits[best]
            lacking[best] -= table[row]
            lacking_all[best] -= sizes[row]
            left[row] = False


def _wanted(counts: np.ndarray, shares: Mapping[str, float]) -> np.ndarray:
    """Samples of one class that each split should get: its share, and where possible at least one unit."""
    total, units = counts.sum(), int((counts > 0).sum())
    wanted = np.array([share * total for share in shares.values()])
    if units >= len(shares):
        wanted[1:] = np.maximum(wanted[1:], total / units)  # train, the first, gives
        wanted[0] = total - wanted[1:].sum()
    return wanted
