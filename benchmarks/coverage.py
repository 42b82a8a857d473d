"""How often intervals hold the truth, and how often a gain is found where there is none.

    python -m benchmarks coverage [--studies N]

Simulated studies, on one core: patients of several images, two methods without any difference but chance, and
scores of known accuracy. What came out is in ``benchmarks/NOTES.md``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pipeline.report.statistics import (
    gain_of,
    gain_of_repeats,
    interval_of_mean,
    resample_weights,
    score_of_repeats,
)


@dataclass(frozen=True)
class Study:
    """Test groups of about ``images`` images each, ``seeds`` pretrainings, all effects on the logit scale."""

    groups: int
    images: int
    seeds: int
    seed_sd: float  # of a pretraining's level
    group_sd: float  # of how much more a method likes one group than another


STUDIES = (
    Study(100, 5, 3, seed_sd=0.0, group_sd=0.8),
    Study(100, 5, 5, seed_sd=0.0, group_sd=0.8),
    Study(20, 5, 3, seed_sd=0.0, group_sd=0.8),
    Study(30, 5, 3, seed_sd=0.3, group_sd=0.8),
    Study(100, 5, 3, seed_sd=0.5, group_sd=0.8),
    Study(100, 5, 3, seed_sd=0.2, group_sd=0.0),
    Study(20, 5, 5, seed_sd=0.3, group_sd=0.4),
    Study(100, 5, 10, seed_sd=0.3, group_sd=0.8),
)


@dataclass(frozen=True)
class Repeated:
    """Groups of about five images, split 70/10/20 so many times, three pretrainings a split.

    The pretrainings of a method are better or worse with the groups that they are trained on, by a normal
    effect whose SD is ``train_sd``; splits share most of these groups, so it is much the same in all.
    """

    groups: int
    repeats: int
    group_sd: float
    train_sd: float
    seeds: int = 3
    seed_sd: float = 0.2
    level: float = 0.75  # accuracy of a group like most


REPEATED = tuple(
    Repeated(groups, repeats, group_sd=0.8, train_sd=train_sd)
    for groups in (8, 12, 20)
    for repeats in (3, 5, 10)
    for train_sd in (0.0, 0.2)
)
CEILING = tuple(Repeated(groups, 5, group_sd=0.3, train_sd=0.1, level=0.97) for groups in (8, 12, 20))
HARDER = tuple(Repeated(40, repeats, group_sd=0.8, train_sd=0.3) for repeats in (5, 20))
SCORES = ((50, 0.98), (50, 0.75), (20, 0.75), (100, 0.95), (10, 0.8))  # images, true accuracy


@dataclass(frozen=True)
class Found:
    """Shares of the studies."""

    rejected: float  # p < .05, though there is no gain
    covered: float  # the interval holds 0
    by_seeds_alone: float  # p < .05 of a paired t-test over pretrainings


def outcomes(study: Study, rng: np.random.Generator, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong (S, N) of two methods, as floats; ``groups`` (N,) numbers the group of each image.

    Groups differ, each method does better on some groups than on others, and each pretraining is better or
    worse on the whole; all around three right answers in four.
    """
    of_group = rng.normal(0, 0.7, study.groups)
    found = []
    for _ in range(2):
        likes = rng.normal(0, study.group_sd, study.groups)
        pretrainings = rng.normal(0, study.seed_sd, (study.seeds, 1))
        levels = np.log(3) + of_group[groups] + likes[groups] + pretrainings
        found.append((rng.random((study.seeds, len(groups))) < 1 / (1 + np.exp(-levels))).astype(float))
    return found[0], found[1]


def without_gain(study: Study, *, studies: int, draws: int = 200, seed: int = 0) -> Found:
    """The study repeated, each time with other patients and pretrainings."""
    rng = np.random.default_rng(seed)
    rejected = covered = by_seeds_alone = 0
    for number in range(studies):
        groups = np.repeat(np.arange(study.groups), rng.integers(1, 2 * study.images, study.groups))
        method, base = outcomes(study, rng, groups)
        weights = resample_weights(
            [str(group) for group in groups], count=len(groups), draws=draws, seed=number
        )
        drawn = (method - base) @ (weights / weights.sum(axis=1, keepdims=True)).T
        differences = (method - base).mean(axis=1)
        gain = gain_of(
            differences,
            drawn.mean(axis=0).var(ddof=1),
            each=drawn.var(axis=1, ddof=1).mean(),
            units=study.groups,
            confidence=0.95,
        )
        rejected += gain.p_value < 0.05
        covered += gain.low <= 0 <= gain.high
        by_seeds_alone += stats.ttest_1samp(differences, 0).pvalue < 0.05
    return Found(rejected / studies, covered / studies, by_seeds_alone / studies)


