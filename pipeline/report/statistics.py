"""Intervals over test samples and seeds, and p-values over seeds. Imports no torch.

The bootstrap draws with replacement, from the test split, whole groups where samples belong to groups: the
images of one patient stand or fall together, and drawing them one by one makes intervals far too narrow. A
resample is a row of weights, how often each sample was drawn, so that one matrix serves every prediction made
on the same samples.

Seeds are drawn beside the samples and not within them, since every seed predicts the same samples: the two
factors are crossed (Owen, *The pigeonhole bootstrap*, Annals of Applied Statistics 2007).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

FEW_SEEDS = 5  # below it, a test or an interval over seeds says little


def resample_weights(groups: Sequence[str] | None, *, count: int, draws: int, seed: int) -> np.ndarray:
    """Bootstrap resamples as weights.

    Args:
        groups: one name a sample; an empty name is a group of its own. None: every sample is.
        count: number of samples N.
        draws: number of resamples B.
        seed: of the draws.

    Returns:
        float32 (B, N): how often each sample is in each resample. Samples of one group have equal weights; in
        each row as many groups are drawn as there are.
    """
    if groups is None:
        member = np.arange(count)
    else:
        names = [name or f"\0{position}" for position, name in enumerate(groups)]
        member = np.unique(names, return_inverse=True)[1]
    units = int(member.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=draws)
    return drawn[:, member].astype(np.float32)


def seed_weights(seeds: int, *, draws: int, seed: int) -> np.ndarray:
    """Resamples of seeds as weights: of n seeds, n - 1 are drawn with replacement.

    With one less than there are, the variance of the drawn mean is the unbiased one of a mean, s² / n (Rao
    and Wu, *Resampling inference with complex survey data*, JASA 1988); with n it is (n - 1) / n of that, a
    third too little with three seeds.

    Args:
        seeds: their number n.
        draws: number of resamples B.
        seed: of the draws.

    Returns:
        float64 (B, n): the share of each seed in each resample; rows add up to 1. One seed is all of it.
    """
    if seeds == 1:
        return np.ones((draws, 1))
    drawn = np.random.default_rng([seed, seeds]).multinomial(seeds - 1, np.full(seeds, 1 / seeds), size=draws)
    return drawn / (seeds - 1)


def intervals(values: Sequence[np.ndarray], confidence: float) -> np.ndarray:
    """:func:`interval` of each of R arrays of one length: (R, 2), to the same bits and much faster."""
    found = np.empty((len(values), 2))
    if not len(values):
        return found
    rows = np.stack(values)
    whole = ~np.isnan(rows).any(axis=1)
    if whole.any():
        found[whole] = np.quantile(rows[whole], _ends(confidence), axis=1).T
    for row in np.flatnonzero(~whole):
        found[row] = interval(rows[row], confidence)
    return found


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The central percentile interval of bootstrap values; NaN where no resample has a value."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, _ends(confidence))
    return float(low), float(high)


def _ends(confidence: float) -> list[float]:
    return [(1 - confidence) / 2, (1 + confidence) / 2]


def paired_t(differences: ArrayLike) -> tuple[float, str]:
    """Two-sided paired t-test of the differences, one a seed.

    Returns:
        The p-value, NaN where there is none, and a note that is empty only when there is nothing to warn of.
    """
    return paired_ts([np.asarray(differences, np.float64)])[0]


def paired_ts(differences: Sequence[np.ndarray]) -> list[tuple[float, str]]:
    """:func:`paired_t` of each of several arrays, those of one length in one call."""
    found = []
    to_test: dict[int, list[int]] = {}
    for position, values in enumerate(differences):
        few = f"{len(values)} seeds: too few to say much of other seeds" if len(values) < FEW_SEEDS else ""
        if len(values) < 2:
            found.append((float("nan"), "one seed: no p-value, and an interval over test samples only"))
        elif np.ptp(values) > 1e-12 * np.abs(values).max():
            found.append((float("nan"), few))
            to_test.setdefault(len(values), []).append(position)
        elif not values.any():
            found.append((1.0, few))
        else:
            found.append((float("nan"), "equal gain on every seed: no p-value"))
    for positions in to_test.values():
        tested = stats.ttest_1samp(np.stack([differences[at] for at in positions]), 0.0, axis=1)
        for at, p_value in zip(positions, tested.pvalue.tolist()):
            found[at] = (p_value, found[at][1])
    return found


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values adjusted for being several, by the step-down rule of Holm (Scand. Journal of Statistics 1979).

    Rejecting where the adjusted value is at most α keeps the chance of any wrong rejection in the family at
    most α, whatever the dependence between the tests.

    Args:
        p_values: (m,), one family.

    Returns:
        (m,): with p-values in rising order, the largest so far of (m - i) · p_i for i = 0, 1, …, at most 1.
        A NaN is no test: it stays and does not count.
    """
    p_values = np.asarray(p_values, np.float64)
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(p_values, kind="stable")[: int((~np.isnan(p_values)).sum())]  # NaNs sort to the end
    steps = np.arange(len(order), 0, -1) * p_values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def mean_std(values: ArrayLike) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1); the latter is NaN for one value."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")
