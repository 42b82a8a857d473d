from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.fractions import group_subset, subset, units_of

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


def patients(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """150 patients with 1 to 20 images each, most of them of one class, some of two; one has 300."""
    rng = np.random.default_rng(seed)
    targets, groups = [], []
    for patient in range(150):
        main = rng.choice(4, p=[0.5, 0.3, 0.15, 0.05])
        size = 300 if patient == 7 else int(rng.integers(1, 21))
        own = np.where(rng.random(size) < 0.85, main, rng.integers(0, 4, size))
        targets.append(own)
        groups += [f"p{patient}"] * size
    labels = np.concatenate(targets)
    labels[rng.choice(len(labels), 100, replace=False)] = -1
    order = rng.permutation(len(labels))
    return labels[order], np.array(groups, object)[order]


def one_hot(labels: np.ndarray) -> np.ndarray:
    targets = np.eye(labels.max() + 1, dtype=np.float32)[labels]
    targets[labels < 0] = np.nan
    return targets


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_group_fractions_draw_whole_patients_and_are_nested(kind: str, seed: int) -> None:
    labels, groups = patients()
    targets = one_hot(labels) if kind == "multi" else labels
    previous: set[int] = set()
    for fraction in (0.001, 0.01, 0.05, 0.1, 0.33, 0.7, 1.0):
        chosen = group_subset(targets, groups, fraction, seed=seed)
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all()
        everything = np.flatnonzero((labels >= 0) & np.isin(groups, groups[chosen]))
        np.testing.assert_array_equal(chosen, everything)  # all labelled images of the drawn patients
        assert set(np.unique(labels[chosen])) == {0, 1, 2, 3}
        assert previous <= set(chosen)
        previous = set(chosen)
    assert previous == set(np.flatnonzero(labels >= 0))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_group_fractions_come_near_to_share_and_strata(fraction: float, seed: int) -> None:
    labels, groups = patients()
    labels[groups == "p7"] = -1  # the large one apart
    known = labels >= 0
    chosen = group_subset(labels, groups, fraction, seed=seed)
    assert abs(len(chosen) - fraction * known.sum()) <= 10  # half of the largest patient
    shares = [np.bincount(labels[rows], minlength=4) / len(rows) for rows in (chosen, known.nonzero()[0])]
    assert np.abs(shares[0] - shares[1]).max() < (0.08 if fraction == 0.1 else 0.04)


def test_a_large_patient_is_not_drawn_for_a_small_fraction() -> None:
    labels, groups = patients()
    for seed in range(20):
        chosen = group_subset(labels, groups, 0.01, seed=seed)
        assert "p7" not in groups[chosen] and len(chosen) < 60


def test_every_class_is_there_with_the_smallest_fraction_even_in_one_patient() -> None:
    labels = np.array([0] * 50 + [1] * 50 + [2])
    groups = np.array([f"p{i // 5}" for i in range(101)], object)
    for seed in range(5):
        chosen = group_subset(labels, groups, 0.001, seed=seed)
        assert len(np.unique(groups[chosen])) == 3 and set(labels[chosen]) == {0, 1, 2}


def test_images_without_a_group_are_groups_of_their_own() -> None:
    labels = np.repeat([0, 1], 50)
    groups = np.array(["" if i % 2 else f"p{i // 10}" for i in range(100)], object)
    chosen = group_subset(labels, groups, 0.5, seed=0)
    single = chosen[groups[chosen] == ""]
    assert 0 < len(single) < 50
    assert len(np.unique(units_of(groups))) == 50 + 10
    assert len(np.unique(units_of(np.array(["", "", "s0"], object)))) == 3  # no name is taken for a place


def test_group_fractions_are_the_same_again_and_others_with_another_seed() -> None:
    labels, groups = patients()
    first, again, other = (group_subset(labels, groups, 0.1, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    renamed = group_subset(labels, np.array([f"x{name}" for name in groups], object), 0.1, seed=3)
    np.testing.assert_array_equal(first, renamed)
    assert len(group_subset(np.full(7, -1), np.full(7, "a", object), 0.5, seed=0)) == 0
    with pytest.raises(ValueError, match="label fraction"):
        group_subset(labels, groups, 0.0, seed=0)