@dataclass(frozen=True)
class FoundOverRepeats:
    """Shares of the studies."""

    rejected: float  # p < .05, though there is no gain
    covered: float  # the interval of the gain holds 0
    score: float  # that of a score holds the expected one
    naive: float  # t over splits as if they were independent: it holds 0


def over_repeats(study: Repeated, *, studies: int, seed: int = 0) -> FoundOverRepeats:
    """The study repeated, each time with other patients: two methods that differ by chance alone."""
    rng = np.random.default_rng(seed)
    spread = np.sqrt(0.7**2 + study.group_sd**2 + study.train_sd**2 + study.seed_sd**2)
    usual = np.log(study.level / (1 - study.level))
    levels = usual + spread * stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    truth = float((1 / (1 + np.exp(-levels))).mean())
    test, val = max(1, round(0.2 * study.groups)), max(1, round(0.1 * study.groups))
    train = study.groups - test - val
    sums = np.zeros(4)
    for _ in range(studies):
        images = rng.integers(1, 10, study.groups)
        of_group = rng.normal(0, 0.7, study.groups)
        likes = rng.normal(0, study.group_sd, (2, 1, study.groups))
        worth = rng.normal(0, study.train_sd * np.sqrt(train), (2, study.groups))
        scores = np.zeros((2, study.repeats))
        tested_once: set[int] = set()
        for number in range(study.repeats):
            order = rng.permutation(study.groups)
            tested = order[:test]
            tested_once |= set(tested.tolist())
            trained = worth[:, order[test + val :]].mean(axis=1)[:, None, None]
            pretrainings = rng.normal(0, study.seed_sd, (2, study.seeds, 1))
            levels = usual + of_group[tested] + likes[..., tested] + trained + pretrainings
            right = rng.binomial(images[tested], 1 / (1 + np.exp(-levels)))
            scores[:, number] = right.sum(axis=2).mean(axis=1) / images[tested].sum()
        asked = {"ratio": test / train, "units": study.groups, "confidence": 0.95}
        gains = scores[0] - scores[1]
        gain = gain_of_repeats(gains, **asked)
        low, high = score_of_repeats(scores[0], test_units=len(tested_once), **asked)
        alike = np.ptp(gains) == 0  # then there is no interval that could be wrong
        naive = alike or float(stats.ttest_1samp(gains, 0).pvalue) >= 0.05
        sums += gain.p_value < 0.05, alike or gain.low <= 0 <= gain.high, low <= truth <= high, naive
    return FoundOverRepeats(*(sums / studies).tolist())


def of_a_score(
    count: int, truth: float, *, studies: int, draws: int = 200, seed: int = 1
) -> tuple[float, float]:
    """Coverage of 95 % intervals of an accuracy: ours, and percentiles of resamples."""
    rng = np.random.default_rng(seed)
    ours = percentiles = 0
    for number in range(studies):
        right = (rng.random(count) < truth).astype(float)
        drawn = resample_weights(None, count=count, draws=draws, seed=number) @ right / count
        low, high = interval_of_mean(right.mean(), drawn.var(ddof=1), units=count, confidence=0.95)
        ours += low <= truth <= high
        low, high = np.percentile(drawn, [2.5, 97.5])
        percentiles += low <= truth <= high
    return ours / studies, percentiles / studies


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks coverage", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--studies", type=int, default=1500)
    studies = parser.parse_args().studies
    print("| groups × images, seeds | SD of seeds | SD of groups | p < .05 | holds 0 | t-test over seeds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for study in STUDIES:
        found = without_gain(study, studies=studies)
        print(
            f"| {study.groups} × {study.images}, {study.seeds} | {study.seed_sd} | {study.group_sd} |"
            f" {found.rejected:.3f} | {found.covered:.3f} | {found.by_seeds_alone:.3f} |",
            flush=True,
        )
    print(
        "\n| groups, splits | accuracy | SD of train groups | p < .05 | holds 0 | score's holds it |"
        " t over splits |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for repeated in (*REPEATED, *CEILING, *HARDER):
        of = over_repeats(repeated, studies=studies)
        print(
            f"| {repeated.groups}, {repeated.repeats} | {repeated.level} | {repeated.train_sd} |"
            f" {of.rejected:.3f} | {of.covered:.3f} | {of.score:.3f} | {of.naive:.3f} |",
            flush=True,
        )
    print("\n| images | true accuracy | interval holds it | percentiles of resamples |")
    print("| --- | --- | --- | --- |")
    for count, truth in SCORES:
        ours, percentiles = of_a_score(count, truth, studies=studies)
        print(f"| {count} | {truth} | {ours:.3f} | {percentiles:.3f} |", flush=True)


if __name__ == "__main__":
    main()
