from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.fractions import subset

COUNTS = (500, 120, 40, 9, 2)


def single_labels() -> np.ndarray:
    targets = np.repeat(np.arange(len(COUNTS)), COUNTS)
    targets = np.concatenate([targets, np.full(50, -1)])
    return np.random.default_rng(3).permutation(targets)


def multi_labels(n: int = 400) -> np.ndarray:
    rng = np.random.default_rng(4)
    targets = (rng.random((n, 5)) < [0.4, 0.2, 0.1, 0.03, 0.01]).astype(np.float32)
    targets[rng.choice(n, 30, replace=False)] = np.nan
    targets[:, 4] = np.where(np.isnan(targets[:, 4]), np.nan, 0)
    targets[np.flatnonzero(~np.isnan(targets[:, 0]))[:2], 4] = 1  # a class of two samples
    return targets


@pytest.mark.parametrize("targets", [single_labels(), multi_labels()], ids=["single", "multi"])
@pytest.mark.parametrize("seed", [0, 1])
def test_fractions_of_one_seed_are_nested_and_labelled(targets: np.ndarray, seed: int) -> None:
    labelled = targets >= 0 if targets.ndim == 1 else ~np.isnan(targets).any(axis=1)
    previous: set[int] = set()
    for fraction in (0.001, 0.01, 0.05, 0.1, 0.33, 0.5, 1.0):
        chosen = subset(targets, fraction, seed=seed)
        assert chosen.dtype == np.int64
        assert (np.diff(chosen) > 0).all()
        assert labelled[chosen].all()
        assert previous <= set(chosen)
        previous = set(chosen)
    assert previous == set(np.flatnonzero(labelled))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.37])
def test_every_class_keeps_its_share_and_at_least_one(fraction: float) -> None:
    targets = single_labels()
    counts = np.bincount(targets[subset(targets, fraction, seed=0)], minlength=len(COUNTS))
    for got, there in zip(counts, COUNTS):
        assert got >= 1
        assert abs(got - max(1, fraction * there)) <= 0.5


@pytest.mark.parametrize("fraction", [0.002, 0.05, 0.3])
def test_multilabel_classes_keep_their_shares_and_at_least_one(fraction: float) -> None:
    targets = multi_labels()
    labelled = targets[~np.isnan(targets).any(axis=1)]
    chosen = targets[subset(targets, fraction, seed=0)]
    assert len(chosen) >= int(fraction * len(labelled) + 0.5)
    assert (chosen.sum(axis=0) >= 1).all()
    if fraction >= 0.05:
        assert len(chosen) == int(fraction * len(labelled) + 0.5)
        assert (np.abs(chosen.mean(axis=0) - labelled.mean(axis=0)) < 1.5 / len(chosen) + 0.06).all()
        nothing = (chosen == 0).all(axis=1).mean(), (labelled == 0).all(axis=1).mean()
        assert abs(nothing[0] - nothing[1]) < 0.12


def test_another_seed_draws_other_images() -> None:
    targets = single_labels()
    first, second = (subset(targets, 0.1, seed=seed) for seed in (0, 1))
    assert len(first) == len(second)
    assert set(first) != set(second)


def test_draw_is_the_same_again() -> None:
    for targets in (single_labels(), multi_labels()):
        np.testing.assert_array_equal(subset(targets, 0.1, seed=5), subset(targets.copy(), 0.1, seed=5))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="label fraction"):
        subset(single_labels(), fraction, seed=0)


def test_no_labels_give_no_positions() -> None:
    assert len(subset(np.full(7, -1), 0.5, seed=0)) == 0
    assert len(subset(np.full((7, 2), np.nan, np.float32), 0.5, seed=0)) == 0
