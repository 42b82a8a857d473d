"""Intervals and p-values over test samples and pretrainings. Imports no torch.

The bootstrap draws with replacement, from the test split, whole groups where samples belong to groups: the
images of one patient stand or fall together, and drawing them one by one makes intervals far too narrow. A
resample is a row of weights, how often each sample was drawn, so that one matrix serves every prediction made
on the same samples.

From the resamples comes a variance, and from that, with Student's t over as many groups as there are, an
interval: percentiles of resamples are too narrow with few groups (``python -m benchmarks coverage`` shows
both). Pretrainings are crossed with test samples, since each predicts the same ones: their variances add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

FEW_SEEDS = 5  # pretrainings: below it, a test or an interval over them says little
FEWEST_GROUPS = 8  # of a test split: below it, "95 %" would cover .44 to .85
FEW_GROUPS = 30  # below it, intervals are wide and rest on few patients
POWER = 0.8  # of the smallest gain that a study could show
NAN = float("nan")


def number_of_groups(groups: Sequence[str] | None, count: int) -> int:
    """How many units of ``count`` samples can be drawn: groups, an empty name being a group of its own."""
    if groups is None:
        return count
    return len({name or f"\0{position}" for position, name in enumerate(groups)})


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


def interval_of_mean(value: float, variance: float, *, units: int, confidence: float) -> tuple[float, float]:
    """The interval of a score between 0 and 1 over other test samples.

    Wilson's score interval (JASA 1927) with the effective sample size of a clustered sample, m (1 - m) /
    variance (Korn and Graubard, Survey Methodology 1998), and Student's t with a degree of freedom fewer than
    there are groups. Near 0 and 1, where resamples hardly differ, it stays as wide as so few groups ask for.

    Args:
        value: the score m.
        variance: of it under the bootstrap's resamples of groups.
        units: groups in the test split.

    Returns:
        NaN and NaN below ``FEWEST_GROUPS``, where no interval holds what it promises.
    """
    if units < FEWEST_GROUPS or math.isnan(value) or math.isnan(variance):
        return NAN, NAN
    t = float(stats.t.ppf((1 + confidence) / 2, units - 1))
    return _wilson(value, variance * units / (units - 1), units=units, t=t)


def score_of_repeats(
    values: ArrayLike, *, ratio: float, units: int, test_units: int, confidence: float
) -> tuple[float, float]:
    """The interval of a score between 0 and 1 over repeated splits.

    Variance and degrees of freedom are those of :func:`gain_of_repeats`, the interval is Wilson's, as
    :func:`interval_of_mean` has it: where all splits score alike it stays as wide as so few groups ask for.

    Args:
        values: (J,), the mean score of each split.
        ratio: groups in test over groups in train.
        units: groups in the data set.
        test_units: groups in the test split of any.
    """
    array = np.asarray(values, np.float64)
    if len(array) < 2 or units < FEWEST_GROUPS or math.isnan(ratio):
        return NAN, NAN
    variance = (1 / len(array) + ratio) * float(array.var(ddof=1))
    t = float(stats.t.ppf((1 + confidence) / 2, min(len(array), units) - 1))
    return _wilson(float(array.mean()), variance, units=test_units, t=t)


def _wilson(value: float, variance: float, *, units: int, t: float) -> tuple[float, float]:
    """Wilson's score interval of a share with this variance; of so many units where there is none to see."""
    inner = value * (1 - value)
    size = inner / variance if variance > 0 and inner > 0 else float(units)
    scale = 1 + t**2 / size
    centre = (value + t**2 / (2 * size)) / scale
    half = t / scale * math.sqrt(inner / size + t**2 / (4 * size**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Gain:
    """What a mean of paired differences, one a pretraining, says of other pretrainings and test samples.

    Attributes:
        low, high: interval over pretrainings and test groups; NaN where it cannot be had.
        test_low, test_high: interval over test groups alone, for these very pretrainings.
        p_value: two-sided; below 1 - confidence exactly where the interval excludes 0.
        smallest: the gain that such a study shows in four cases of five, if it is there.
    """

    low: float
    high: float
    test_low: float
    test_high: float
    p_value: float
    smallest: float


def gain_of(
    differences: ArrayLike,
    variance: float,
    *,
    each: float,
    units: int,
    confidence: float,
    seeds: bool = True,
) -> Gain:
    """Test the mean of paired differences over other pretrainings and other test samples at once.

    Both vary the mean, and they are crossed: its variance is s² / n over the n differences, plus that under
    the bootstrap's resamples of test groups, less what is in both: what one pretraining and one group do to
    each other. (n - 1 times that is what a mean of n varies less than each does.) Student's t has the degrees
    of freedom of Welch and Satterthwaite (Satterthwaite, Biometrics Bulletin 1946), from n - 1 and the number
    of groups less one, nothing taken off. With three pretrainings whose s² happens to be small these are too
    many: the interval is at least as wide as those of both parts together, each with its own t.

    Args:
        differences: (n,), one a pretraining.
        variance: of their mean under resamples of groups, the pretrainings as they are.
        each: the mean over pretrainings of the variance of each one's difference under these resamples.
        units: groups in the test split.
        seeds: False where all share one pretraining: then only the interval over test samples is given.
    """
    values = np.asarray(differences, np.float64)
    n, mean = len(values), float(values.mean())
    if units < FEWEST_GROUPS or math.isnan(variance):
        return Gain(NAN, NAN, NAN, NAN, NAN, NAN)
    of_groups = variance * units / (units - 1)
    half = float(stats.t.ppf((1 + confidence) / 2, units - 1)) * math.sqrt(of_groups)
    test = mean - half, mean + half
    if n < 2 or not seeds:
        return Gain(NAN, NAN, *test, NAN, NAN)
    of_seeds = float(values.var(ddof=1)) / n
    in_both = max(0.0, each * units / (units - 1) - of_groups) / (n - 1)
    own = max(0.0, of_seeds - in_both)
    total = of_groups + own
    if total <= 0:
        return Gain(mean, mean, *test, 1.0 if mean == 0 else NAN, NAN)
    freedom = total**2 / (of_seeds**2 / (n - 1) + of_groups**2 / (units - 1))
    error = math.sqrt(total)

    def quantile(tail: float) -> float:
        """In standard errors, what a mean exceeds to each side with this probability if there is no gain."""
        seeds_t, groups_t, both_t = (
            float(stats.t.isf(tail, degrees)) for degrees in (n - 1, units - 1, freedom)
        )
        return max(both_t, math.sqrt((own * seeds_t**2 + of_groups * groups_t**2) / total))

    half = quantile((1 - confidence) / 2) * error
    p_value = 2 * _tail_of(abs(mean) / error, quantile)
    smallest = half + float(stats.t.ppf(POWER, freedom)) * error
    return Gain(mean - half, mean + half, *test, p_value, smallest)


def gain_of_repeats(values: ArrayLike, *, ratio: float, units: int, confidence: float) -> Gain:
    """Test the mean over repeated splits of a data set, each with other train and test groups.

    The splits are of the same few groups, so their values hang together, and s² / J over J of them is far too
    small. The corrected resampled t-test (Nadeau and Bengio, Machine Learning 2003) takes (1 / J + n_test /
    n_train) · s² for the variance. Student's t has a degree of freedom less than there are splits or groups,
    whichever are fewer: more splits than groups say nothing new.

    Args:
        values: (J,), the mean score, or mean difference, of each split.
        ratio: groups in test over groups in train.
        units: groups in the data set.

    Returns:
        NaN throughout below two splits or ``FEWEST_GROUPS`` groups, or where all splits are alike; the
        interval over test samples alone is always NaN.
    """
    array = np.asarray(values, np.float64)
    number = len(array)
    if number < 2 or units < FEWEST_GROUPS or math.isnan(ratio):
        return Gain(NAN, NAN, NAN, NAN, NAN, NAN)
    mean, freedom = float(array.mean()), min(number, units) - 1
    error = math.sqrt((1 / number + ratio) * float(array.var(ddof=1)))
    if error <= 0:  # no split differs from another: that says nothing of other groups
        return Gain(NAN, NAN, NAN, NAN, NAN, NAN)
    half = float(stats.t.isf((1 - confidence) / 2, freedom)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    smallest = half + float(stats.t.ppf(POWER, freedom)) * error
    return Gain(mean - half, mean + half, NAN, NAN, p_value, smallest)


def _tail_of(value: float, quantile: Callable[[float], float]) -> float:
    """The probability at which ``quantile``, which falls to 0 at a half, is ``value``; 0 below 1e-30."""
    if value <= 0:
        return 0.5
    low, high = math.log(1e-30), math.log(0.5)
    if quantile(math.exp(low)) <= value:
        return 0.0
    return math.exp(optimize.brentq(lambda tail: quantile(math.exp(tail)) - value, low, high))


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
