"""Splits that are made: stratified, grouped, nothing lost, the same for ever."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from shards import InputError
from shards.splits import make_splits, missing_shares

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


def test_single_images_are_stratified_to_within_one():
    labels = ["common"] * 500 + ["less"] * 83 + ["rare"] * 7
    splits = make_splits([str(i) for i in range(590)], [(name,) for name in labels], SHARES, seed=0)
    table = Counter(zip(labels, splits))
    for name, total in Counter(labels).items():
        for split, share in SHARES.items():
            assert abs(table[name, split] - share * total) <= 1
            assert table[name, split] >= 1


def test_rare_class_reaches_every_split():
    labels = [("a",)] * 90 + [("b",)] * 3
    splits = make_splits([str(i) for i in range(93)], labels, SHARES, seed=3)
    assert sorted(splits[90:]) == ["test", "train", "val"]


@pytest.mark.parametrize("sizes", [(3, 4, 5, 6), (3, 100), (11, 12, 13), (9, 3, 3, 3, 3, 3)])
def test_class_of_three_or_more_images_is_in_all_splits(sizes):
    labels = [(f"class {place}",) for place, size in enumerate(sizes) for _ in range(size)]
    for seed in range(5):
        splits = make_splits([str(i) for i in range(len(labels))], labels, SHARES, seed=seed)
        table = Counter(zip(labels, splits))
        for place, size in enumerate(sizes):
            for split, share in SHARES.items():
                count = table[(f"class {place}",), split]
                assert count >= 1 and (abs(count - share * size) < 1 or size < 10)


def test_groups_stay_whole_and_shares_hold():
    rng = random.Random(1)
    units = [f"patient {rng.randrange(300)}" for _ in range(1500)]
    sick = {unit: rng.random() < 0.25 for unit in set(units)}
    splits = make_splits(units, [(str(sick[unit]),) for unit in units], SHARES, seed=0)
    where = defaultdict(set)
    for unit, split in zip(units, splits):
        where[unit].add(split)
    assert all(len(found) == 1 for found in where.values())
    for label in (True, False):
        chosen = [split for unit, split in zip(units, splits) if sick[unit] is label]
        for split, share in SHARES.items():
            assert abs(chosen.count(split) / len(chosen) - share) < 0.03


def test_one_giant_group_goes_to_train():
    units = ["giant"] * 60 + [str(i) for i in range(40)]
    splits = make_splits(units, [("a",)] * 100, SHARES, seed=0)
    assert splits[0] == "train" and Counter(splits) == {"train": 70, "val": 10, "test": 20}


def test_multi_label_stratifies_each_label():
    rng = random.Random(0)
    rates = {"a": 0.5, "b": 0.1, "c": 0.03}
    labels = [tuple(name for name, rate in rates.items() if rng.random() < rate) for _ in range(1000)]
    splits = make_splits([str(i) for i in range(1000)], labels, SHARES, seed=0)
    for name in rates:
        chosen = [split for names, split in zip(labels, splits) if name in names]
        for split, share in SHARES.items():
            assert abs(chosen.count(split) - share * len(chosen)) <= max(2, 0.03 * len(chosen))


def test_unlabelled_units_go_to_train_unless_their_group_has_labels():
    units = [str(i) for i in range(50)] + ["alone"] + [str(i) for i in range(50)]
    labels = [("a",)] * 50 + [None] * 51
    splits = make_splits(units, labels, SHARES, seed=0)
    assert splits[50] == "train" and splits[51:] == splits[:50]


def test_same_seed_same_splits_in_any_order_and_another_seed_others():
    units = [str(i) for i in range(100)]
    labels = {unit: ("ab"[int(unit) % 2],) for unit in units}
    first = dict(zip(units, make_splits(units, [labels[u] for u in units], SHARES, seed=0)))
    mixed = random.Random(0).sample(units, 100)
    again = dict(zip(mixed, make_splits(mixed, [labels[u] for u in mixed], SHARES, seed=0)))
    other = dict(zip(units, make_splits(units, [labels[u] for u in units], SHARES, seed=1)))
    assert first == again and first != other


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({""}, SHARES),
        ({"train"}, SHARES),
        ({"train", "test"}, {"train": 7 / 8, "val": 1 / 8}),
        ({"train", "val"}, {"train": 7 / 9, "test": 2 / 9}),
        ({"train", "val", "test"}, {"train": 1.0}),
    ],
)
def test_missing_splits_are_made_out_of_train(given, expected):
    assert missing_shares(given, SHARES) == pytest.approx(expected)


def test_too_little_is_refused():
    with pytest.raises(InputError, match="no train split"):
        missing_shares({"test", "val"}, SHARES)
    with pytest.raises(InputError, match="2 labelled images or groups are too few to make 3 splits"):
        make_splits(["p1", "p1", "p2"], [("a",)] * 3, SHARES, seed=0)


def test_no_sample_lost_and_no_group_split_whatever_the_input():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    sample = st.tuples(
        st.integers(0, 12), st.none() | st.lists(st.sampled_from("abc"), unique=True, max_size=3)
    )

    @hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.lists(sample, min_size=1, max_size=60), st.integers(0, 5))
    def check(samples, seed):
        units = [str(unit) for unit, _ in samples]
        labels = [None if names is None else tuple(names) for _, names in samples]
        try:
            splits = make_splits(units, labels, SHARES, seed=seed)
        except InputError:
            return
        assert len(splits) == len(samples)
        assert len({(unit, split) for unit, split in zip(units, splits)}) == len(set(units))
        assert {split for split, names in zip(splits, labels) if names is not None} == set(SHARES)

    check()
