from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.report.statistics import interval, mean_std, paired_t, resample_weights


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
