from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.report.statistics import (
    holm,
    interval,
    intervals,
    mean_std,
    paired_t,
    resample_weights,
    seed_weights,
)


def test_resamples_draw_whole_groups() -> None:
    groups = ["a", "a", "b", "", "c", "c", "c", ""]
    weights = resample_weights(groups, count=8, draws=300, seed=0)
    assert weights.shape == (300, 8)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 4] == weights[:, 5]).all() and (weights[:, 4] == weights[:, 6]).all()
    assert (weights[:, 3] != weights[:, 7]).any()  # no name: a group of its own
    assert (weights[:, [0, 2, 3, 4, 7]].sum(axis=1) == 5).all()  # as many groups as there are
    assert weights.mean() == pytest.approx(1, abs=0.05)


def test_resamples_depend_on_the_seed_alone() -> None:
    first, again, other = (resample_weights(None, count=20, draws=5, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_group_resampling_covers_and_image_resampling_does_not() -> None:
    """Patients of 5 images whose outcomes hang together: one interval holds the truth in 95 % of cases."""
    patients, images, truth = 80, 5, 0.7
    rng = np.random.default_rng(0)
    names = np.repeat([f"patient {number}" for number in range(patients)], images)
    by_group = resample_weights(list(names), count=len(names), draws=300, seed=1)
    by_image = resample_weights(None, count=len(names), draws=300, seed=1)
    covered = np.zeros(2)
    simulations = 500
    for _ in range(simulations):
        # an image repeats its patient's outcome with probability .84: a design effect of 1 + 4 · .84² = 3.8
        of_patient = np.repeat(rng.random(patients) < truth, images)
        own = rng.random(patients * images) < truth
        right = np.where(rng.random(patients * images) < 0.84, of_patient, own).astype(np.float32)
        for place, weights in enumerate((by_group, by_image)):
            low, high = interval(weights @ right / weights.sum(axis=1), 0.95)
            covered[place] += low <= truth <= high
    grouped, single = covered / simulations
    assert 0.92 <= grouped <= 0.98
    assert 0.60 <= single <= 0.76


def test_of_n_seeds_one_less_is_drawn_so_that_the_variance_is_that_of_a_mean() -> None:
    for seeds in (2, 3, 10):
        weights = seed_weights(seeds, draws=20_000, seed=0)
        np.testing.assert_array_equal(weights, seed_weights(seeds, draws=20_000, seed=0))
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        assert set(np.round(weights * (seeds - 1), 9).ravel()) <= set(range(seeds))
        gains = np.random.default_rng(seeds).normal(size=seeds)
        drawn = weights @ gains
        assert drawn.mean() == pytest.approx(gains.mean(), abs=0.03)
        assert drawn.var() == pytest.approx(gains.var(ddof=1) / seeds, rel=0.05)
    np.testing.assert_array_equal(seed_weights(1, draws=4, seed=0), np.ones((4, 1)))


@pytest.mark.parametrize(
    ("seeds", "images", "low", "high", "images_only_at_most"),
    [(12, 150, 0.93, 0.98, 0.70), (3, 150, 0.90, 0.97, 0.70), (3, 1000, 0.74, 0.90, 0.40)],
)
def test_interval_over_seeds_and_images_covers_where_one_over_images_does_not(
    seeds: int, images: int, low: float, high: float, images_only_at_most: float
) -> None:
    """Accuracy gains of seeds that differ strongly: each has a gain of its own, drawn around .1.

    Of three seeds on a large test split no percentile reaches beyond the smallest and the greatest gain.
    """
    truth = 0.1
    rng = np.random.default_rng(0)
    by_image = resample_weights(None, count=images, draws=300, seed=1)
    by_seed = seed_weights(seeds, draws=300, seed=1).T
    covered = np.zeros(2)
    simulations = 400
    for _ in range(simulations):
        better = rng.normal(truth, 0.1, seeds)[:, None]
        method = rng.random((seeds, images)) < 0.6 + better
        base = rng.random((seeds, images)) < 0.6
        gains = (method.astype(np.float32) - base) @ by_image.T / images  # (seeds, draws)
        ends = intervals([(gains * by_seed).sum(axis=0), gains.mean(axis=0)], 0.95)
        covered += (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    both, images_only = covered / simulations
    assert low <= both <= high
    assert images_only <= images_only_at_most


def test_holm_multiplies_by_the_number_of_hypotheses_that_are_left() -> None:
    # smallest first: 4 · .01, 3 · .02 = .06, 2 · .03 = .06, 1 · .04 < .06
    np.testing.assert_allclose(holm([0.03, 0.01, 0.04, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.5]), [1, 1])
    np.testing.assert_allclose(holm([0.01, np.nan, 0.02]), [0.02, np.nan, 0.02])  # a family of two
    assert holm([]).shape == (0,) and np.isnan(holm([np.nan])).all()


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        p_values = rng.choice([0.001, 0.004, 0.01, 0.02, 0.3, 0.8], size=7)
        alpha = rng.uniform(0.005, 0.2)
        rejected, order = np.zeros(7, bool), np.argsort(p_values)
        for step, at in enumerate(order):
            if p_values[at] > alpha / (7 - step):
                break
            rejected[at] = True
        np.testing.assert_array_equal(holm(p_values) <= alpha, rejected)


def test_interval_is_the_central_share_and_ignores_what_does_not_exist() -> None:
    values = np.r_[np.linspace(0, 1, 1001), np.nan]
    assert interval(values, 0.9) == pytest.approx((0.05, 0.95))
    assert np.isnan(interval(np.full(3, np.nan), 0.9)).all()


def test_paired_t_is_scipys_and_says_when_seeds_are_few() -> None:
    method, base = np.array([0.8, 0.9, 0.85, 0.7, 0.95]), np.array([0.7, 0.85, 0.8, 0.72, 0.8])
    p_value, note = paired_t(method - base)
    assert p_value == pytest.approx(stats.ttest_rel(method, base).pvalue)
    assert note == ""
    assert "2 seeds" in paired_t([0.1, 0.2])[1]


def test_one_seed_and_equal_gains_have_no_p_value() -> None:
    for gains, reason in (([0.3], "one seed"), ([0.1, 0.1, 0.1], "equal gain")):
        p_value, note = paired_t(gains)
        assert np.isnan(p_value)
        assert reason in note
    assert paired_t([0.0, 0.0])[0] == 1


def test_one_value_has_no_spread() -> None:
    assert mean_std([0.2, 0.4]) == pytest.approx((0.3, np.sqrt(0.02)))
    mean, std = mean_std([0.2])
    assert mean == 0.2 and np.isnan(std)
