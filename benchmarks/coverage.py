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

from pipeline.report.statistics import gain_of, interval_of_mean, resample_weights


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
    print("\n| images | true accuracy | interval holds it | percentiles of resamples |")
    print("| --- | --- | --- | --- |")
    for count, truth in SCORES:
        ours, percentiles = of_a_score(count, truth, studies=studies)
        print(f"| {count} | {truth} | {ours:.3f} | {percentiles:.3f} |", flush=True)


if __name__ == "__main__":
    main()
